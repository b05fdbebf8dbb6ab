"""What a defense trains: parameters, and the weights of a model that they determine.

The optimizer updates ``parameters``. :meth:`Coordinates.values` returns the weights as a
differentiable function of them; :meth:`Coordinates.write` copies these into the model, which keeps
ordinary weights throughout; and :meth:`Coordinates.pull_back` turns gradients of the weights into
gradients of the parameters. At their initial values, the parameters reproduce the weights bit for
bit. In the training loop::

    space = UnitMasks(model, adapter.unit_groups())

    def gradients(batch, step):
        loss, found = mean_loss_gradient(adapter, batch, space.weights)
        space.assign(space.pull_back(found))
        return loss

    optimise(model, samples, training, run, gradients=gradients,
             parameters=space.parameters, after_step=space.settle)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mmdefense.kernels.spectral import Spectrum, spectral_weights
from mmdefense.protocol import UnitGroup

__all__ = ["Coordinates", "SingularValues", "UnitMasks", "WeightMasks", "Weights", "trainable"]


def trainable(model: nn.Module) -> list[Tensor]:
    """Return the parameters that require grad.

    Example:
        >>> from mmdefense.kernels.coordinates import trainable
        >>> all(weight.requires_grad for weight in trainable(model))
        True
    """
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Coordinates(ABC):
    """Tensors to optimise, and the weights of a model that they determine.

    Attributes:
        parameters: The trained tensors (leaf tensors).
        weights: The model's own parameters that are computed from them.
        bounds: Smallest and largest value of a parameter; None if there are no bounds.
    """

    parameters: list[Tensor]
    weights: list[Tensor]
    bounds: tuple[float, float] | None = None

    @abstractmethod
    def values(self) -> list[Tensor]:
        """Return the weights for the current parameters, differentiable in the parameters."""

    def pull_back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the parameters, given those of the weights.

        It is linear in ``gradients`` and keeps their graph.
        """
        with torch.enable_grad():
            values = self.values()
        graph = any(gradient.requires_grad for gradient in gradients)
        found = torch.autograd.grad(
            values, self.parameters, list(gradients), create_graph=graph, materialize_grads=True
        )
        return list(found)

    def sizes(self) -> list[Tensor]:
        """Return the scale of each parameter, for relative perturbations; not negative."""
        return [parameter.detach().abs() for parameter in self.parameters]

    def assign(self, gradients: Sequence[Tensor]) -> None:
        """Set ``.grad`` of the parameters."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    @torch.no_grad()
    def project(self) -> None:
        """Clamp the parameters to ``bounds``, if there are any."""
        if self.bounds is not None:
            for parameter in self.parameters:
                parameter.clamp_(*self.bounds)

    @torch.no_grad()
    def write(self) -> None:
        """Write the weights for the current parameters into the model."""
        for weight, value in zip(self.weights, self.values(), strict=True):
            weight.copy_(value)

    def settle(self, _: int = 0) -> None:
        """Project and write; call it after each update of the training loop."""
        self.project()
        self.write()


class Weights(Coordinates):
    """The weights themselves."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        """Train ``weights``, parameters of a model."""
        self.parameters = self.weights = list(weights)

    def values(self) -> list[Tensor]:
        """Return the weights."""
        return list(self.weights)

    def pull_back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return ``gradients``."""
        return list(gradients)

    def write(self) -> None:
        """Do nothing: the weights are trained directly."""


class SingularValues(Coordinates):
    """Additive shifts of the singular values of all weights; see :mod:`mmdefense.kernels.spectral`.

    ``W(d) = U diag(relu(s + scale * d)) V^T``, with d starting at zero.
    """

    def __init__(self, model: nn.Module, *, others: bool = True, scale: float = 1.0) -> None:
        """Decompose the matrices of ``model`` that require grad.

        Args:
            model: The model.
            others: Whether norms and biases are also trained, directly.
            scale: A shift of one moves a singular value by ``scale``.
        """
        matrices = list(spectral_weights(model).values())
        chosen = {id(weight) for weight in matrices}
        rest = [p for p in trainable(model) if id(p) not in chosen] if others else []
        self.spectrum, self.others = Spectrum(matrices, scale), rest
        self.parameters = [*self.spectrum.shifts, *rest]
        self.weights = [*matrices, *rest]

    def values(self) -> list[Tensor]:
        """Return the weights with shifted singular values, and the other weights."""
        return [*self.spectrum.values(), *self.others]

    def pull_back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the shifts and the others, in closed form."""
        count = len(self.spectrum.shifts)
        return [*self.spectrum.pull_back(gradients[:count]), *gradients[count:]]

    def sizes(self) -> list[Tensor]:
        """Return the singular values, in units of ``scale``, and the absolute other weights.

        A shift starts at zero, so its own size is no measure.
        """
        return [*self.spectrum.sizes(), *(other.detach().abs() for other in self.others)]

    def write(self) -> None:
        """Write the shifted singular values; the others are trained directly."""
        self.spectrum.write()


class UnitMasks(Coordinates):
    """A factor on the output of each unit, starting at one (ANP, RNP).

    It multiplies the unit's entries in the parameters of its last module (``UnitGroup.outer``; for
    a filter with BatchNorm, the norm), so that it scales the unit's output. Zero prunes the unit.
    Parameters that do not require grad are not changed.

    Attributes:
        masks: One for each group, shape ``(U,)``.
        bias_masks: Masks of the biases, if they have their own, one for each group.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        *,
        biases: Literal["shared", "own", "none"] = "shared",
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        """Put a mask on each unit of ``groups``.

        Args:
            model: The model.
            groups: G unit groups.
            biases: Whether biases share the unit's mask, have their own (as the perturbations of
                ANP do), or have none.
            bounds: Bounds of the masks.
        """
        named = dict(model.named_parameters(remove_duplicate=False))
        like = next(model.parameters())
        self.masks = [_ones(group, like) for group in groups]
        self.bias_masks = [_ones(group, like) for group in groups] if biases == "own" else []
        self.parameters = [*self.masks, *self.bias_masks]
        self.bounds = bounds
        by_weight: dict[Tensor, list[tuple[Tensor, int, int]]] = {}
        for number, group in enumerate(groups):
            for name, axis in group.outer.items():
                is_bias = name.rpartition(".")[2] == "bias"
                if not named[name].requires_grad or (is_bias and biases == "none"):
                    continue
                mask = (self.bias_masks if is_bias and biases == "own" else self.masks)[number]
                by_weight.setdefault(named[name], []).append((mask, axis, group.width))
        self.weights = list(by_weight)
        self._factors = list(by_weight.values())
        self._start = [weight.detach().clone() for weight in self.weights]

    def values(self) -> list[Tensor]:
        """Return the masked weights."""
        return [
            _masked(start, factors)
            for start, factors in zip(self._start, self._factors, strict=True)
        ]


class WeightMasks(Coordinates):
    """A factor on each entry of some weights, starting at one (AWM)."""

    def __init__(
        self, weights: Sequence[Tensor], *, bounds: tuple[float, float] | None = (0.0, 1.0)
    ) -> None:
        """Put a mask on each entry of ``weights``, parameters of a model.

        Args:
            weights: The weights to mask.
            bounds: Bounds of the masks.
        """
        self.weights, self.bounds = list(weights), bounds
        self._start = [weight.detach().clone() for weight in self.weights]
        self.parameters = [torch.ones_like(start, requires_grad=True) for start in self._start]

    def values(self) -> list[Tensor]:
        """Return the masked weights."""
        pairs = zip(self._start, self.parameters, strict=True)
        return [start * mask for start, mask in pairs]


def _ones(group: UnitGroup, like: Tensor) -> Tensor:
    return torch.ones(group.size, dtype=like.dtype, device=like.device, requires_grad=True)


def _masked(start: Tensor, factors: Sequence[tuple[Tensor, int, int]]) -> Tensor:
    value = start
    for mask, axis, width in factors:
        shape = [1] * start.ndim
        shape[axis] = start.shape[axis]
        value = value * mask.repeat_interleave(width).view(shape)
    return value
