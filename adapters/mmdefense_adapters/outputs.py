"""Outputs of classifiers: logits, probabilities or sigmoid outputs, possibly among other outputs.

Everything downstream uses logits. This module determines, once for each mode of a model, how to get
them from its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdefense.errors import UnsupportedError
from mmdefense.kernels.hooks import watch_modules

__all__ = ["Form", "as_logits", "assumed_logits", "check_problem", "found_form", "main_output"]

_NAMES = ("logits", "out", "output", "outputs")  # of the main output among others
_ACTIVATIONS = (nn.Softmax, nn.Sigmoid)
_FLOOR = 1e-18
"""Lower bound on probabilities before the logarithm, whose second derivative, 1 / p^2, must fit
into float32. A class below it has no gradient."""
_CLOSE = 1e-3  # tolerance for the sum of probabilities, because of float16 rounding

Kind = Literal["logits", "probabilities", "sigmoid"]


@dataclass(frozen=True)
class Form:
    """What the rows of a classifier's outputs are.

    Attributes:
        kind: ``"logits"``, including log-probabilities; ``"probabilities"``, which sum to one; or
            ``"sigmoid"``, an independent probability per class.
        activation: Name of the final softmax or sigmoid layer, whose input is the logits. Empty if
            there is none, for example if ``forward`` calls a function.
    """

    kind: Kind = "logits"
    activation: str = ""

    @property
    def stated(self) -> str:
        """A note for the user; empty for logits."""
        if self.kind == "logits":
            return ""
        if self.kind == "probabilities":
            found, taken = "probabilities (its rows sum to one)", "their logarithm is"
        else:
            found, taken = "a sigmoid for each class", "its inverse is"
        if self.activation:
            taken = f"what its last layer {self.activation!r} reads is"
        loss = ", with a binary loss for each class" if self.kind == "sigmoid" else ""
        return f"the model returns {found}: {taken} taken as its logits{loss}"

    def passed_by(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the activation at the end of ``model`` is the identity."""
        if not self.activation:
            return nullcontext()
        layer = model.get_submodule(self.activation)
        return watch_modules([layer], lambda _, given, __: given[0])


def main_output(answer: Any, *, check: bool = False) -> Tensor:
    """Return the main tensor of a classifier's outputs.

    That is the tensor itself, the field ``logits`` (or ``out``) of a named tuple or dictionary, or
    else the first entry of a tuple: others are auxiliary outputs, such as those of GoogLeNet in
    train mode or the transforms of PointNet.

    Args:
        answer: Its outputs for N samples.
        check: Whether to reject a tuple of rows with different widths, such as features beside
            logits; do not use it for every batch, whose size may match that of a matrix by chance.

    Raises:
        UnsupportedError: If it is none of these.
    """
    found = _named(answer)
    parts = found if isinstance(found, (tuple, list)) else [found]
    main = next(iter(parts), None)
    if isinstance(main, Tensor) and not (check and _is_unclear(parts, main)):
        return main
    raise UnsupportedError(
        f"a classifier must return logits (N, K), got {_described(answer)}; wrap it in a module "
        "that returns the logits alone"
    )


def _is_unclear(parts: Sequence[Any], main: Tensor) -> bool:
    rows = [part for part in parts if isinstance(part, Tensor) and part.ndim == main.ndim == 2]
    return any(len(part) == len(main) and part.shape[1] != main.shape[1] for part in rows)


def _named(answer: Any) -> Any:
    """Return the field of ``answer`` that is named as a main output, or ``answer`` itself."""
    for name in _NAMES:
        if isinstance(answer, Mapping) and isinstance(answer.get(name), Tensor):
            return answer[name]
        if isinstance(answer, tuple) and isinstance(getattr(answer, name, None), Tensor):
            return getattr(answer, name)
    values: Iterable[Any] = answer.values() if isinstance(answer, Mapping) else ()
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else answer


def _described(answer: Any) -> str:
    """Describe outputs in a few words."""
    if isinstance(answer, Tensor):
        return str(tuple(answer.shape))
    kind = type(answer).__name__
    if isinstance(answer, Mapping):
        parts = [f"{name} {_described(value)}" for name, value in answer.items()]
    elif isinstance(answer, (tuple, list)):
        parts = [_described(value) for value in answer]
    else:
        return kind
    return f"a {kind} of {', '.join(parts) or 'nothing'}"


def found_form(model: nn.Module, forward: Callable[[], Any], classes: int) -> Form:
    """Return the form of the outputs of ``model`` in its current mode.

    Args:
        model: The classifier.
        forward: Runs it on a few samples, with grad, and returns its outputs.
        classes: Number of classes K.

    Raises:
        UnsupportedError: If there are no rows of K logits, or most samples have several classes.
    """
    seen: list[tuple[nn.Module, Any]] = []
    named = model.named_modules()
    layers: dict[nn.Module, str] = {m: name for name, m in named if isinstance(m, _ACTIVATIONS)}
    with watch_modules(list(layers), lambda layer, _, output: seen.append((layer, output))):
        outputs = main_output(forward(), check=True)
    if outputs.ndim != 2 or outputs.shape[1] != classes:
        raise UnsupportedError(
            f"the model must return logits (N, {classes}) in both modes, got {_described(outputs)} "
            f"in {'train' if model.training else 'eval'} mode"
        )
    last = [layers[layer] for layer, output in seen if output is outputs]
    runs = [layers[layer] for layer, _ in seen]
    activation = last[0] if last and runs.count(last[0]) == 1 else ""
    kind: Kind = "probabilities" if _are_probabilities(outputs) else "logits"
    if kind == "logits" and _is_sigmoid(outputs):
        _check_one_class(outputs)
        kind = "sigmoid"
    return Form(kind, activation if kind != "logits" else "")


def _are_probabilities(outputs: Tensor) -> Tensor:
    """Return whether all rows ``(N, K)`` are probabilities, a bool on their device."""
    values = outputs.detach()
    return (values >= 0).all() & ((values.float().sum(1) - 1).abs() <= _CLOSE).all()


def assumed_logits(outputs: Tensor) -> Tensor:
    """Convert outputs ``(N, K)`` of unknown form to logits, based on their values.

    This needs no device synchronisation.
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return outputs
    return torch.where(_are_probabilities(outputs), _log(outputs), outputs)


def _is_sigmoid(outputs: Tensor) -> bool:
    """Return whether the last operation was a sigmoid; values in [0, 1] are not sufficient."""
    return outputs.grad_fn is not None and outputs.grad_fn.name() == "SigmoidBackward0"


def _check_one_class(outputs: Tensor) -> None:
    several = (outputs > 0.5).sum(1) > 1
    if int(several.sum()) * 2 > len(outputs):
        raise UnsupportedError(
            f"the model ends in a sigmoid and gives several classes to {int(several.sum())} of "
            f"{len(outputs)} samples: a multi-label model, but the data has one label per sample; "
            "multi-label models are not supported"
        )


def as_logits(outputs: Tensor, form: Form) -> Tensor:
    """Convert outputs ``(N, K)`` to logits; softmax of log-probabilities is the identity."""
    if form.kind == "logits" or form.activation:
        return outputs
    if form.kind == "probabilities":
        return _log(outputs)
    return torch.logit(outputs, eps=1e-6)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(min=_FLOOR).log()


def check_problem(model: nn.Module) -> None:
    """Reject a ``transformers`` model that is not a single-label classifier by its config.

    Raises:
        UnsupportedError: If so; the message names ``problem_type``, or the single output.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem in {"multi_label_classification", "regression"}:
        what = "several labels" if problem.startswith("multi") else "numbers"
        raise UnsupportedError(
            f"the model's config says problem_type {problem!r}: it predicts {what} for each "
            "sample; only classifiers with one class per sample are supported"
        )
