"""What every adapter must do, for one tiny model of each family."""

from __future__ import annotations

import pytest
import torch
from models import CLASSES, MODELS, SIDE, build
from torch import nn

from mmdefense.data.labelled import LabelledBatch
from mmdefense.errors import BadInputError
from mmdefense.registry import adapt

N = 5


@pytest.fixture(params=MODELS)
def adapter(request):
    images = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return adapt(build(request.param), mean=[0.5] * 3, std=[0.25] * 3, example=images)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(N, 3, SIDE, SIDE, generator=generator)
    return LabelledBatch(images, torch.randint(0, CLASSES, (N,), generator=generator))


def permuted(batch, order):
    return LabelledBatch(batch.inputs[order], batch.labels[order])


def condition(model):
    """Everything about a model that a call must leave as it was."""
    return {
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "modes": [m.training for m in model.modules()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_same(before, after):
    for key in ("hooks", "modes", "wanted", "grads"):
        assert after[key] == before[key], key
    torch.testing.assert_close(after["values"], before["values"], rtol=0, atol=0)


def calls(adapter, batch):
    return {
        "samples": lambda: adapter.samples((batch.inputs, batch.labels)),
        "per_sample_loss": lambda: adapter.per_sample_loss(batch),
        "sampled_loss": lambda: adapter.sampled_loss(batch, torch.Generator()),
        "score": lambda: adapter.score(batch),
        "activations": lambda: adapter.activations(batch, [g.layer for g in adapter.unit_groups()]),
        "features": lambda: adapter.features(batch, [g.layer for g in adapter.unit_groups()]),
        "embedding": lambda: adapter.embedding(batch),
        "fork": adapter.fork,
    }


def test_per_sample_loss_is_the_training_loss_of_each_image(adapter, batch):
    loss = adapter.per_sample_loss(batch)
    assert loss.shape == (N,)
    alone = [adapter.per_sample_loss(permuted(batch, [n])) for n in range(N)]
    torch.testing.assert_close(loss, torch.cat(alone), rtol=1e-4, atol=1e-5)
    expected = nn.functional.cross_entropy(adapter.logits(batch.inputs), batch.labels)
    torch.testing.assert_close(loss.mean(), expected)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.model.parameters())


def test_permuting_the_batch_permutes_every_answer(adapter, batch):
    order = torch.tensor([3, 0, 4, 1, 2])
    layers = [group.layer for group in adapter.unit_groups()]
    for ask in (
        adapter.per_sample_loss,
        adapter.score,
        adapter.embedding,
        lambda given: adapter.features(given, layers),
    ):
        first, second = ask(batch), ask(permuted(batch, order))
        moved = {k: v[order] for k, v in first.items()} if isinstance(first, dict) else first[order]
        torch.testing.assert_close(second, moved, rtol=1e-4, atol=1e-5)


def test_sampled_loss_gives_the_loss_and_a_score_of_mean_zero(adapter, batch):
    loss, score = adapter.sampled_loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, adapter.per_sample_loss(batch))
    assert score.shape == (N,)
    _, same = adapter.sampled_loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(score, same)
    assert score.requires_grad


def test_transformers_are_told_from_nets_with_batch_norm(request, adapter):
    name = request.node.callspec.params["adapter"]
    assert adapter.layer_norm == any(p in name for p in ("vit", "encoder", "swin", "convnext"))


def test_score_counts_right_answers(adapter, batch):
    right = adapter.logits(batch.inputs).argmax(1)
    assert adapter.score(LabelledBatch(batch.inputs, right)).tolist() == [1.0] * N
    wrong = (right + 1) % CLASSES
    assert adapter.score(LabelledBatch(batch.inputs, wrong)).tolist() == [0.0] * N
    assert adapter.chance == 1 / CLASSES


def test_features_give_one_finite_value_per_unit(adapter, batch):
    groups = adapter.unit_groups()
    assert len(groups) > 0
    features = adapter.features(batch, [group.layer for group in groups])
    for group in groups:
        assert features[group.layer].shape == (N, group.size), group
        assert features[group.layer].isfinite().all()
        assert not features[group.layer].requires_grad
    assert any(features[group.layer].count_nonzero() for group in groups)


def test_unit_groups_name_real_parameters_and_spare_the_classes(adapter):
    parameters = dict(adapter.model.named_parameters())
    named = [name for group in adapter.unit_groups() for name in group.axes]
    assert len(named) == len(set(named))
    for group in adapter.unit_groups():
        for name, axis in group.axes.items():
            assert parameters[name].shape[axis] == group.size * group.width, name
    assert adapter.head is not None
    assert f"{adapter.head}.weight" not in named


def test_silencing_a_unit_zeroes_its_feature_and_no_other_of_its_layer(adapter, batch):
    for group in adapter.unit_groups():
        before = adapter.features(batch, [group.layer])[group.layer]
        unit = int(before.sum(0).argmax())
        fork = adapter.fork()
        span = slice(unit * group.width, (unit + 1) * group.width)
        with torch.no_grad():
            for name, axis in group.axes.items():
                fork.model.get_parameter(name).movedim(axis, 0)[span] = 0
        after = fork.features(batch, [group.layer])[group.layer]
        before[:, unit] = 0
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5, msg=str(group))


def test_every_family_of_layer_is_found(request, adapter):
    kinds = {group.kind for group in adapter.unit_groups()}
    name = request.node.callspec.params["adapter"]
    if "vit" in name or name in {"hf-swin", "transformer-encoder"}:
        assert {"head", "neuron"} <= kinds
    elif name != "torchvision-swin":
        assert "filter" in kinds


def test_embedding_is_what_the_output_layer_reads(adapter, batch):
    embedding = adapter.embedding(batch)
    assert embedding.shape[0] == N
    head = adapter.model.get_submodule(adapter.head)
    if isinstance(head, nn.Linear):
        assert embedding.shape == (N, head.in_features)
        torch.testing.assert_close(head(embedding), adapter.logits(batch.inputs))


def test_fork_shares_no_storage_and_answers_the_same(adapter, batch):
    fork = adapter.fork()
    expected = adapter.per_sample_loss(batch)
    torch.testing.assert_close(fork.per_sample_loss(batch), expected)
    mine = {value.data_ptr() for value in adapter.model.state_dict().values()}
    assert mine.isdisjoint(value.data_ptr() for value in fork.model.state_dict().values())
    with torch.no_grad():
        for parameter in fork.model.parameters():
            parameter.zero_()
    torch.testing.assert_close(adapter.per_sample_loss(batch), expected)


def test_eval_mode_is_deterministic(adapter, batch):
    first, second = adapter.logits(batch.inputs), adapter.logits(batch.inputs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_calls_leave_the_model_as_it_was(adapter, batch):
    for parameter in list(adapter.model.parameters())[::2]:
        parameter.requires_grad_(False)
    leaf = next(m for m in adapter.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    leaf.train()  # a mixed mode must survive too
    before = condition(adapter.model)
    for call in calls(adapter, batch).values():
        call()
        assert_same(before, condition(adapter.model))


def test_a_model_in_train_mode_keeps_its_statistics(batch):
    adapter = adapt(build("small-resnet").train())
    before = condition(adapter.model)
    adapter.samples((batch.inputs, batch.labels))
    adapter.unit_groups()
    assert_same(before, condition(adapter.model))


def test_features_are_what_the_next_layer_reads_averaged_over_positions(batch):
    model = build("small-resnet")
    with torch.no_grad():
        model.bn.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        expected = model.bn(model.conv(batch.inputs)).relu().mean((2, 3))
    adapter = adapt(model, example=batch.inputs[:1])
    torch.testing.assert_close(adapter.features(batch, ["conv"])["conv"], expected)


@pytest.mark.parametrize("name", ["hf-vit", "hf-swin", "timm-vit", "torchvision-vit"])
def test_a_heads_feature_is_the_size_of_what_it_adds(batch, name):
    """Against the change of the block's output, head by head, when the head alone is removed."""
    adapter = adapt(build(name), example=batch.inputs[:1])
    group = next(group for group in adapter.unit_groups() if group.kind == "head")
    block = adapter.model.get_submodule(group.layer.rpartition(".")[0])
    outputs = []

    def keep(_, __, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    whole = adapter.features(batch, [group.layer])[group.layer]
    handle = block.register_forward_hook(keep)
    for head in range(group.size):
        weight = adapter.model.get_parameter(f"{group.layer}.weight").data
        columns = slice(head * group.width, (head + 1) * group.width)
        kept = weight[:, columns].clone()
        adapter.score(batch)
        weight[:, columns] = 0
        adapter.score(batch)
        weight[:, columns] = kept
        change = (outputs[-2] - outputs[-1]).square().mean(-1).sqrt()
        torch.testing.assert_close(whole[:, head], change.reshape(N, -1).mean(1))
    handle.remove()


def test_an_exception_leaves_the_model_as_it_was(adapter, batch, monkeypatch):
    adapter.unit_groups()
    head = adapter.model.get_submodule(adapter.head)
    before = condition(adapter.model)

    def boom(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(head, "forward", boom)
    for name, call in calls(adapter, batch).items():
        if name == "fork":
            continue
        with pytest.raises((RuntimeError, BadInputError), match="boom"):
            call()
        assert_same(before, condition(adapter.model))


def test_finding_the_units_survives_an_exception(batch, monkeypatch):
    model = build("small-resnet")
    adapter = adapt(model, example=batch.inputs[:1])
    before = condition(model)
    monkeypatch.setattr(model.linear, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.unit_groups()
    assert_same(before, condition(model))


def test_the_score_is_unbiased_for_the_fisher_trace(batch):
    """Mean squared gradient of the score over all sign patterns equals the explicit Tr(F_n)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES)).double()
    adapter = adapt(model)
    one = LabelledBatch(batch.inputs[:1].double(), batch.labels[:1])
    log_p = adapter.logits(one.inputs).log_softmax(1)[0]
    gradients = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(value, model.parameters(), retain_graph=True)]
        )
        for value in log_p
    ]
    exact = sum(p.exp() * g.square().sum() for p, g in zip(log_p, gradients, strict=True))
    generator, squares, total = torch.Generator().manual_seed(0), [], 0
    for _ in range(400):
        _, score = adapter.sampled_loss(one, generator)
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(score.sum(), model.parameters())]
        )
        squares.append(gradient.square().sum())
        total = total + gradient
    mean = torch.stack(squares).mean()
    error = torch.stack(squares).std() / len(squares) ** 0.5
    assert abs(mean - exact) < 4 * error + 1e-9
    assert (total / len(squares)).norm() < 4 * (exact / len(squares)) ** 0.5
