"""The base class of triggers: how a trigger is applied to a tensor of inputs."""

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
"""Tasks of an image trigger, which is applied to every frame of a clip in the same way."""

_CLIP = 5  # axes of a batch of clips
_CHUNK = 1024  # inputs stamped at once: bounds the memory of attacks that run a network


class Trigger(ABC):
    """Changes inputs. The attack decides which inputs get it, and their labels.

    A trigger for images works in other domains without changes: it is applied to every frame of a
    clip in the same way, and the attacks of :mod:`mmdefense.attacks.baddet` apply it to an image
    with objects, or to the box of each object.
    """

    tasks: ClassVar[tuple[str, ...]]
    seed: Seed

    shapes: ClassVar[Mapping[str, str]] = {
        "image-classification": "(N, C, H, W)",
        "video-classification": "(N, C, T, H, W)",
        "point-cloud-classification": "(N, P, 3 + F)",
    }
    """Shape of a batch of inputs for each task."""

    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    """Range that stamped inputs are clipped to, if the inputs are bounded."""

    @final
    def stamp(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a copy of ``inputs`` with the trigger, on their device and within their limits.

        Args:
            inputs: Of the shape of one of the attack's tasks, floating point; images and clips in
                ``[0, 1]``.
            generator: Generator, on the CPU, for random parts of a trigger; by default a fresh one
                from ``seed``, so that the same inputs always get the same trigger.

        Raises:
            BadInputError: If dtype or shape of the inputs do not fit.
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
        """Reject inputs that do not belong to the attack's tasks.

        Raises:
            BadInputError: If they do not; the message names the supported shapes.
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
            images: Shape ``(N, C, H, W)``, or clips as ``(N, T, C, H, W)``: code that works on
                ``(..., C, H, W)`` and draws once per sample treats all frames in the same way.
                Clouds are ``(N, P, 3 + F)``.
            generator: Generator for random parts of the trigger.
        """
