"""Weights in the coordinates of their own singular values.

A weight, reshaped to a matrix with one row per output, is ``W = U diag(s) V^T``. Training changes
``W(d) = U diag(relu(s + d)) V^T`` through ``d`` alone. The model keeps ordinary weights throughout:
they are updated from ``d`` after each step, and gradients with respect to them are pulled back
exactly, ``dL/dd_k = [s_k + d_k > 0] u_k^T (dL/dW) v_k``. So nothing has to be unwrapped at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Spectrum", "spectral_weights"]

_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def spectral_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of convolution, linear, embedding and fused attention layers by name.

    Layers of other classes are included if their ``weight`` is a matrix, as in GPT-2.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, value in module.named_parameters(recurse=False):
            is_weight = key == "weight" and (isinstance(module, _LAYERS) or value.ndim == 2)
            is_fused = isinstance(module, nn.MultiheadAttention) and key == "in_proj_weight"
            if (
                (is_weight or is_fused)
                and value.requires_grad
                and all(value is not other for other in found.values())
            ):
                found[prefix + key] = value
    return found


class Spectrum:
    """The singular values of some weights as coordinates, decomposed once, in float32."""

    def __init__(self, weights: Sequence[nn.Parameter], scale: float = 1.0) -> None:
        """Decompose ``weights``, each with two or more axes, the first of which is the output.

        Args:
            weights: The parameters to decompose.
            scale: A shift of one moves a singular value by ``scale``.
        """
        self.weights = list(weights)
        self.scale = scale
        self.start = [weight.detach().clone() for weight in weights]
        self.bases: list[tuple[Tensor, Tensor, Tensor]] = []
        for weight in self.start:
            matrix = weight.flatten(1)
            full = matrix if matrix.dtype == torch.float64 else matrix.float()
            left, values, right = torch.linalg.svd(full, full_matrices=False)
            self.bases.append((left, values, right))
        self.shifts = [torch.zeros_like(values, requires_grad=True) for _, values, _ in self.bases]

    def pull_back(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients with respect to the shifts, given those of the weights.

        It is linear in ``gradients`` and keeps their graph.
        """
        pulled = []
        for gradient, shift, (left, values, right) in zip(
            gradients, self.shifts, self.bases, strict=True
        ):
            matrix = gradient.flatten(1).to(left.dtype)
            alive = self.scale * (values + self.scale * shift.detach() > 0).to(left.dtype)
            pulled.append(alive * ((matrix @ right.T) * left).sum(0))
        return pulled

    def values(self) -> list[Tensor]:
        """Return the shifted weights; with zero shifts, the weights bit for bit."""
        shifted = []
        for start, shift, (left, values, right) in zip(
            self.start, self.shifts, self.bases, strict=True
        ):
            change = torch.relu(values + self.scale * shift) - values
            shifted.append(start + ((left * change) @ right).view_as(start))
        return shifted

    def sizes(self) -> list[Tensor]:
        """Return the shifted singular values, in units of ``scale``."""
        return [
            torch.relu(values / self.scale + shift.detach())
            for shift, (_, values, _) in zip(self.shifts, self.bases, strict=True)
        ]

    def write(self) -> None:
        """Write the shifts into the weights."""
        with torch.no_grad():
            for weight, value in zip(self.weights, self.values(), strict=True):
                weight.copy_(value)
