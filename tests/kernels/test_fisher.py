from __future__ import annotations

import itertools
import math
import warnings

import pytest
import reference
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mmdefense.errors import UnsupportedError
from mmdefense.kernels.fisher import (
    check_second_derivative,
    fisher_diagonal,
    fisher_trace,
    loss_and_trace,
)
from mmdefense.kernels.hooks import second_derivatives
from mmdefense_adapters.torch_classifier import TorchClassifier

FORMS = ["true", "empirical"]


class LabelDraws(TorchClassifier):
    """The other true form: the score is log p of a label that the model draws (S1)."""

    def sampled_loss(self, batch, generator):
        log_p = self.logits(batch.inputs).log_softmax(1)
        drawn = log_p.detach().exp().multinomial(1, generator=generator)
        return self.per_sample_loss(batch), log_p.gather(1, drawn)[:, 0]


def generators_of_all_signs(*shape):
    """Return one generator for each pattern of random signs, so that a mean over them is exact."""
    found, seeds = {}, itertools.count()
    while len(found) < 2 ** math.prod(shape):
        seed = next(seeds)
        drawn = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
        found.setdefault(tuple(drawn.flatten().tolist()), seed)
    return [torch.Generator().manual_seed(seed) for seed in found.values()]


def every_draw(form, samples):
    return generators_of_all_signs(len(samples), *([3] if form == "true" else []))


@pytest.mark.parametrize("form", FORMS)
def test_trace_is_unbiased_over_all_sign_patterns(adapter, parameters, draw, form):
    samples = draw(2)
    exact = reference.fisher(adapter, samples, parameters, form).trace()
    batch = samples.everything()
    draws = [
        loss_and_trace(adapter, batch, parameters, generator, form)
        for generator in every_draw(form, samples)
    ]
    torch.testing.assert_close(torch.stack([trace for _, trace in draws]).mean(), exact)
    for loss, _ in draws:
        torch.testing.assert_close(loss, adapter.per_sample_loss(batch).mean())


@pytest.mark.parametrize("form", FORMS)
def test_trace_gradient_is_unbiased_over_all_sign_patterns(adapter, parameters, draw, form):
    samples = draw(2)
    exact = reference.trace_gradient(adapter, samples, parameters, form)
    gradients = []
    for generator in every_draw(form, samples):
        _, trace = loss_and_trace(adapter, samples.everything(), parameters, generator, form)
        gradients.append(reference.gradient_of(trace, parameters))
    torch.testing.assert_close(torch.stack(gradients).mean(0), exact)


@pytest.mark.parametrize("form", FORMS)
def test_diagonal_is_unbiased_over_all_sign_patterns(adapter, parameters, draw, form):
    samples = draw(2)
    exact = reference.fisher(adapter, samples, parameters, form).diag()
    draws = [
        reference.flat(fisher_diagonal(adapter, samples, parameters, generator, form=form))
        for generator in every_draw(form, samples)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(0), exact)


@pytest.mark.parametrize("kind", [TorchClassifier, LabelDraws])
def test_trace_over_several_batches_is_the_mean_of_many_draws(parameters, adapter, samples, kind):
    adapter = kind(adapter.model)
    exact = float(reference.fisher(adapter, samples, parameters, "true").trace())
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor(
        [fisher_trace(adapter, samples, parameters, generator, batch_size=3) for _ in range(300)]
    )
    error = float(draws.std()) / len(draws) ** 0.5
    assert error < 0.05 * exact
    assert abs(float(draws.mean()) - exact) < 4 * error


def test_empirical_form_is_exact_one_sample_at_a_time(adapter, parameters, samples):
    exact = reference.fisher(adapter, samples, parameters, "empirical").diag()
    options = {"form": "empirical", "batch_size": 1}
    generator = torch.Generator()
    found = fisher_diagonal(adapter, samples, parameters, generator, **options)
    assert [d.shape for d in found] == [p.shape for p in parameters]
    torch.testing.assert_close(reference.flat(found), exact, rtol=1e-10, atol=1e-15)
    trace = fisher_trace(adapter, samples, parameters, generator, **options)
    assert trace == pytest.approx(float(exact.sum()), rel=1e-10)


def test_both_forms_agree_with_curvlinops(adapter, parameters, samples):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from curvlinops import EFLinearOperator, GGNLinearOperator

    batch = samples.everything()
    data = [(batch.inputs, batch.labels)]
    for form, kind in (("empirical", EFLinearOperator), ("true", GGNLinearOperator)):
        operator = kind(adapter.model, nn.CrossEntropyLoss(), parameters, data)
        dense = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
        exact = reference.fisher(adapter, samples, parameters, form)
        torch.testing.assert_close(dense, exact)
        if form == "empirical":
            found = fisher_diagonal(
                adapter, samples, parameters, torch.Generator(), form=form, batch_size=1
            )
            torch.testing.assert_close(reference.flat(found), dense.diag())


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_one_draw_agrees_with_finite_differences(adapter, parameters, samples, form):
    adapter = LabelDraws(adapter.model)  # its draw does not move with the weights

    def trace():
        generator = torch.Generator().manual_seed(1)
        return loss_and_trace(adapter, samples.everything(), parameters, generator, form)[1]

    found = reference.gradient_of(trace(), parameters)
    expected = reference.finite_differences(trace, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_one_draw_is_twice_a_hessian_product(adapter, parameters, samples, form):
    batch, seed = samples.everything(), 5
    if form == "true":
        score = adapter.sampled_loss(batch, torch.Generator().manual_seed(seed))[1]
    else:
        drawn = torch.randint(0, 2, (len(batch),), generator=torch.Generator().manual_seed(seed))
        score = (drawn * 2 - 1) * adapter.per_sample_loss(batch)
    gradient = reference.gradient_of(score.sum(), parameters, retain_graph=True)
    expected = 2 * reference.hessian(score.sum(), parameters) @ gradient / len(batch)
    generator = torch.Generator().manual_seed(seed)
    _, trace = loss_and_trace(adapter, batch, parameters, generator, form)
    torch.testing.assert_close(reference.gradient_of(trace, parameters), expected)


def test_a_draw_for_each_sample_is_nearer_to_the_exact_diagonal(adapter, parameters, draw):
    samples = draw(58)
    exact = reference.fisher(adapter, samples, parameters, "true").diag()

    def cosine(batch_size):
        """Return the mean over ten seeds."""
        found = []
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            diagonal = fisher_diagonal(
                adapter, samples, parameters, generator, batch_size=batch_size
            )
            found.append(torch.cosine_similarity(reference.flat(diagonal), exact, dim=0))
        return float(torch.stack(found).mean())

    assert cosine(1) > 0.97
    assert cosine(1) > cosine(32) + 0.05


def test_other_coordinates_come_in_by_pull_back(adapter, parameters, samples):
    """Coordinates z with theta = M z have the Fisher information M^T F M."""
    size = sum(p.numel() for p in parameters)
    mixing = torch.rand(size, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def pull_back(gradients):
        return [mixing.T @ reference.flat(gradients)]

    full = reference.fisher(adapter, samples, parameters, "empirical")
    expected = (mixing.T @ full @ mixing).diag()
    [found] = fisher_diagonal(
        adapter,
        samples,
        parameters,
        torch.Generator(),
        form="empirical",
        batch_size=1,
        pull_back=pull_back,
    )
    torch.testing.assert_close(found, expected)
    traces = [
        loss_and_trace(adapter, one, parameters, torch.Generator(), "empirical", pull_back)[1]
        for one in reference.one_by_one(samples)
    ]
    torch.testing.assert_close(torch.stack(traces).mean(), expected.sum())


def test_a_parameter_that_is_not_used_has_no_information(adapter, parameters, samples):
    spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    _, trace = loss_and_trace(
        adapter, samples.everything(), [*parameters, spare], torch.Generator().manual_seed(0)
    )
    _, alone = loss_and_trace(
        adapter, samples.everything(), parameters, torch.Generator().manual_seed(0)
    )
    assert torch.equal(trace, alone)
    found = fisher_diagonal(adapter, samples, [spare], torch.Generator())
    assert torch.equal(found[0], torch.zeros_like(spare))


def test_fisher_is_measured_in_eval_mode_and_the_mode_comes_back(adapter, parameters, samples):
    def trace():
        return fisher_trace(adapter, samples, parameters, torch.Generator().manual_seed(0))

    expected = trace()
    adapter.model.train()
    statistics = adapter.model[1].running_mean.clone()
    assert trace() == expected
    assert all(module.training for module in adapter.model.modules())
    assert torch.equal(adapter.model[1].running_mean, statistics)


def test_a_vit_with_fused_attention_is_differentiated_twice(vit, samples):
    parameters = [p for p in vit.model.parameters() if p.requires_grad]
    check_second_derivative(vit, samples, parameters)

    def trace():
        generator = torch.Generator().manual_seed(1)
        with second_derivatives():
            return loss_and_trace(vit, samples.everything(), parameters, generator, "empirical")[1]

    found = reference.gradient_of(trace(), parameters)
    chosen = parameters[-3:]
    count = sum(p.numel() for p in chosen)
    expected = reference.finite_differences(trace, chosen)
    torch.testing.assert_close(found[-count:], expected, rtol=1e-4, atol=1e-8)


def test_fused_attention_is_refused_outside_second_derivatives(vit, samples):
    """Why the context is needed at all; when this fails, it may go."""
    parameters = list(vit.model.parameters())
    _, trace = loss_and_trace(vit, samples.everything(), parameters, torch.Generator())
    with pytest.raises((RuntimeError, NotImplementedError), match="derivative"):
        torch.autograd.grad(trace, parameters, allow_unused=True)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class _Square(nn.Module):
    def forward(self, x):
        return _Once.apply(x)


def test_an_operation_without_second_derivative_is_refused_in_one_line(adapter, samples):
    model = nn.Sequential(*adapter.model[:6], _Square(), *adapter.model[6:]).train()
    adapter = TorchClassifier(model)
    with pytest.raises(UnsupportedError, match="once_differentiable") as caught:
        check_second_derivative(adapter, samples, list(model.parameters()))
    assert "\n" not in str(caught.value)
    assert "first derivatives only" in str(caught.value)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_want_of_memory_is_not_taken_for_a_missing_derivative(adapter, samples, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(adapter, "sampled_loss", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        check_second_derivative(adapter, samples, list(adapter.model.parameters()))
