from __future__ import annotations

import math
from types import SimpleNamespace as Namespace

import pytest
import torch
from torch import nn

from mmdefense.data.batch import split
from mmdefense.data.labelled import LabelledSamples
from mmdefense.data.text import IGNORED
from mmdefense.defenses import fine_tuning
from mmdefense.defenses.fine_tuning import Distillation, FineTuning
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.defenses.tsbd import TSBD
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.distillation import distilled
from mmdefense.registry import adapt
from mmdefense.runtime.run import copy_state

ONE = {"steps": 1, "lr": 0.1, "momentum": 0.0, "max_norm": None, "max_utility_drop": 1.0,
       "restarts": 0}  # fmt: skip


def slow_distance(student, teacher, temperature):
    """Return ``T^2 KL(teacher || student)`` of two lists of logits, one term at a time."""

    def softmax(logits):
        parts = [math.exp(value / temperature) for value in logits]
        return [part / sum(parts) for part in parts]

    p, q = softmax(student), softmax(teacher)
    return temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


def test_one_update_descends_the_loss_and_the_distance_to_the_given_model(learnt, corners):
    """Against autograd of the formula on a second copy."""
    defense = Distillation(**ONE, batch_size=24, distillation=0.3, temperature=3.0)
    batch = split(corners, defense.holdout, defense.seed)[0].everything()
    found = copy_state(defense.purify(learnt, corners).model)
    twin, teacher = learnt.fork(), learnt.fork()
    twin.model.train()
    teacher.model.eval()
    logits, wanted = twin.logits(batch.inputs), teacher.logits(batch.inputs).detach()
    p, q = ((values / 3.0).softmax(1) for values in (logits, wanted))
    distance = 9.0 * (q * (q.log() - p.log())).sum(1).mean()
    labelled = -logits.log_softmax(1)[torch.arange(len(batch)), batch.labels].mean()
    gradients = torch.autograd.grad(0.7 * labelled + 0.3 * distance, list(twin.model.parameters()))
    for (name, parameter), gradient in zip(twin.model.named_parameters(), gradients, strict=True):
        expected = parameter.detach() - 0.1 * gradient
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
    # The statistics are updated once, and the given model's not at all.
    torch.testing.assert_close(found["1.running_mean"], twin.model[1].running_mean)


def test_without_a_share_it_is_plain_fine_tuning(learnt, corners):
    settings = {"steps": 6, "batch_size": 8, "max_utility_drop": 1.0}
    plain = FineTuning(**settings).purify(learnt, corners).model
    none = Distillation(**settings, distillation=0.0).purify(learnt, corners).model
    for (name, value), other in zip(
        copy_state(plain).items(), copy_state(none).values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12, msg=name)


def test_the_distance_of_a_classifier_is_that_of_its_softmax(learnt, corners):
    batch, other = corners.everything(), learnt.fork()
    with torch.no_grad():
        next(other.model.parameters()).add_(0.3)
    loss, distance = learnt.distilled_loss(batch, other.predictions(batch), 2.0)
    torch.testing.assert_close(loss, learnt.per_sample_loss(batch))
    pairs = zip(
        learnt.logits(batch.inputs).tolist(), other.logits(batch.inputs).tolist(), strict=True
    )
    expected = [slow_distance(student, teacher, 2.0) for student, teacher in pairs]
    assert distance.tolist() == pytest.approx(expected, rel=1e-12)
    assert learnt.distilled_loss(batch, learnt.predictions(batch), 2.0)[1].abs().max() < 1e-12


def test_the_distance_of_sigmoid_outputs_is_summed_over_classes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double().eval()
    samples = LabelledSamples(torch.rand(12, 4).double(), torch.arange(12) % 3)
    adapter = adapt(net)
    batch = adapter.samples(samples).everything()
    other = adapter.fork()
    with torch.no_grad():
        other.model[0].weight.add_(0.5)
    _, distance = adapter.distilled_loss(batch, other.predictions(batch), 2.0)
    pairs = zip(
        adapter.logits(batch.inputs).tolist(), other.logits(batch.inputs).tolist(), strict=True
    )
    expected = [
        sum(slow_distance([a, 0.0], [b, 0.0], 2.0) for a, b in zip(*pair, strict=True))
        for pair in pairs
    ]
    assert distance.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_a_text_is_the_mean_over_the_tokens_of_its_answer(taught):
    adapter, samples = taught("llama")
    batch = adapter.samples(samples).take(torch.arange(4))
    other = adapter.fork()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    wanted = other.predictions(batch)
    loss, distance = adapter.distilled_loss(batch, wanted, 2.0)
    torch.testing.assert_close(loss, adapter.per_sample_loss(batch))
    known = adapter._targets(batch) != IGNORED
    mine = adapter.predictions(batch)
    for row in range(len(batch)):
        places = known[row].nonzero().flatten().tolist()
        each = [slow_distance(mine[row, t].tolist(), wanted[row, t].tolist(), 2.0) for t in places]
        assert distance[row].item() == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_tsbd_distils_from_the_model_before_its_weights_were_zeroed(learnt, corners):
    settings = ONE | {"batch_size": 24, "ratio": 0.5, "fine_tuning": "vanilla", "unlearn_epochs": 2}
    zeroed = TSBD(**settings | {"fine_tuning": "none"}).purify(learnt, corners).adapter
    found = copy_state(TSBD(**settings, distillation=0.6).purify(learnt, corners).model)
    batch = split(corners, 0.2, 0)[0].everything()
    student = distilled(zeroed, learnt.fork(), 0.6, 2.0)
    zeroed.model.train()
    parameters = list(zeroed.model.parameters())
    gradients = torch.autograd.grad(student.per_sample_loss(batch).mean(), parameters)
    for (name, parameter), gradient in zip(zeroed.model.named_parameters(), gradients, strict=True):
        expected = parameter.detach() - 0.1 * gradient
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_a_detector_is_refused_in_one_line(taught):
    adapter, samples = taught("fcos")
    with pytest.raises(UnsupportedError, match="needs a DistillingAdapter"):
        Distillation().purify(adapter, samples)


@pytest.mark.parametrize("kind", [FIP, FastFIP])
def test_the_exact_trace_refuses_it_as_it_would_have_no_effect(kind):
    with pytest.raises(BadInputError, match=r"distillation=0.5 of \w+ has no effect with trace="):
        kind(trace="true", distillation=0.5)


def test_a_split_model_is_refused_in_one_line(learnt, corners, monkeypatch):
    monkeypatch.setattr(fine_tuning, "present", lambda: Namespace(splits=True))
    with pytest.raises(UnsupportedError, match="leave out --shard, or set distillation=0"):
        FineTuning(**ONE, distillation=0.5).purify(learnt, corners)


def test_a_setting_that_a_model_cannot_follow_is_refused_in_one_line(taught):
    adapter, samples = taught("fcos")
    with pytest.raises(UnsupportedError, match="predictions, distilled_loss; set distillation=0"):
        FineTuning(**ONE, distillation=0.5).purify(adapter, samples)
