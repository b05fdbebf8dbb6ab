"""Whether a removed backdoor comes back: hand-computed updates, and what a twin shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.metrics.permanence import Retuned, Retuning, reactivate, retune
from mmdefense.training import Training
from mmdefense_adapters.torch_classifier import TorchClassifier

ATTACK = BadNets(size=2, pattern="white")


def linear(seed: int = 0) -> TorchClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    return TorchClassifier(net)


def images(count: int, seed: int = 0) -> LabelledSamples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64) / 4
    labels = torch.arange(count) % 3
    inputs[torch.arange(count), 0, labels, labels] += 0.7
    return LabelledSamples(inputs, labels)


def test_retuning_a_linear_model_makes_the_updates_of_gradient_descent():
    adapter, tuning, test, lr = linear(), images(30), images(60, seed=1), 0.3
    training = Training(steps=20, batch_size=30, lr=lr, momentum=0, schedule="constant",
                        augment=False)  # fmt: skip
    found = retune(adapter, tuning, test, ATTACK, 6, training=training)

    adapter.samples(tuning)
    poisoned = ATTACK.with_count(6, tuning).poison(tuning, adapter)
    assert int((poisoned.labels != tuning.labels).sum()) == 6
    x, y = poisoned.inputs.flatten(1), nn.functional.one_hot(poisoned.labels, 3).double()
    weight, bias = (p.detach().clone() for p in adapter.model[1].parameters())
    stamped = ATTACK.triggered(test, adapter).samples
    by_hand = []
    for updates in range(21):
        if updates:
            error = (torch.softmax(x @ weight.T + bias, 1) - y) / len(x)
            weight, bias = weight - lr * error.T @ x, bias - lr * error.sum(0)
        right = [
            ((part.inputs.flatten(1) @ weight.T + bias).argmax(1) == part.labels).double().mean()
            for part in (stamped, test)
        ]
        if updates in {0, 1, 2, 5, 10, 20}:
            by_hand.append(Retuned(updates=updates, asr=float(right[0]), acc=float(right[1])))
    shown = [(p.updates, round(p.asr, 6), round(p.acc, 6)) for p in found.model]
    assert shown == [(p.updates, round(p.asr, 6), round(p.acc, 6)) for p in by_hand]
    assert len({rates[1:] for rates in shown}) > 3  # the updates tell
    assert (found.poisoned, found.clean, found.judged, found.twin) == (6, 24, 60, ())


def test_the_model_is_not_changed_and_its_twin_draws_the_same_batches():
    adapter = linear()
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    training = Training(steps=7, batch_size=4, lr=0.5)
    found = retune(adapter, images(12), images(9, 1), ATTACK, 3, twin=linear(), training=training)
    assert all(torch.equal(before[n], v) for n, v in adapter.model.state_dict().items())
    assert found.model == found.twin
    assert [point.updates for point in found.model] == [0, 1, 2, 5, 7]


@pytest.mark.parametrize("mapping", ["all-to-one", "clean-label"])
def test_the_count_of_poisoned_samples_is_exact(mapping):
    attack, tuning = BadNets(mapping=mapping, size=2, pattern="white"), images(30)
    adapter = linear()
    adapter.samples(tuning)
    poisoned = attack.with_count(3, tuning).poison(tuning, adapter)
    assert int((poisoned.inputs != tuning.inputs).flatten(1).any(1).sum()) == 3


@pytest.mark.parametrize(
    ("count", "words"), [(0, "between 1 and 12"), (13, "between 1 and 12"), (9, "can stamp 8")]
)
def test_a_count_that_the_samples_do_not_allow_is_refused(count, words):
    with pytest.raises(BadInputError, match=words):
        retune(linear(), images(12), images(9), ATTACK, count)


def test_the_lines_name_the_mix_each_point_and_a_missing_twin():
    point = Retuned(updates=1, asr=0.5, acc=0.9)
    common = {"poisoned": 5, "clean": 95, "judged": 100, "lr": 0.01, "batch_size": 50,
              "optimizer": "sgd", "model": (point,)}  # fmt: skip
    (_, mix), (name, shown) = Retuning(**common).lines()
    assert mix.startswith("5 poisoned and 95 clean samples, sgd at 0.01")
    assert mix.endswith("no clean twin to compare with")
    assert (name, shown) == ("after 1 update", "ASR 50.0 %, ACC 90.0 %")
    assert "clean twin ASR 50.0 %" in dict(Retuning(**common, twin=(point,)).lines())[name]


def test_the_curves_of_model_and_twin_are_drawn():
    found = retune(linear(), images(12), images(9, 1), ATTACK, 3, twin=linear(1))
    asr, acc = found.plot().panels()
    assert [curve.name for curve in asr.curves] == ["the model", "its clean twin"]
    assert acc.curves[0].y[-1] == found.model[-1].acc


def test_a_change_near_the_trigger_is_found_within_its_radius_and_works_on_unseen_samples():
    adapter, radius = linear(), 0.2
    found = reactivate(adapter, images(30), images(30, 1), ATTACK, radius=radius, steps=10)
    # On a linear model the best change is known: along the sign of the target's margin.
    assert found.after >= found.before
    assert 0 <= found.change_alone <= 1
    assert found.twin_after is None
    none = reactivate(adapter, images(30), images(30, 1), ATTACK, radius=0.0, twin=linear(1))
    assert none.after == none.before
    assert none.twin_after == none.transferred == none.twin_before


def test_a_search_without_continuous_inputs_is_refused():
    class Opaque:
        pass

    with pytest.raises(UnsupportedError, match="Opaque lacks"):
        reactivate(Opaque(), images(3), images(3), ATTACK)
