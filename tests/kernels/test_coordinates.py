"""What a defense trains, against plain writing of weights and finite differences, in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mmdefense.checkpoints.runs import RunStore
from mmdefense.kernels.coordinates import (
    SingularValues,
    UnitMasks,
    WeightMasks,
    Weights,
    trainable,
)
from mmdefense.kernels.loop import mean_loss_gradient, optimise
from mmdefense.kernels.units import parameters_by_name, prune
from mmdefense.runtime.run import Run, copy_state
from mmdefense.training import Training

SPACES = {
    "weights": lambda a: Weights(trainable(a.model)),
    "singular-values": lambda a: SingularValues(a.model, scale=2.0),
    "matrices-alone": lambda a: SingularValues(a.model, others=False),
    "unit-masks": lambda a: UnitMasks(a.model, a.unit_groups()),
    "masks-without-biases": lambda a: UnitMasks(a.model, a.unit_groups(), biases="none"),
    "masks-and-bias-masks": lambda a: UnitMasks(a.model, a.unit_groups(), biases="own"),
    "weight-masks": lambda a: WeightMasks([p for p in trainable(a.model) if p.ndim > 1]),
}


@pytest.fixture(params=["net", "vit"])
def given(request, adapter, vit):
    return {"net": adapter, "vit": vit}[request.param]


@pytest.fixture(params=SPACES)
def space(request, given):
    return SPACES[request.param](given)


def shift(space, size=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in space.parameters:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(drawn, alpha=size)


def test_at_the_start_the_weights_are_the_given_ones_bit_for_bit(given, space):
    before = copy_state(given.model)
    for value, weight in zip(space.values(), space.weights, strict=True):
        assert torch.equal(value, weight)
    space.settle()
    assert all(torch.equal(before[name], value) for name, value in copy_state(given.model).items())


def test_pull_back_is_the_derivative_of_the_loss_of_the_written_model(given, space, samples):
    batch = samples.everything()
    shift(space)
    space.write()
    _, found = mean_loss_gradient(given, batch, space.weights)
    pulled = space.pull_back(found)
    generator = torch.Generator().manual_seed(1)
    for parameter, gradient in zip(space.parameters, pulled, strict=True):
        assert gradient.shape == parameter.shape
        flat = parameter.detach().view(-1)
        for place in torch.randint(len(flat), (4,), generator=generator).tolist():
            losses = []
            for step in (1e-6, -2e-6, 1e-6):
                flat[place] += step
                space.write()
                losses.append(given.per_sample_loss(batch).mean().item())
            expected = (losses[0] - losses[1]) / 2e-6
            assert gradient.view(-1)[place].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_values_are_differentiable_and_pull_back_is_their_product(space):
    shift(space)
    generator = torch.Generator().manual_seed(2)
    along = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in space.weights]
    total = sum((v * a).sum() for v, a in zip(space.values(), along, strict=True))
    expected = torch.autograd.grad(total, space.parameters, materialize_grads=True)
    torch.testing.assert_close(space.pull_back(along), list(expected), rtol=1e-13, atol=1e-13)
    graph = [a.clone().requires_grad_() for a in along]
    assert all(p.requires_grad for p in space.pull_back(graph))
    assert not any(p.requires_grad for p in space.pull_back(along))


def read(adapter, batch, group):
    return adapter.activations(batch, [group.layer])[group.layer].detach()


def test_a_mask_scales_the_output_of_its_unit_and_no_other(given, samples):
    batch = samples.everything()
    for number, group in enumerate(given.unit_groups()):
        fork = given.fork()
        space = UnitMasks(fork.model, fork.unit_groups())
        mask = torch.rand(group.size, generator=torch.Generator().manual_seed(3)).double()
        with torch.no_grad():
            space.masks[number].copy_(mask)
        space.write()
        before = read(given, batch, group)
        if group.read_at.side == "output":
            torch.testing.assert_close(read(fork, batch, group), before * mask)
            continue
        weight = given.model.get_parameter(f"{group.layer}.weight").detach()
        masked = fork.model.get_parameter(f"{group.layer}.weight").detach()
        scaled = before * mask.repeat_interleave(group.width)
        torch.testing.assert_close(before @ masked.T, scaled @ weight.T)


def test_masks_of_zero_prune(given, samples):
    batch, groups = samples.everything(), list(given.unit_groups())
    chosen = [(number, 0) for number in range(len(groups))]
    quiet, masked = given.fork(), given.fork()
    prune(quiet.model, groups, chosen)
    space = UnitMasks(masked.model, groups)
    with torch.no_grad():
        for mask in space.masks:
            mask[0] = 0
    space.write()
    torch.testing.assert_close(masked.logits(batch.inputs), quiet.logits(batch.inputs))


def test_biases_have_the_units_mask_their_own_or_none(adapter):
    groups = adapter.unit_groups()
    before = parameters_by_name(adapter.model)
    factors = {"shared": (0.5, 0.5), "none": (0.5, 1.0), "own": (0.5, 0.25)}
    for biases, (weight, bias) in factors.items():
        fork = adapter.fork()
        space = UnitMasks(fork.model, groups, biases=biases)
        with torch.no_grad():
            for mask in space.masks:
                mask.fill_(0.5)
            for mask in space.bias_masks:
                mask.fill_(0.25)
        space.write()
        after = parameters_by_name(fork.model)
        masked = {name for group in groups for name in group.outer}
        assert "1.weight" in masked
        assert "0.weight" not in masked  # BatchNorm follows
        for name, value in after.items():
            factor = bias if name.endswith("bias") else weight
            assert torch.equal(value, before[name] * (factor if name in masked else 1)), name


def test_projection_keeps_masks_in_their_bounds(adapter):
    for space in (
        UnitMasks(adapter.model, adapter.unit_groups(), bounds=(0.2, 0.8)),
        WeightMasks(trainable(adapter.model), bounds=(0.2, 0.8)),
    ):
        shift(space, size=2.0)
        space.project()
        assert all(p.min() >= 0.2 and p.max() <= 0.8 for p in space.parameters)
    free = UnitMasks(adapter.model, adapter.unit_groups(), bounds=None)
    shift(free, size=2.0)
    kept = [p.clone() for p in free.parameters]
    free.project()
    assert all(torch.equal(p, k) for p, k in zip(free.parameters, kept, strict=True))


def test_parameters_that_are_frozen_stay_as_they_are(adapter):
    adapter.model[1].weight.requires_grad_(False)
    space = UnitMasks(adapter.model, adapter.unit_groups())
    assert all(weight is not adapter.model[1].weight for weight in space.weights)
    before = adapter.model[1].weight.clone()
    shift(space)
    space.write()
    assert torch.equal(adapter.model[1].weight, before)


@pytest.mark.parametrize("name", SPACES)
def test_training_moves_the_weights_and_a_cut_run_goes_on_to_the_same_bits(
    build, separable, tmp_path, name
):
    plan = Training(steps=12, batch_size=10, lr=0.05, check_every=2)

    def trained(store=None, stop=None):
        adapter = build()
        space = SPACES[name](adapter)

        def gradients(batch, _):
            loss, found = mean_loss_gradient(adapter, batch, space.weights)
            space.assign(space.pull_back(found))
            return loss

        def after_step(step):
            space.settle()
            if step == stop:
                raise KeyboardInterrupt

        run = Run(seed=1, store=store)
        options = {"gradients": gradients, "parameters": space.parameters}
        optimise(adapter.model, separable, plan, run, after_step=after_step, **options)
        return copy_state(adapter.model)

    expected, store = trained(), RunStore(tmp_path, every=1)
    with contextlib.suppress(KeyboardInterrupt):
        trained(store, stop=7)
    found = trained(store)
    assert all(torch.equal(expected[key], value) for key, value in found.items())
    given = copy_state(build().model)
    assert not torch.equal(found["6.weight"], given["6.weight"])


def test_a_singular_value_is_its_size_and_not_its_shift(adapter):
    """A shift starts at zero; by its own size a perturbation would leave it where it is."""
    space = SingularValues(adapter.model, scale=2.0)
    count = len(space.spectrum.shifts)
    with torch.no_grad():
        for shift in space.spectrum.shifts:
            shift -= 0.1
    sizes = space.sizes()
    for size, start in zip(sizes, space.spectrum.start, strict=False):
        values = torch.linalg.svdvals(start.flatten(1))
        torch.testing.assert_close(size, (values / 2 - 0.1).relu())
    for size, other in zip(sizes[count:], space.others, strict=True):
        assert torch.equal(size, other.detach().abs())
