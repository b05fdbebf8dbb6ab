"""What units compute and what a model reads can be differentiated: some models of each domain."""

from __future__ import annotations

from dataclasses import replace

import cloud_models
import detectors
import language_models
import models
import pytest
import torch
import video_models

from mmdefense.data.labelled import LabelledBatch
from mmdefense.protocol import InputAdapter, missing_members
from mmdefense.registry import adapt

N = 3
IMAGES = ("small-resnet", "cnn-without-batchnorm", "transformer-encoder", "hf-vit", "hf-swin")
VIDEOS = ("pytorchvideo-slow", "hf-videomae")
CLOUDS = ("pointnet", "dgcnn", "point-transformer", "channels-first")
LANGUAGE = ("gpt2", "llama", "t5", "lora")
DETECTION = ("retinanet", "fcos", "faster-rcnn", "yolos", "rt-detr")


def labelled(*shape):
    inputs = torch.rand(N, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return LabelledBatch(inputs, torch.arange(N))


def image(name):
    adapter = adapt(models.build(name).double(), mean=[0.5] * 3, std=[0.25] * 3)
    return adapter, labelled(3, models.SIDE, models.SIDE)


def video(name):
    adapter = adapt(video_models.build(name).double(), task="video-classification")
    return adapter, labelled(3, video_models.FRAMES, video_models.SIDE, video_models.SIDE)


def cloud(name):
    model, options = cloud_models.build(name).double(), {}
    if name == "channels-first":
        options = {"channels_first": True}
    clouds = cloud_models.clouds_for(model, N).double()
    return adapt(model, adapter="points", **options), LabelledBatch(clouds, torch.arange(N))


def language(name):
    adapter = adapt(language_models.build(name).double(), tokenizer=language_models.tokenizer())
    return adapter, adapter.samples(language_models.texts()).take(torch.arange(N))


def detection(name):
    batch, model = detectors.images().take(torch.tensor([1, 2, 4])), detectors.build(name)
    if name not in detectors.TORCHVISION:  # the losses of the others are for float32
        return adapt(model), batch
    return adapt(model.double()), replace(batch, images=batch.images.double())


# Finite differences cross no ties here: no top queries are chosen, no neighbours, no proposals.
SMOOTH = ("transformer-encoder", "hf-vit", "hf-videomae", "channels-first", "gpt2", "retinanet")

BUILT = {
    **{name: image for name in IMAGES},
    **{name: video for name in VIDEOS},
    **{name: cloud for name in CLOUDS},
    **{name: language for name in LANGUAGE},
    **{name: detection for name in DETECTION},
}


@pytest.fixture(scope="module", params=BUILT)
def both(request):
    adapter, batch = BUILT[request.param](request.param)
    if adapter.example is None:
        adapter.example = batch.rows(slice(0, 1))
    return adapter, batch


def read(adapter, batch, group):
    """Return each run of what a hook at ``read_at`` sees, the units last."""
    found, where = [], group.read_at
    layer = adapter.model.get_submodule(where.layer or group.layer)

    def hook(_, given, output):
        found.append((output if where.side == "output" else given[0]).movedim(where.axis, -1) + 0)

    handle = layer.register_forward_hook(hook)
    adapter.answer(batch)
    handle.remove()
    return found


def counted(adapter, batch, layer):
    """Return which positions of a layer count, ``(N, L)``, or none where all do."""
    return adapter._mask_of(layer, batch) if hasattr(adapter, "_mask_of") else None


def test_activations_are_what_a_hook_sees_and_pool_to_the_features(both):
    adapter, batch = both
    groups = list(adapter.unit_groups())
    layers = [group.layer for group in groups]
    whole, features = adapter.activations(batch, layers), adapter.features(batch, layers)
    assert set(whole) == set(layers)
    for group in groups:
        values = whole[group.layer]
        assert values.shape[::2] == (N, group.size * group.width), group
        assert values.requires_grad
        runs = read(adapter, batch, group)
        by_proposal = "roi_heads" in group.layer
        if runs and not by_proposal:
            expected = torch.cat([run.reshape(N, -1, run.shape[-1]) for run in runs], 1)
            assert torch.equal(values, expected), group
        if group.read_at.side == "input" or len(runs) > 1 or by_proposal:
            continue
        mask = counted(adapter, batch, group.layer)
        weight = torch.ones_like(values[..., :1]) if mask is None else mask[..., None]
        pooled = (values.relu() * weight).sum(1) / weight.sum(1)
        torch.testing.assert_close(features[group.layer], pooled)


def test_a_read_unit_is_proportional_to_its_outer_parameters(both):
    """Doubling them doubles what the unit gives on: its own activation, or what it adds."""
    adapter, batch = both
    groups = [g for g in adapter.unit_groups() if g.read_at.side == "output"]
    for group in groups[:: max(1, len(groups) // 4)]:
        module = next(reversed(group.outer)).rpartition(".")[0]
        if module != (group.read_at.layer or group.layer):  # a group norm, or a low-rank update
            continue
        before = read(adapter, batch, group)[0].detach()
        fork = adapter.fork()
        with torch.no_grad():
            for name, axis in group.outer.items():
                fork.model.get_parameter(name).movedim(axis, 0)[0] *= 2
        after = read(fork, batch, group)[0].detach()
        before[..., 0] *= 2
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


def total(values):
    return torch.stack([value.square().mean() for value in values]).sum()


def test_gradients_through_activations_are_those_through_a_hook(both):
    adapter, batch = both
    groups = [g for g in adapter.unit_groups() if read(adapter, batch, g)]
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    found = adapter.activations(batch, [group.layer for group in groups])
    if "roi_heads.box_head.fc7" in found:  # has rows for proposals
        groups = [group for group in groups if "roi_heads" not in group.layer]
    hooked = [
        torch.cat([run.reshape(N, -1, run.shape[-1]) for run in read(adapter, batch, group)], 1)
        for group in groups
    ]
    values = total([found[group.layer] for group in groups])
    first, second = (
        torch.autograd.grad(value, parameters, materialize_grads=True)
        for value in (values, total(hooked))
    )
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    assert any(gradient.count_nonzero() for gradient in first)


def agree(value, tensors, step):
    """Compare a derivative of ``value()`` along a random direction with that of differences."""
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors]
    found = torch.autograd.grad(value(), tensors, materialize_grads=True)
    exact = sum((g * v).sum() for g, v in zip(found, along, strict=True))
    sides = []
    with torch.no_grad():
        for moved in (step, -2 * step):
            for tensor, v in zip(tensors, along, strict=True):
                tensor.add_(v, alpha=moved)
            sides.append(value())
    torch.testing.assert_close(exact, (sides[0] - sides[1]) / (2 * step), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SMOOTH)
def test_activations_and_inputs_have_the_gradient_of_finite_differences(name):
    adapter, batch = BUILT[name](name)
    if adapter.example is None:
        adapter.example = batch.rows(slice(0, 1))
    layers = [group.layer for group in adapter.unit_groups()]
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    inputs = adapter.inputs(batch).requires_grad_()

    def activations():
        return total(adapter.activations(adapter.with_inputs(batch, inputs), layers).values())

    def loss():
        return adapter.per_sample_loss(adapter.with_inputs(batch, inputs)).mean()

    agree(loss, [inputs], 1e-6)
    agree(activations, [*parameters, inputs], 1e-6)


def test_inputs_can_be_replaced(both):
    adapter, batch = both
    assert missing_members(adapter, InputAdapter) == []
    inputs = adapter.inputs(batch)
    assert not inputs.requires_grad
    assert len(inputs) == N
    same = adapter.per_sample_loss(adapter.with_inputs(batch, inputs.clone()))
    torch.testing.assert_close(same, adapter.per_sample_loss(batch))
    bounds = adapter.input_bounds(batch)
    assert bounds is None or (inputs.min() >= bounds[0] and inputs.max() <= bounds[1])
    moved = inputs.clone().requires_grad_()
    adapter.per_sample_loss(adapter.with_inputs(batch, moved))[0].backward(inputs=[moved])
    assert moved.grad[0].count_nonzero()
    assert not moved.grad[1:].count_nonzero()  # each sample has a loss of its own


@pytest.mark.parametrize("name", ["transformer-encoder", "torchvision-vit"])
def test_gradients_reach_the_weights_of_fused_attention_through_its_heads(name):
    adapter, batch = image(name)
    adapter.example = batch.rows(slice(0, 1))
    group = next(g for g in adapter.unit_groups() if g.kind == "head")
    block = adapter.model.get_submodule(group.layer.rpartition(".")[0])
    before = [len(module._forward_hooks) for module in adapter.model.modules()]
    adapter.activations(batch, [group.layer])[group.layer].square().sum().backward()
    assert block.in_proj_weight.grad.abs().sum() > 0
    assert block.out_proj.weight.grad is None
    assert [len(module._forward_hooks) for module in adapter.model.modules()] == before
