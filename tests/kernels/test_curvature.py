from __future__ import annotations

import pytest
import reference
import torch
from torch import nn

from mmdefense.kernels.curvature import (
    MOST_TRACE_PROBES,
    HessianSpectrum,
    gradient_norm_penalty,
    hessian_product,
    lanczos,
    smoothness,
)
from mmdefense_adapters.torch_classifier import TorchClassifier


def dense(adapter, samples, parameters):
    loss = adapter.per_sample_loss(samples.everything()).mean()
    return reference.hessian(loss, parameters)


def split_like(vector, parameters):
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def random_vector(parameters, seed=0):
    size = sum(p.numel() for p in parameters)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hessian_product_is_that_of_the_mean_loss_over_all_batches(adapter, parameters, samples):
    matrix = dense(adapter, samples, parameters)
    product = hessian_product(adapter, samples, parameters, batch_size=3)
    for seed in range(3):
        vector = random_vector(parameters, seed)
        found = reference.flat(product(split_like(vector, parameters)))
        torch.testing.assert_close(found, matrix @ vector)


@pytest.mark.parametrize("share", [0, 1])
def test_hessian_product_is_zero_where_the_loss_is_linear(adapter, parameters, samples, share):
    spare = nn.Parameter(torch.ones(2, dtype=torch.float64))

    class Linear(TorchClassifier):
        def per_sample_loss(self, batch):
            loss = super().per_sample_loss(batch)
            return loss + spare.sum() if share else loss

    vector = split_like(random_vector(parameters), parameters)
    alone = hessian_product(adapter, samples, parameters)(vector)
    product = hessian_product(Linear(adapter.model), samples, [*parameters, spare])
    found = product([*vector, spare.detach()])
    torch.testing.assert_close(list(found), [*alone, torch.zeros_like(spare)])


def test_hessian_product_is_taken_in_eval_mode(adapter, parameters, samples):
    matrix = dense(adapter, samples, parameters)
    vector = random_vector(parameters)
    adapter.model.train()
    product = hessian_product(adapter, samples, parameters)
    found = reference.flat(product(split_like(vector, parameters)))
    torch.testing.assert_close(found, matrix @ vector)
    assert all(module.training for module in adapter.model.modules())


def symmetric(size, seed=0, dtype=torch.float64):
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return drawn + drawn.T


def test_lanczos_finds_the_largest_eigenvalue_and_exact_moments():
    matrix = symmetric(40)
    start = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, weights = lanczos(lambda v: [matrix @ v[0]], [start], 40)
    exact = torch.linalg.eigvalsh(matrix)
    assert values.diff().min() >= 0
    torch.testing.assert_close(values[[0, -1]], exact[[0, -1]], rtol=1e-10, atol=0)
    unit = start / start.norm()
    few, few_weights = lanczos(lambda v: [matrix @ v[0]], [start], 4)
    assert few[-1] <= exact[-1]
    for power in range(8):  # Gauss quadrature of 4 nodes is exact up to degree 7
        moment = unit @ torch.linalg.matrix_power(matrix, power) @ unit
        torch.testing.assert_close((few_weights * few**power).sum(), moment)
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))


def test_lanczos_takes_a_vector_in_several_tensors():
    matrix = symmetric(6)
    start = [torch.ones(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)]

    def product(vector):
        return split_like(matrix @ reference.flat(vector), start)

    values, _ = lanczos(product, start, 6)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_stops_where_the_krylov_space_is_invariant(dtype):
    matrix = torch.diag(torch.tensor([1.0, -1.0, 5.0, 0.0], dtype=dtype))
    for entries, expected in (
        ([1.0, 1.0, 0.0, 0.0], [-1, 1]),  # its first Rayleigh quotient is 0
        ([1.0, 0.0, 1.0, 0.0], [1, 5]),
        ([0.0, 0.0, 0.0, 1.0], [0]),
    ):
        start = torch.tensor(entries, dtype=dtype)
        values, weights = lanczos(lambda v: [matrix @ v[0]], [start], 10)
        exact, rounding = torch.tensor(expected, dtype=torch.float64), 10 * torch.finfo(dtype).eps
        torch.testing.assert_close(values, exact, rtol=rounding, atol=rounding)
        assert weights.sum() == pytest.approx(1)


def test_smoothness_finds_lambda_max_of_the_dense_hessian(adapter, parameters, samples):
    exact = float(torch.linalg.eigvalsh(dense(adapter, samples, parameters))[-1])
    found = smoothness(adapter, samples, torch.Generator().manual_seed(0), probes=1, steps=40)
    assert found.lambda_max == pytest.approx(exact, rel=1e-6)


def test_smoothness_trace_is_the_mean_over_rademacher_probes(adapter, parameters, samples):
    matrix = dense(adapter, samples, parameters)
    generator = torch.Generator().manual_seed(4)
    quadratic = []
    for _ in range(3):
        signs = [torch.randint(0, 2, p.shape, generator=generator) * 2 - 1 for p in parameters]
        probe = reference.flat(signs).double()
        quadratic.append(probe @ matrix @ probe)
    expected = torch.stack(quadratic)
    generator.manual_seed(4)
    found = smoothness(adapter, samples, generator, probes=3, steps=3, batch_size=4)
    assert found.trace == pytest.approx(float(expected.mean()), rel=1e-9)
    assert found.spread == pytest.approx(float(expected.std()) / 3**0.5, rel=1e-9)


def traced(adapter, samples, seeds, error):
    return [
        smoothness(
            adapter,
            samples,
            torch.Generator().manual_seed(seed),
            probes=1,
            steps=6,
            trace_error=error,
        )
        for seed in range(seeds)
    ]


def test_probes_are_drawn_until_the_stated_error_is_reached(adapter, samples):
    for each in traced(adapter, samples, 5, 0.4):
        assert each.spread <= 0.4 * abs(each.trace)
        assert 8 <= each.trace_probes < MOST_TRACE_PROBES


def test_the_standard_error_is_that_of_the_distance_to_the_exact_trace(
    adapter, parameters, samples
):
    exact = float(dense(adapter, samples, parameters).trace())
    found = traced(adapter, samples, 20, 0.0)
    off = torch.tensor([(each.trace - exact) / each.spread for each in found])
    assert 0.7 < float(off.square().mean().sqrt()) < 1.5
    assert sum(each.trace for each in found) / 20 == pytest.approx(exact, rel=0.1)


def test_the_trace_is_exact_where_the_krylov_space_is_all_of_it(adapter, parameters, samples):
    exact = float(dense(adapter, samples, parameters).trace())
    generator = torch.Generator().manual_seed(0)
    found = smoothness(adapter, samples, generator, probes=1, steps=133, trace_error=0.05)
    assert found.trace == pytest.approx(exact, rel=1e-6)
    assert found.trace_probes == 8


def test_as_many_steps_as_weights_give_the_eigenvalues_from_one_start(adapter, parameters, samples):
    exact = torch.linalg.eigvalsh(dense(adapter, samples, parameters))
    generator = torch.Generator().manual_seed(2)
    found = smoothness(adapter, samples, generator, probes=1, steps=len(exact)).spectrum
    scale = float(exact.abs().max())
    assert found.nodes.dtype == torch.float64
    distance = (found.nodes[:, None] - exact).abs()
    assert distance.min(1).values.max() < 1e-9 * scale
    apart = exact.abs() > 1e-6 * scale  # zero is manifold: one start sees it once
    assert distance.min(0).values[apart].max() < 1e-9 * scale
    assert found.weights.min() >= 0
    assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)


def deviation(matrix, probes):
    """Return that of the mean of ``v^T A v / n`` over Rademacher probes (Hutchinson, 1990)."""
    rest = matrix - matrix.diag().diag()
    return float((2 / probes) ** 0.5 * rest.norm() / len(matrix))


def test_moments_and_cumulative_spectrum_are_those_of_the_dense_hessian(
    adapter, parameters, samples
):
    matrix = dense(adapter, samples, parameters)
    exact = torch.linalg.eigvalsh(matrix)
    probes = 30
    generator = torch.Generator().manual_seed(5)
    found = smoothness(adapter, samples, generator, probes=probes, steps=20).spectrum
    for power in (1, 2, 3):
        expected = float((exact**power).mean())
        error = deviation(torch.linalg.matrix_power(matrix, power), probes)
        assert abs(found.moment(power) - expected) < 5 * error, power
        assert error < 0.5 * float((exact**power).abs().mean()), power  # so that this says a lot
    grid = torch.linspace(float(exact[0]) - 1e-3, float(exact[-1]) + 1e-3, 400).double()
    expected = (exact <= grid[:, None]).double().mean(1)
    error = (((found.nodes <= grid[:, None]) * found.weights).sum(1) - expected).abs()
    assert float(error.mean()) < 0.01
    away = (grid.abs() > 0.02 * exact.abs().max()) & (error > 0)  # zero is one great step
    assert float(error[away].max()) < 0.04


def test_the_moments_of_a_start_are_exact(adapter, parameters, samples):
    matrix = dense(adapter, samples, parameters)
    generator = torch.Generator().manual_seed(7)
    probe = reference.flat(
        [torch.randint(0, 2, p.shape, generator=generator) * 2 - 1 for p in parameters]
    ).double()
    generator.manual_seed(7)
    found = smoothness(adapter, samples, generator, probes=1, steps=2).spectrum
    for power in (1, 2, 3):
        expected = probe @ torch.linalg.matrix_power(matrix, power) @ probe / len(probe)
        assert found.moment(power) == pytest.approx(float(expected), rel=1e-9)


def test_starts_share_the_weight():
    one, two = (
        (torch.tensor([1.0]), torch.tensor([1.0])),
        (torch.tensor([0.0]), torch.tensor([1.0])),
    )
    found = HessianSpectrum.of([one, two])
    assert (found.nodes.tolist(), found.weights.tolist()) == ([0.0, 1.0], [0.5, 0.5])


def explicit_penalty(adapter, batch, parameters, radius, mix, norm):
    """Return ``(1 - mix) g1 + mix g2``, and the model's statistics after its first pass."""
    loss = adapter.per_sample_loss(batch).mean()
    first = torch.autograd.grad(loss, parameters)
    statistics = {name: value.clone() for name, value in adapter.model.named_buffers()}
    whole = reference.flat(first).norm()
    lengths = [whole if norm == "global" else g.norm() for g in first]
    moved = {
        name: p.detach() + radius * g / length
        for (name, p), g, length in zip(
            adapter.model.named_parameters(), first, lengths, strict=True
        )
    }
    fork = adapter.fork()
    fork.model.load_state_dict(moved, strict=False)
    loss = fork.per_sample_loss(batch).mean()
    second = torch.autograd.grad(loss, list(fork.model.parameters()))
    mixed = [(1 - mix) * a + mix * b for a, b in zip(first, second, strict=True)]
    return mixed, statistics


@pytest.mark.parametrize("norm", ["global", "tensor"])
@pytest.mark.parametrize("train", [True, False])
def test_penalty_mixes_the_gradient_with_the_one_after_a_step(build, samples, norm, train):
    batch = samples.everything()
    adapter, twin = build(), build()
    adapter.model.train(train), twin.model.train(train)
    before = [p.detach().clone() for p in adapter.model.parameters()]
    settings = {"radius": 0.3, "mix": 0.7, "norm": norm}
    expected, statistics = explicit_penalty(
        twin, batch, list(twin.model.parameters()), *settings.values()
    )
    parameters = list(adapter.model.parameters())
    loss = gradient_norm_penalty(adapter, batch, parameters, **settings)
    torch.testing.assert_close(loss, twin.per_sample_loss(batch).mean())
    torch.testing.assert_close([p.grad for p in parameters], expected)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    for name, value in adapter.model.named_buffers():
        assert torch.equal(value, statistics[name]), name
    assert int(adapter.model[1].num_batches_tracked) == int(train)


def test_a_small_radius_gives_the_gradient_of_the_gradient_norm(adapter, parameters, samples):
    batch, radius = samples.everything(), 1e-5
    loss = adapter.per_sample_loss(batch).mean()
    plain = reference.gradient_of(loss, parameters, create_graph=True)
    slope = reference.gradient_of(plain.norm(), parameters)
    gradient_norm_penalty(adapter, batch, parameters, radius=radius, mix=1.0)
    found = (reference.flat([p.grad for p in parameters]) - plain) / radius
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["global", "tensor"])
def test_penalty_of_a_zero_gradient_is_zero(adapter, parameters, samples, norm):
    settings = {"radius": 0.1, "mix": 0.5, "norm": norm}
    spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    gradient_norm_penalty(adapter, samples.everything(), [*parameters, spare], **settings)
    assert torch.equal(spare.grad, torch.zeros_like(spare))
    assert torch.equal(spare, torch.ones_like(spare))
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    adapter.model[-1].bias.requires_grad_(False)
    dead = parameters[:-1]  # all weights are zero, so that only the last bias has a gradient
    gradient_norm_penalty(adapter, samples.everything(), dead, **settings)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in dead)


def test_weights_come_back_when_the_second_pass_fails(adapter, parameters, samples):
    class Failing(TorchClassifier):
        passes = 0

        def per_sample_loss(self, batch):
            self.passes += 1
            if self.passes == 2:
                raise RuntimeError("boom")
            return super().per_sample_loss(batch)

    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="boom"):
        gradient_norm_penalty(
            Failing(adapter.model), samples.everything(), parameters, radius=1.0, mix=0.5
        )
    for name, value in adapter.model.state_dict().items():
        assert torch.equal(value, before[name]), name
