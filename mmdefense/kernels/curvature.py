"""Second-order quantities of the loss: products with the Hessian, its spectrum, its trace.

References:
    [GW] Golub, Welsch. *Calculation of Gauss Quadrature Rules*. Math. Comp. 23(106), 1969.
    [UCS] Ubaru, Chen, Saad. *Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature*. SIAM
    J. Matrix Anal. Appl. 38(4), 2017.
    [GKX] Ghorbani, Krishnan, Xiao. *An Investigation into Neural Net Optimization via Hessian
    Eigenvalue Density*. ICML 2019. arXiv:1901.10159.
    [MMMW] Meyer, Musco, Musco, Woodruff. *Hutch++: Optimal Stochastic Trace Estimation*. SOSA 2021.
    arXiv:2010.09649.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mmdefense.data.batch import Batch, Samples, batches
from mmdefense.kernels.coordinates import Weights
from mmdefense.kernels.hooks import frozen_statistics, mode, second_derivatives
from mmdefense.kernels.loop import mean_loss_gradient
from mmdefense.kernels.perturbations import moved
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import in_parts

__all__ = [
    "MOST_TRACE_PROBES",
    "HessianSpectrum",
    "Smoothness",
    "gradient_norm_penalty",
    "hessian_product",
    "lanczos",
    "smoothness",
]

B = TypeVar("B", bound=Batch)

MOST_TRACE_PROBES = 64
"""Ours: largest number of probes used to reach a requested standard error of the trace."""

_FEWEST_TRACE_PROBES = 8  # ours: with fewer, the standard error is unreliable

Vector = list[Tensor] | tuple[Tensor, ...]


def gradient_norm_penalty(
    adapter: TaskAdapter[B],
    batch: B,
    parameters: Sequence[Tensor],
    *,
    radius: float,
    mix: float,
    norm: Literal["global", "tensor"] = "global",
) -> Tensor:
    """Add the gradient of ``loss + mix * radius * ||grad loss||`` to ``.grad``; return the loss.

    With ``g1`` the gradient at the weights and ``g2`` the gradient after a step of length
    ``radius`` along it, the result is ``(1 - mix) g1 + mix g2``: a forward difference for the
    product of the Hessian with the unit gradient. The weights are perturbed in place and restored
    bit for bit, and only the first pass updates BatchNorm statistics.

    Args:
        adapter: The model.
        batch: N samples.
        parameters: The trained parameters.
        radius: Length r of the step, for all parameters together or for each tensor.
        mix: Weight alpha of the second gradient, in ``[0, 1]``.
        norm: ``"global"`` takes one norm over all parameters, ``"tensor"`` one for each.
    """
    loss, first = mean_loss_gradient(adapter, batch, parameters)
    norms: Vector = torch._foreach_norm(first)
    if norm == "global":
        norms = [torch.stack(list(norms)).norm()] * len(norms)
    step = torch._foreach_div(first, torch._foreach_add(norms, 1e-12))
    with moved(Weights(parameters), step, radius), frozen_statistics(adapter.model):
        _, second = mean_loss_gradient(adapter, batch, parameters)
    mixed = torch._foreach_lerp(first, second, mix)
    for parameter, gradient in zip(parameters, mixed, strict=True):
        parameter.grad = gradient
    return loss


def hessian_product(
    adapter: TaskAdapter[B],
    samples: Samples[B],
    parameters: Sequence[Tensor],
    batch_size: int = 256,
    each: Callable[[], object] | None = None,
) -> Callable[[Vector], Vector]:
    """Return ``v -> H v`` for the Hessian of the mean loss over ``samples``, in eval mode.

    One product costs a pass with a double backward over all samples.

    Args:
        adapter: The model.
        samples: N samples.
        parameters: What to differentiate with respect to.
        batch_size: Samples per pass.
        each: Called before each pass; may raise to abort the product.
    """

    def of_one(batch: B, vector: Vector) -> Vector:
        loss = adapter.per_sample_loss(batch).sum()
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        curved = [n for n, g in enumerate(gradient) if g.requires_grad]  # the rest are linear
        return torch.autograd.grad(
            [gradient[n] for n in curved],
            parameters,
            [vector[n] for n in curved],
            materialize_grads=True,
        )

    def product(vector: Vector) -> Vector:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        model = adapter.model
        with mode(model, train=False), second_derivatives():
            for batch in batches(samples, batch_size):
                if each is not None:
                    each()
                for part in in_parts(lambda b: of_one(b, vector), batch, "curvature", model):
                    torch._foreach_add_(total, part)
        torch._foreach_div_(total, len(samples))
        return total

    return product


def _dot(left: Vector, right: Vector) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def lanczos(
    product: Callable[[Vector], Vector], start: Vector, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the Ritz values of a symmetric operator and their weights, each ``(<= steps,)``.

    Reorthogonalisation is full. The largest Ritz value converges to the largest eigenvalue from
    below; ``sum_k w_k f(r_k)`` is the Gauss quadrature of ``v^T f(A) v`` for the unit start ``v``:
    the nodes are the eigenvalues of the tridiagonal matrix, the weights the squares of the first
    entries of its eigenvectors [GW].

    Args:
        product: ``v -> A v``.
        start: Any non-zero vector, as a list of tensors.
        steps: Dimension of the Krylov space.

    Returns:
        Ascending Ritz values, and weights that sum to one.
    """
    _, matrix = _krylov(product, start, steps)
    values, vectors = torch.linalg.eigh(matrix.double().cpu())
    return values, vectors[0].square()


def _krylov(
    product: Callable[[Vector], Vector], start: Vector, steps: int
) -> tuple[list[Vector], Tensor]:
    """Return an orthonormal basis Q of the Krylov space and the tridiagonal ``Q^T A Q``."""
    basis: list[Vector] = [torch._foreach_div(start, _dot(start, start).sqrt())]
    diagonal: list[Tensor] = []
    below: list[Tensor] = []
    for step in range(steps):
        vector = product(basis[-1])
        whole = _dot(vector, vector).sqrt()
        diagonal.append(_dot(vector, basis[-1]))
        for earlier in (*basis, *basis):  # twice is enough (Parlett)
            overlap = _dot(vector, earlier)
            vector = torch._foreach_sub(vector, torch._foreach_mul(earlier, overlap))
        length = _dot(vector, vector).sqrt()
        rounding = 10 * torch.finfo(whole.dtype).eps * whole
        if step + 1 == steps or bool(length <= rounding):  # the Krylov space is invariant
            break
        below.append(length)
        basis.append(torch._foreach_div(vector, length))
    matrix = torch.diag(torch.stack(diagonal))
    if below:
        side = torch.stack(below)
        matrix = matrix + torch.diag(side, 1) + torch.diag(side, -1)
    return basis, matrix


@dataclass(frozen=True)
class HessianSpectrum:
    """The distribution of the eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature.

    The mean over random starts of ``v^T f(A) v`` is ``tr f(A)`` divided by the dimension [UCS]; so
    the weighted nodes of all starts together approximate the distribution that gives each
    eigenvalue the same weight [GKX]. The distribution is not resolved between two nodes of a start.

    Attributes:
        nodes: Ritz values of all starts, ascending, shape ``(M,)``, float64 on the CPU.
        weights: Weight of each node, ``(M,)``; they sum to one.
    """

    nodes: Tensor
    weights: Tensor

    @classmethod
    def of(cls, quadratures: Sequence[tuple[Tensor, Tensor]]) -> HessianSpectrum:
        """Return the mean of the quadratures of several starts, as returned by :func:`lanczos`."""
        nodes, order = torch.cat([values for values, _ in quadratures]).sort()
        weights = torch.cat([weights for _, weights in quadratures])[order]
        return cls(nodes, weights / len(quadratures))

    def moment(self, power: int) -> float:
        """Estimate the mean power of the eigenvalues, ``tr(A^power) / n``."""
        return float((self.weights * self.nodes**power).sum())


@dataclass(frozen=True)
class Smoothness:
    """The sharpness of the minimum at a model's weights.

    Attributes:
        lambda_max: Largest eigenvalue of the Hessian of the clean loss.
        trace: An unbiased estimate of Tr(H).
        spread: Standard error of the trace over the probes; NaN for a single probe.
        spectrum: Distribution of all eigenvalues.
        trace_probes: Number of probes that the trace and its standard error come from.
    """

    lambda_max: float
    trace: float
    spread: float
    spectrum: HessianSpectrum
    trace_probes: int = 1


def smoothness(
    adapter: TaskAdapter[Any],
    samples: Samples[Any],
    generator: torch.Generator,
    *,
    probes: int = 3,
    steps: int = 10,
    trace_error: float | None = None,
    batch_size: int = 256,
    watch: Callable[[int], object] | None = None,
) -> Smoothness:
    """Measure lambda_max, Tr(H) and the spectrum of the mean loss over ``samples``, in eval mode.

    Each Rademacher probe v gives ``v^T H v`` exactly (Hutchinson), and its own Krylov space, whose
    largest Ritz value bounds lambda_max from below; the largest over the probes is returned. The
    spectrum comes from all probes. This costs ``probes * steps`` products with the Hessian, and
    memory for ``steps`` vectors of the size of the model.

    The standard error of the trace is rough with so few probes, and large if a few eigenvalues make
    up most of the trace. With ``trace_error`` the trace is ``Tr(Q^T H Q)``, exact for the basis Q
    of the last Krylov space, plus the mean of ``u^T H u`` over separate probes
    ``u = (I - Q Q^T) v``, one product each. This is unbiased, and Q removes most of the variance
    (Hutch++ [MMMW]).

    Args:
        adapter: The model.
        samples: Clean samples.
        generator: Source of the probes, on the CPU.
        probes: Number of Krylov spaces, one random vector each.
        steps: Dimension of each Krylov space, one Hessian product per step.
        trace_error: Target standard error of the trace, as a fraction of the trace, reached with 8
            to :data:`MOST_TRACE_PROBES` more products; None uses the trace of ``probes`` only.
        batch_size: Samples per pass.
        watch: Called before each pass with the number of products done so far; may raise to abort
            the measurement.
    """
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    done = 0

    def each() -> None:
        if watch is not None:
            watch(done)

    def product(vector: Vector) -> Vector:
        nonlocal done
        result = one_product(vector)
        done += 1
        return result

    def probe() -> list[Tensor]:
        return [
            (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p in parameters
        ]

    one_product = hessian_product(adapter, samples, parameters, batch_size, each)
    size = sum(parameter.numel() for parameter in parameters)
    quadratures = []
    for _ in range(probes):
        basis, matrix = _krylov(product, probe(), steps)
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
        quadratures.append((values, vectors[0].square()))
    spectrum = HessianSpectrum.of(quadratures)
    lambda_max = float(spectrum.nodes[-1])
    if trace_error is not None:
        found = _deflated_traces(product, probe, basis, trace_error, float(matrix.trace()))
        traces = float(matrix.trace()) + found
    else:
        traces = torch.stack([(values * weights).sum() for values, weights in quadratures]) * size
    count = len(traces)
    spread = float(traces.std() / math.sqrt(count)) if count > 1 else math.nan
    return Smoothness(lambda_max, float(traces.mean()), spread, spectrum, count)


def _deflated_traces(
    product: Callable[[Vector], Vector],
    probe: Callable[[], Vector],
    basis: Sequence[Vector],
    error: float,
    known: float,
) -> Tensor:
    """Return ``u^T A u`` of probes u orthogonal to a basis, float64 ``(M,)``.

    At least 8 are used, and more until the standard error of ``known`` plus their mean is at most
    ``error`` times that sum.
    """
    found: list[float] = []
    while len(found) < MOST_TRACE_PROBES:
        vector = probe()
        for earlier in (*basis, *basis):
            overlap = _dot(vector, earlier)
            vector = torch._foreach_sub(vector, torch._foreach_mul(earlier, overlap))
        found.append(float(_dot(vector, product(vector))))
        traces = torch.tensor(found, dtype=torch.float64)
        if len(found) >= _FEWEST_TRACE_PROBES and (
            float(traces.std()) / math.sqrt(len(found)) <= error * abs(known + float(traces.mean()))
        ):
            break
    return traces
