"""Trace and diagonal of the Fisher information, and the gradient of the trace.

For one sample, ``F_n`` is the covariance of the gradient of ``log p(y | x_n)`` over labels ``y``
drawn from the model itself (the true Fisher), or its outer product at the given label (the
empirical Fisher); ``F`` is the mean over samples. With scores that are independent between samples
and have zero mean, the gradient of one sum gives both, without per-sample gradients: ``E ||grad
sum_n s_n||^2 = sum_n Tr F_n``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdefense.data.batch import Batch, Samples, batches
from mmdefense.errors import UnsupportedError, one_line
from mmdefense.kernels.hooks import mode, second_derivatives
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import RandomState, add_up, is_out_of_memory, shared
from mmdefense.runtime.processes import sharing

__all__ = [
    "Form",
    "check_second_derivative",
    "fisher_diagonal",
    "fisher_trace",
    "loss_and_trace",
    "penalised_gradient",
]

B = TypeVar("B", bound=Batch)

Form = Literal["true", "empirical"]

PullBack = Callable[[Sequence[Tensor]], list[Tensor]]
"""Maps gradients with respect to weights to gradients with respect to other coordinates."""


def _scores(
    adapter: TaskAdapter[B], batch: B, generator: torch.Generator, form: Form
) -> tuple[Tensor, Tensor]:
    """Return per-sample losses and zero-mean scores of one forward pass, both ``(N,)``."""
    if form == "true":
        return adapter.sampled_loss(batch, generator)
    loss = adapter.per_sample_loss(batch)
    signs = torch.randint(0, 2, loss.shape, generator=generator, device=loss.device) * 2 - 1
    return loss, signs * loss


class _Signs:
    """The random signs of a batch, drawn micro-batch by micro-batch.

    With several processes, each draws the signs of all rows and uses those of its own rows, so that
    signs are independent between processes and all generators stay in the same state.
    """

    def __init__(self, generator: torch.Generator, total: int) -> None:
        self.generator, self.total = generator, total
        self.start = generator.get_state() if sharing(total).count > 1 else None

    def of(self, rows: slice) -> AbstractContextManager[object]:
        """Return a context in which a pass over some rows draws their signs."""
        if self.start is None:
            return nullcontext()
        self.generator.set_state(self.start)
        return _WholeDraws(self.generator, rows, self.total)


class _WholeDraws(TorchFunctionMode):
    """Draws integers for all rows of a batch when some rows request them; returns those rows."""

    def __init__(self, generator: torch.Generator, rows: slice, total: int) -> None:
        super().__init__()
        self.generator, self.rows, self.total = generator, rows, total

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if given.get("generator") is not self.generator:
            return function(*args, **given)
        if function is not torch.randint or len(args) != 3:
            raise UnsupportedError(
                "an adapter that runs in several processes must draw from its generator only by "
                f"torch.randint(low, high, shape); this one calls {function.__name__}"
            )
        low, high, shape = args
        return function(low, high, (self.total, *shape[1:]), **given)[self.rows]


def loss_and_trace(
    adapter: TaskAdapter[B],
    batch: B,
    parameters: Sequence[Tensor],
    generator: torch.Generator,
    form: Form = "true",
    pull_back: PullBack = list,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and an unbiased estimate of Tr(F), both with graph.

    Both come from one forward and one backward pass; the trace can be differentiated if every
    operation of the model has a second derivative.

    Args:
        adapter: The model; its mode decides how BatchNorm normalises. The trace is unbiased if
            samples do not share statistics.
        batch: N samples.
        parameters: The coordinates of F.
        generator: Source of the random signs, on the model's device.
        form: ``"true"`` or ``"empirical"``.
        pull_back: Maps gradients with respect to ``parameters`` to other coordinates, linearly.

    Returns:
        The loss, and the trace ``||sum_n grad s_n||^2 / N``.
    """
    loss, score = _scores(adapter, batch, generator, form)
    gradient = torch.autograd.grad(
        score.sum(), parameters, create_graph=True, materialize_grads=True
    )
    return loss.mean(), squared_norm(pull_back(gradient)) / len(score)


def penalised_gradient(
    adapter: TaskAdapter[B],
    batch: B,
    parameters: Sequence[Tensor],
    generator: torch.Generator,
    weight: float,
    form: Form = "true",
    pull_back: PullBack = list,
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean loss, and the gradient of ``loss + weight * Tr(F)``.

    Like :func:`loss_and_trace`, but in micro-batches if memory runs out or several processes share
    the batch, with the same result. With ``G`` the sum of the scores' gradients, ``N Tr(F) =
    ||G||^2``, whose gradient is the sum over micro-batches of ``2 d<grad s_part, G>``: a first pass
    accumulates ``G``, and a second pass, with the same random signs, differentiates. (BatchNorm in
    train mode normalises each micro-batch by itself.)
    """
    model, count = adapter.model, len(batch)

    def gradient_of_scores(score: Tensor, *, again: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            score.sum(), parameters, create_graph=again, materialize_grads=True
        )
        return pull_back(found)

    processes, signs = sharing(count), _Signs(generator, count)
    summed: list[Tensor] = []

    def of_part(row: slice, *, again: bool) -> tuple[Tensor, list[Tensor]]:
        with signs.of(row):
            loss, score = _scores(adapter, batch.rows(row), generator, form)
        return loss, gradient_of_scores(score, again=again)

    def compute(rows: Sequence[slice]) -> list[Tensor]:
        if len(rows) == 1 and processes.count == 1:
            loss, trace = loss_and_trace(adapter, batch, parameters, generator, form, pull_back)
            total = loss + weight * trace
            return [
                loss.detach(),
                *torch.autograd.grad(total, parameters, materialize_grads=True),
            ]
        known: tuple[Tensor, list[Tensor]] | None = None
        # Processes all-reduce G only once; signs do not depend on the size of the micro-batches.
        if not summed or processes.count == 1:
            start, local = RandomState(model, generator), list[Tensor]()
            for row in rows:
                known = of_part(row, again=len(rows) == 1)
                add_up(local, [gradient.detach() for gradient in known[1]])
            summed[:] = processes.sum(local)
            if len(rows) > 1:
                known = None
                start.restore()
        mean, gradient = torch.zeros_like(summed[0].sum()), list[Tensor]()
        for row in rows:
            loss, mine = known or of_part(row, again=True)
            product = torch.stack([(g * s).sum() for g, s in zip(mine, summed, strict=True)]).sum()
            total = (loss.sum() + 2 * weight * product) / count
            add_up(gradient, torch.autograd.grad(total, parameters, materialize_grads=True))
            mean += loss.detach().sum() / count
        return [mean, *gradient]

    mean, *gradient = shared(compute, count, "training with Tr(F)", model, generator)
    return mean, gradient


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of all squared entries, a scalar."""
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


def fisher_trace(
    adapter: TaskAdapter[B],
    samples: Samples[B],
    parameters: Sequence[Tensor],
    generator: torch.Generator,
    *,
    form: Form = "true",
    batch_size: int = 128,
) -> float:
    """Return Tr(F) over ``samples`` in eval mode, the sum of :func:`fisher_diagonal`.

    The trace is ``(1/N) sum_n Tr F_n``, in nats squared per squared parameter. It is unbiased, and
    exact for ``batch_size=1`` with the empirical form.
    """
    diagonal = fisher_diagonal(
        adapter, samples, parameters, generator, form=form, batch_size=batch_size
    )
    return float(torch.stack([d.sum() for d in diagonal]).sum())


def fisher_diagonal(
    adapter: TaskAdapter[B],
    samples: Samples[B],
    parameters: Sequence[Tensor],
    generator: torch.Generator,
    *,
    form: Form = "true",
    batch_size: int = 32,
    pull_back: PullBack = list,
    each: Callable[[int, int], object] | None = None,
) -> list[Tensor]:
    """Return diag(F), the mean over samples of squared per-sample gradients, in eval mode.

    Each batch adds the squared gradient of its signed sum, whose expectation is the sum of the
    per-sample squares; this needs memory for one gradient only. ``batch_size=1`` with the empirical
    form is exact.

    Args:
        adapter: The model.
        samples: N samples.
        parameters: The coordinates of F.
        generator: Source of the random signs, on the model's device.
        form: ``"true"`` or ``"empirical"``.
        batch_size: Samples per backward pass; smaller is less noisy but slower.
        pull_back: Maps gradients with respect to ``parameters`` to other coordinates, linearly.
        each: Called before each batch, and after the last one, with the number of batches done so
            far and their total number.

    Returns:
        One tensor per coordinate, of the same shape.
    """
    total = [torch.zeros_like(p) for p in pull_back([torch.zeros_like(p) for p in parameters])]
    model = adapter.model

    def gradient_of(batch: B, rows: Sequence[slice]) -> list[Tensor]:
        summed: list[Tensor] = []
        signs = _Signs(generator, len(batch))
        for row in rows:
            with signs.of(row):
                _, score = _scores(adapter, batch.rows(row), generator, form)
            found = torch.autograd.grad(score.sum(), parameters, materialize_grads=True)
            add_up(summed, pull_back(found))
        return summed

    count = -(-len(samples) // batch_size)
    with mode(model, train=False):
        for number, batch in enumerate(batches(samples, batch_size)):
            if each is not None:
                each(number, count)
            gradient = shared(
                partial(gradient_of, batch),
                len(batch),
                "measuring the Fisher information",
                model,
                generator,
            )
            torch._foreach_add_(total, torch._foreach_mul(gradient, gradient))
    if each is not None:
        each(count, count)
    torch._foreach_div_(total, len(samples))
    return total


@contextmanager
def _cleared_gradients(model: nn.Module) -> Iterator[None]:
    """Clear ``.grad`` of all parameters, and restore it at the end."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def check_second_derivative(
    adapter: TaskAdapter[B], samples: Samples[B], parameters: Sequence[Tensor]
) -> None:
    """Differentiate Tr(F) on one sample, so that an unsupported model is rejected before the run.

    Raises:
        UnsupportedError: If an operation of the model has no second derivative; it is named.
    """
    generator = torch.Generator(parameters[0].device).manual_seed(0)
    batch = samples.take(torch.zeros(1, dtype=torch.int64))
    try:
        with mode(adapter.model, train=False), second_derivatives():
            _, trace = loss_and_trace(adapter, batch, parameters, generator)
            with _cleared_gradients(adapter.model):
                # Not autograd.grad: it skips nodes that do not lead to the parameters, such as the
                # error that once_differentiable leaves in the graph.
                torch.autograd.backward(trace)
    except RuntimeError as error:
        if is_out_of_memory(error):  # also a RuntimeError, but not caused by an operation
            raise
        raise UnsupportedError(
            "the model must be differentiated twice, but one of its operations cannot be: "
            f"{one_line(error)}; use a defense that needs first derivatives only, such as tsbd"
        ) from error
