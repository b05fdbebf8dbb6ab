"""The same weights with another end: what is got from them is the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from everyday.answers import IMAGES, LABELS, alone, heads_in_train, net, softmax
from torch import nn

import mmdefense as mmd
from mmdefense.errors import UnsupportedError
from mmdefense.notes import Note

DATA = (IMAGES, LABELS)


def seen(model):
    """Return an adapter that has seen the data, and all of it as a batch."""
    adapter = mmd.adapt(model)
    return adapter, adapter.samples(DATA).take(torch.arange(len(LABELS)))


@pytest.mark.parametrize("defense", ["fip", "fine-pruning"])
@pytest.mark.parametrize("end", ["softmax layer", "softmax function", "heads"])
def test_a_defense_comes_to_the_same_weights(end, defense):
    plain, other = net(), net({"softmax function": softmax, "heads": heads_in_train}.get(end))
    if end == "softmax layer":
        plain, other = alone("images"), alone("images").append(nn.Softmax(1))
    settings = {"steps": 5, "batch_size": 8, "lr": 0.1, "restarts": 0, "max_utility_drop": 1.0}
    settings["accept_low_utility"] = True
    first, second = (mmd.purify(model, DATA, defense, **settings) for model in (plain, other))
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert second.guard.after == first.guard.after


def test_the_form_is_said_and_the_head_is_found():
    with pytest.warns(Note, match="probabilities .* what its last layer '2' reads"):
        adapter, batch = seen(alone("images").append(nn.Softmax(1)))
    assert adapter.head == "1"
    weight, bias = adapter.head_weights()
    outputs = adapter.head_inputs(batch) @ weight.T + bias
    torch.testing.assert_close(outputs, adapter.logits(batch.inputs))
    assert torch.equal(adapter.score_outputs(batch, outputs), adapter.score(batch))


def test_a_fork_keeps_the_form_and_the_model_its_bits():
    model = net(softmax).train()
    given = {name: value.clone() for name, value in model.state_dict().items()}
    adapter, batch = seen(model)
    torch.testing.assert_close(model.state_dict(), given, rtol=0, atol=0)
    assert model.training
    adapter.model.eval()
    torch.testing.assert_close(
        adapter.fork().per_sample_loss(batch), adapter.per_sample_loss(batch)
    )


def test_log_probabilities_are_logits():
    adapter, batch = seen(alone("images").append(nn.LogSoftmax(1)))
    expected = F.cross_entropy(alone("images")(IMAGES), LABELS, reduction="none")
    torch.testing.assert_close(adapter.per_sample_loss(batch), expected)


def test_probabilities_of_zero_have_finite_derivatives():
    model = net(softmax)
    with torch.no_grad():
        model.head.weight.mul_(1e3)
    adapter, batch = seen(model)
    _, score = adapter.sampled_loss(batch, torch.Generator().manual_seed(0))
    loss = adapter.per_sample_loss(batch).sum()
    for value in (score.sum(), loss):
        first = torch.autograd.grad(value, model.head.weight, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), model.head.weight)[0]
        assert first.isfinite().all()
        assert second.isfinite().all()


def test_the_score_of_a_sigmoid_is_unbiased_for_the_fisher_trace():
    adapter, batch = seen(alone("images").append(nn.Sigmoid()))
    one = type(batch)(batch.inputs[:1], batch.labels[:1])
    parameters = list(adapter.model.parameters())

    def squared(value):
        return sum(g.square().sum() for g in torch.autograd.grad(value, parameters))

    logits = adapter.logits(one.inputs)[0]
    p = logits.sigmoid().detach()
    exact = sum(q * (1 - q) * squared(adapter.logits(one.inputs)[0, k]) for k, q in enumerate(p))
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [squared(adapter.sampled_loss(one, generator)[1].sum()) for _ in range(200)]
    )
    assert abs(found.mean() - exact) < 4 * found.std() / 200**0.5 + 1e-6


def test_values_in_0_to_1_alone_are_no_sigmoid():
    adapter, _ = seen(net(lambda logits, _: logits.clamp(0, 1)))
    assert not adapter._each_class_alone


def test_what_holds_no_logits_is_named():
    with pytest.raises(UnsupportedError, match=r"a dict of a \(8, 3\), b \(8, 3\); wrap it"):
        seen(net(lambda logits, _: {"a": logits, "b": logits}))
