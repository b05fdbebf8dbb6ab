"""Worst cases near by, against slow plain versions in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from limits import limited

from mmdefense.data.labelled import LabelledBatch
from mmdefense.kernels.coordinates import SingularValues, UnitMasks, Weights, trainable
from mmdefense.kernels.loop import mean_loss_gradient
from mmdefense.kernels.perturbations import (
    adversarial_noise,
    moved,
    perturbed,
    sharpness_aware_gradient,
    sharpness_step,
    worst_change,
)
from mmdefense.notes import Note
from mmdefense.runtime.run import copy_state

SPACES = {
    "weights": lambda a: Weights(trainable(a.model)),
    "singular-values": lambda a: SingularValues(a.model),
    "unit-masks": lambda a: UnitMasks(a.model, a.unit_groups(), biases="own"),
}


@pytest.fixture(params=SPACES)
def space(request, adapter):
    return SPACES[request.param](adapter)


@pytest.fixture
def batch(samples):
    return samples.everything()


def loss_of(adapter, batch):
    return adapter.per_sample_loss(batch).mean().item()


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_move_is_undone_to_the_bit_even_after_an_error(adapter, space):
    before, parameters = copy_state(adapter.model), [p.clone() for p in space.parameters]
    change = [torch.full_like(p, 0.01) for p in parameters]

    def move():
        with moved(space, change, 3.0):
            for value, start in zip(space.parameters, parameters, strict=True):
                torch.testing.assert_close(value, start + 0.03)
            for value, weight in zip(space.values(), space.weights, strict=True):
                torch.testing.assert_close(value, weight)
            assert not same(before, copy_state(adapter.model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move()
    assert same(before, copy_state(adapter.model))
    assert all(torch.equal(a, b) for a, b in zip(space.parameters, parameters, strict=True))


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
def test_the_step_is_the_best_within_its_radius(parameters, eta):
    """Against the formula over one long vector, and against random steps of the same length."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator).double() for p in parameters]
    scales = None if eta is None else [p.detach().abs() + eta for p in parameters]
    step = torch.cat([s.flatten() for s in sharpness_step(gradients, 0.3, scales)])
    g = torch.cat([gradient.flatten() for gradient in gradients])
    theta = torch.cat([p.detach().flatten() for p in parameters])
    scale = torch.ones_like(theta) if eta is None else theta.abs() + eta
    expected = 0.3 * scale**2 * g / (scale * g).norm()
    torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-13)
    for _ in range(100):
        direction = torch.randn(theta.shape, generator=generator).double()
        assert (scale * direction * 0.3 / direction.norm()) @ g <= step @ g + 1e-12


@pytest.mark.parametrize("eta", [None, 0.01])
def test_sharpness_aware_gradients_are_those_of_a_model_that_was_moved(adapter, space, batch, eta):
    before = copy_state(adapter.model)
    loss, found = sharpness_aware_gradient(adapter, batch, space, radius=0.2, eta=eta)
    assert loss.item() == pytest.approx(loss_of(adapter, batch), rel=1e-13)
    assert same(before, copy_state(adapter.model))
    _, first = mean_loss_gradient(adapter, batch, space.weights)
    scales = None if eta is None else [size + eta for size in space.sizes()]
    step = sharpness_step(space.pull_back(first), 0.2, scales)
    with torch.no_grad():
        for parameter, change in zip(space.parameters, step, strict=True):
            parameter += change
    space.write()
    _, second = mean_loss_gradient(adapter, batch, space.weights)
    torch.testing.assert_close(found, space.pull_back(second), rtol=1e-12, atol=1e-13)
    assert loss_of(adapter, batch) > loss.item()


def test_statistics_are_updated_by_the_first_pass_alone(build, batch):
    once, twice = build(), build()
    for adapter in (once, twice):
        adapter.model.train()
    mean_loss_gradient(once, batch, trainable(once.model))
    sharpness_aware_gradient(twice, batch, Weights(trainable(twice.model)), radius=0.1)
    assert same(copy_state(once.model), copy_state(twice.model))


def test_sharpness_aware_gradients_are_the_same_in_parts(build, batch):
    whole, parts = build(), limited(build(), 2)
    expected = sharpness_aware_gradient(whole, batch, Weights(trainable(whole.model)), radius=0.1)
    with pytest.warns(Note, match="micro-batches"):
        found = sharpness_aware_gradient(parts, batch, Weights(trainable(parts.model)), radius=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 3])
def test_noise_on_masks_takes_the_steps_of_the_plain_version(adapter, batch, steps):
    space = UnitMasks(adapter.model, adapter.unit_groups(), biases="own")
    before = copy_state(adapter.model)
    noise = adversarial_noise(adapter, batch, space, radius=0.4, steps=steps)
    assert same(before, copy_state(adapter.model))
    slow = [torch.zeros_like(p) for p in space.parameters]
    for _ in range(steps):
        signs = []
        for number, value in enumerate(slow):
            sign = torch.zeros_like(value)
            for unit in range(len(value)):
                losses = []
                for small in (1e-6, -1e-6):
                    tried = [other.clone() for other in slow]
                    tried[number][unit] += small
                    with moved(space, tried):
                        losses.append(loss_of(adapter, batch))
                difference = losses[0] - losses[1]
                sign[unit] = 0 if abs(difference) < 1e-14 else difference
            signs.append(sign.sign())
        slow = [(v + s * 0.4 / steps).clamp(-0.4, 0.4) for v, s in zip(slow, signs, strict=True)]
    torch.testing.assert_close(noise, [value.detach() for value in slow])
    with moved(space, noise):
        worst = loss_of(adapter, batch)
    assert worst > loss_of(adapter, batch)


def test_noise_from_a_random_start_stays_within_its_radius(adapter, batch):
    space = UnitMasks(adapter.model, adapter.unit_groups())

    def noise(seed):
        generator = torch.Generator().manual_seed(seed)
        return adversarial_noise(adapter, batch, space, radius=0.2, steps=2, generator=generator)

    first, again, other = noise(0), noise(0), noise(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(value.abs().max() <= 0.2 for value in (*first, *other))


def slow_pgd(adapter, batch, radius, steps, step_size, norm, universal=False):
    """One sample at a time, by autograd of the plain loss."""
    change = torch.zeros_like(batch.inputs[:1] if universal else batch.inputs)
    order = {"l1": 1, "l2": 2, "linf": 2}[norm]
    for _ in range(steps):
        leaf = change.clone().requires_grad_()
        total = 0
        for n in range(len(batch)):
            inputs = batch.inputs[n : n + 1] + leaf[0 if universal else n]
            inputs = inputs.clamp(0, 1) if universal else inputs
            total = total + adapter.per_sample_loss(LabelledBatch(inputs, batch.labels[n : n + 1]))
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
        for row, g in enumerate(gradient):
            direction = g.sign() if norm == "linf" else g / g.flatten().norm(order)
            new = change[row] + step_size * direction
            if norm == "linf":
                new = new.clamp(-radius, radius)
            elif new.flatten().norm(order) > radius:
                new = new * radius / new.flatten().norm(order)
            if not universal:
                new = (batch.inputs[row] + new).clamp(0, 1) - batch.inputs[row]
            change[row] = new
    return change


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.3), ("l2", 0.8), ("l1", 4.0)])
def test_input_changes_are_those_of_the_plain_version(adapter, batch, norm, radius, universal):
    before = copy_state(adapter.model)
    options = {"radius": radius, "steps": 4, "step_size": radius / 2, "norm": norm}
    found = worst_change(adapter, batch, universal=universal, **options)
    expected = slow_pgd(adapter, batch, universal=universal, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert same(before, copy_state(adapter.model))
    assert all(p.requires_grad and p.grad is None for p in adapter.model.parameters())
    order = {"l1": 1, "l2": 2, "linf": torch.inf}[norm]
    size = found.flatten(1).norm(order, dim=1).max()
    assert size <= radius + 1e-12
    attacked = perturbed(adapter, batch, found)
    assert attacked.inputs.min() >= 0
    assert attacked.inputs.max() <= 1
    assert loss_of(adapter, attacked) > loss_of(adapter, batch)


def test_input_changes_are_the_same_in_parts(build, batch):
    options = {"radius": 0.2, "steps": 2, "step_size": 0.1}
    for universal in (False, True):
        expected = worst_change(build(), batch, universal=universal, **options)
        with pytest.warns(Note, match="micro-batches"):
            found = worst_change(limited(build(), 2), batch, universal=universal, **options)
        torch.testing.assert_close(found, expected)


def test_a_loss_of_ones_own_is_raised_and_a_start_is_gone_on_from(adapter, batch):
    other = copy.deepcopy(adapter)

    def both(given):
        return adapter.per_sample_loss(given) + other.per_sample_loss(given)

    options = {"radius": 0.3, "step_size": 0.1}
    whole = worst_change(adapter, batch, steps=4, loss=both, **options)
    half = worst_change(adapter, batch, steps=2, loss=both, **options)
    torch.testing.assert_close(
        worst_change(adapter, batch, steps=2, loss=both, start=half, **options), whole
    )
    torch.testing.assert_close(whole, worst_change(adapter, batch, steps=4, **options))


def test_a_random_start_depends_on_its_generator_alone(adapter, batch):
    def change(seed):
        generator = torch.Generator().manual_seed(seed)
        return worst_change(adapter, batch, radius=0.1, steps=0, step_size=0.1, generator=generator)

    assert torch.equal(change(0), change(0))
    assert not torch.equal(change(0), change(1))
    assert change(0).abs().max() <= 0.1
