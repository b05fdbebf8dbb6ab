"""The Python front door."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from clocks import Clock
from commands import Net, fitted_net, small_images
from safetensors.torch import load_file
from torch import nn

import mmdefense as mmd
from mmdefense.checkpoints.runs import RunStore
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.defenses.base import Defense
from mmdefense.defenses.outcome import TriggerSearch
from mmdefense.plots.activeness import Activeness
from mmdefense.plots.inverted_samples import InvertedSamples
from mmdefense.plots.pruning_curve import PruningCurve
from mmdefense.plots.recovered_triggers import RecoveredTriggers
from mmdefense.plots.weight_change import WeightChange
from mmdefense.report.record import read_record
from mmdefense.runtime.deadline import Deadline


@dataclass(frozen=True, kw_only=True)
class Shrink(Defense):
    """Multiplies the weights of the output layer, and prunes one filter.

    Attributes:
        factor: What by.

    References:
        Nobody. *On Making Things
        Smaller*. Nowhere 1999. arXiv:0000.00000
    """

    factor: float = 0.5

    def _run(self, work):
        model = work.adapter.model
        with torch.no_grad():
            model.head.weight *= self.factor
            model.conv.weight[2] = 0
            model.conv.bias[2] = 0
        for step in (1, 2):
            work.run.report("shrink", step, 2, loss=1 / step)
        images, names = torch.rand(2, 1, 8, 8), ["class 0", "class 1"]
        work.search = TriggerSearch(targets=2, found=1)
        work.plots += [
            PruningCurve([0.0, 0.5], [0.9, 0.8], 0.5),
            WeightChange(torch.rand(7), reset=2),
            Activeness(torch.rand(7), torch.rand(7)),
            RecoveredTriggers(images, names, [0.97, 0.4], [True, False]),
            InvertedSamples(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8), "patch to 0", 0.97),
        ]


@pytest.fixture
def net():
    return fitted_net()


@pytest.fixture
def clean():
    return small_images()


def test_the_given_model_stays_and_the_purified_one_is_of_its_class(net, clean):
    before = hash_weights(net)
    purified = mmd.purify(net, clean, Shrink(max_utility_drop=1.0))
    assert hash_weights(net) == before
    assert isinstance(purified.model, Net)
    assert torch.equal(purified.model.head.weight, net.head.weight / 2)
    assert purified.guard is purified.result.guard


def test_an_adapter_is_taken_as_it_is(net, clean):
    adapter = mmd.adapt(net, mean=(0.5,), std=(0.5,))
    purified = mmd.purify(adapter, clean, Shrink())
    assert purified.prepared.adapter is adapter
    assert purified.result.adapter.mean == (0.5,)


def test_settings_and_seed_override_a_name_and_an_instance(net, clean):
    by_name = mmd.purify(net, clean, "fine-tuning", steps=2, seed=5)
    assert (by_name.defense.steps, by_name.defense.seed) == (2, 5)
    by_instance = mmd.purify(net, clean, Shrink(factor=0.25, seed=7), max_utility_drop=1.0)
    assert by_instance.defense == Shrink(factor=0.25, seed=7, max_utility_drop=1.0)


def test_the_seed_decides_the_result(net, clean):
    weights = [
        hash_weights(mmd.purify(net, clean, "fine-tuning", steps=3, seed=seed).model)
        for seed in (0, 0, 1)
    ]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factr": 1.0}, "Shrink has no setting 'factr'; choose from factor, holdout, "),
        ({"factor": "half"}, "factor of Shrink must be a number, got 'half'"),
        ({"factor": True}, "factor of Shrink must be a number, got True"),
        ({"seed": 1.5}, "seed of Shrink must be a whole number, got 1.5"),
    ],
)
def test_a_setting_that_cannot_be_is_named(net, clean, settings, message):
    with pytest.raises(mmd.BadInputError, match=message):
        mmd.purify(net, clean, Shrink(), **settings)


def test_modes_and_optional_settings_are_checked(net, clean):
    with pytest.raises(
        mmd.BadInputError, match="trace of FIP must be 'perturbation' or 'true' or 'empirical'"
    ):
        mmd.purify(net, clean, "fip", trace="guessed")
    with pytest.raises(mmd.BadInputError, match="max_norm of FIP must be a number or None"):
        mmd.purify(net, clean, "fip", max_norm="none")


def test_progress_is_reported(net, clean):
    events = []
    one = Shrink(max_utility_drop=1.0)  # no cross-validation
    mmd.purify(net, clean, one, progress=events.append, evidence="none")
    assert [(event.stage, event.step, event.total) for event in events] == [
        ("utility before", 0, 1),
        ("utility before", 1, 1),
        ("shrink", 1, 2),
        ("shrink", 2, 2),
        ("guard", 0, 0),
        ("guard", 1, 0),
    ]


def test_the_record_says_what_was_done(net, clean):
    purified = mmd.purify(net, clean, Shrink(max_utility_drop=1.0, seed=3), evidence="full")
    record = purified.record()
    assert record.task == "image-classification"
    assert record.model.sha256_before == hash_weights(net)
    assert record.model.sha256_after == hash_weights(purified.model)
    assert record.defense.settings["factor"] == 0.5
    assert record.defense.reference == (
        "Nobody. On Making Things Smaller. Nowhere 1999. arXiv:0000.00000"
    )
    assert (record.triggers.targets, record.triggers.found) == (2, 1)
    assert record.provenance.seed == 3
    assert record.data.samples == 30
    assert record.guard.drop_high - record.guard.drop == purified.guard.margin
    layers = {layer.layer: layer for layer in record.layers}
    assert list(layers) == ["conv", "head"]
    assert layers["head"].change == pytest.approx(0.5)
    assert (layers["conv"].units, layers["conv"].pruned) == (4, 1)
    assert record.measured["lambda_max_before"] != record.measured["lambda_max_after"]


def test_the_seconds_are_those_of_all_parts(net, clean, tmp_path):
    clock, store = Clock(), RunStore(tmp_path / "states")

    def pass_by(event):
        clock.now += 5

    given = {"steps": 60, "progress": pass_by, "store": store, "evidence": "none"}
    cut = mmd.purify(net, clean, "fine-tuning", max_seconds=Deadline(30, clock), **given)
    assert cut.result.stopped
    whole = mmd.purify(net, clean, "fine-tuning", max_seconds=Deadline(math.inf, clock), **given)
    assert not whole.result.stopped
    alone = mmd.purify(
        net, clean, "fine-tuning", max_seconds=Deadline(math.inf, clock), **{**given, "store": None}
    )
    assert whole.result.seconds > alone.result.seconds > 0
    assert whole.record().seconds == whole.result.seconds
    assert whole.record().provenance.threads == (1, 1)
    assert alone.record().provenance.threads == (1,)


def test_a_registered_defense_is_recorded_by_its_name(net, clean):
    assert mmd.purify(net, clean, "fine-tuning", steps=1).record().defense.name == "fine-tuning"


def test_save_writes_model_record_and_page(net, clean, tmp_path):
    purified = mmd.purify(net, clean, Shrink(max_utility_drop=1.0), evidence="full")
    purified.save(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: value.tolist() for name, value in written.items()} == {
        name: value.tolist() for name, value in purified.model.state_dict().items()
    }
    record = read_record(tmp_path / "out" / "purification.json")
    assert list(record.model.files_after) == ["model.safetensors"]
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    for title in (
        "Pruning curve",
        "Neuron weight change",
        "Neuron activeness",
        "Recovered triggers",
        "Samples with a recovered trigger",
        "Loss smoothness",
        "Penultimate layer",
        "What was changed",
        "Training curves",
    ):
        assert title in page


def test_save_refuses_what_exists_and_leaves_it(net, clean, tmp_path):
    purified = mmd.purify(net, clean, Shrink())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(mmd.BadInputError, match="already exists"):
        purified.save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]


def test_nothing_appears_where_the_page_fails(net, clean, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr("mmdefense.pipeline.purification.rebuild", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        mmd.purify(net, clean, Shrink()).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * 2


class Once(Net):
    def forward(self, images):
        return NoSecondDerivative.apply(super().forward(images))


def test_a_model_without_a_hessian_has_a_page_all_the_same(clean, tmp_path):
    defense = Shrink(max_utility_drop=1.0)
    accept = {"accept_low_utility": True, "evidence": "full"}
    purified = mmd.purify(Once(), clean, defense, **accept)
    purified.save(tmp_path / "out")
    assert purified.record().measured == {}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Loss smoothness" not in page
    assert "The curvature: not measured; the model must be differentiated twice" in page


def test_without_evidence_the_page_says_so_and_has_no_empty_parts(net, clean, tmp_path):
    purified = mmd.purify(net, clean, "fine-tuning", steps=1, evidence="none")
    purified.save(tmp_path / "out")
    record = purified.record()
    assert (record.layers, record.measured, record.spectra) == ((), {}, {})
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Nothing beyond the verdict was measured" in page
    assert "What was changed" not in page


def test_the_record_only_reads_what_was_measured(net, clean, monkeypatch):
    purified = mmd.purify(net, clean, Shrink(), evidence="full")

    def fail(*_):
        raise AssertionError("a model was run")

    monkeypatch.setattr(Net, "forward", fail)
    assert purified.record().evidence.level == "full"
    assert purified.plots()


def test_a_level_of_evidence_that_is_none_is_refused_before_anything_is_done(net, clean):
    with pytest.raises(mmd.BadInputError, match="evidence must be one of none, fast, full, got 'x"):
        mmd.purify(net, clean, Shrink(), evidence="x")


def test_a_model_that_no_layer_ends_has_no_embedding(clean, tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, images):
            return self.conv(images).mean((2, 3))

    accept = {"accept_low_utility": True, "evidence": "full"}
    purified = mmd.purify(Sum(), clean, "fine-tuning", steps=1, **accept)
    purified.save(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").exists()
