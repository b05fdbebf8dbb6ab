"""What a trigger does to a tensor of inputs, whatever an attack makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from mmdefense.errors import BadInputError
from mmdefense.runtime.run import Run
from mmdefense.settings import Seed

__all__ = ["IMAGES_AND_CLIPS", "Trigger"]

IMAGES_AND_CLIPS = ("image-classification", "video-classification")
"""Tasks of a trigger for images that stamps every frame of a clip alike."""

_CLIP = 5  # axes of a batch of clips
_CHUNK = 1024  # inputs that are stamped at once: bounds the memory of attacks that run a net


class Trigger(ABC):
    """Changes inputs. Which inputs, and what a model is taught about them, is up to the attack.

    A trigger for images needs no second version for another domain: it stamps every frame of a
    clip alike, and the attacks of :mod:`mmdefense.attacks.baddet` stamp an image with objects, or
    the box of each object, with it.
    """

    tasks: ClassVar[tuple[str, ...]]
    seed: Seed

    shapes: ClassVar[Mapping[str, str]] = {
        "image-classification": "(N, C, H, W)",
        "video-classification": "(N, C, T, H, W)",
        "point-cloud-classification": "(N, P, 3 + F)",
    }
    """Shape of a batch of inputs of each task."""

    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    """Range that stamped inputs are clipped to, where the inputs have one."""

    @final
    def stamp(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a copy of ``inputs`` with the trigger, on their device and within their limits.

        Args:
            inputs: Of the shape of one of the attack's tasks, floating point; images and clips in
                ``[0, 1]``.
            generator: Source, on the CPU, of what is random in a trigger; by default a fresh one
                from ``seed``, so that the same inputs are always stamped alike.

        Raises:
            BadInputError: If the inputs are not of that kind.
        """
        self._check_inputs(inputs)
        generator = generator or Run(self.seed).generator("stamp")
        is_clip = inputs.ndim == _CLIP
        frames = inputs.transpose(1, 2) if is_clip else inputs
        with torch.no_grad():
            parts = [self._stamp(part, generator) for part in torch.split(frames, _CHUNK)]
            stamped = torch.cat(parts)
        stamped = stamped.transpose(1, 2) if is_clip else stamped
        return (stamped.clamp(*self.limits) if self.limits else stamped).to(inputs.dtype)

    def _check_inputs(self, inputs: Tensor) -> None:
        """Refuse inputs that are not of the attack's tasks.

        Raises:
            BadInputError: Naming the shapes that they may have.
        """
        shapes = [self.shapes[task] for task in self.tasks]
        axes = {len(shape.split(",")) for shape in shapes}
        if inputs.ndim not in axes or not inputs.is_floating_point():
            raise BadInputError(
                f"inputs must be floating-point, of shape {' or '.join(shapes)}, got "
                f"{inputs.dtype} of shape {tuple(inputs.shape)}"
            )

    @abstractmethod
    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return inputs with the trigger; values outside the limits are clipped later.

        Args:
            images: Shape ``(N, C, H, W)``, or clips as ``(N, T, C, H, W)``: what serves
                ``(..., C, H, W)`` and draws once for each of N stamps every frame alike. Clouds
                are ``(N, P, 3 + F)``.
            generator: Source of what is random in the trigger.
        """
