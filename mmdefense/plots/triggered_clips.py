"""Clips without and with the trigger of an attack, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmdefense.plots.base import Plot
from mmdefense.plots.images import COLUMNS, ImageGrid, with_and_without

__all__ = ["TriggeredClips"]


@dataclass(frozen=True, eq=False)
class TriggeredClips(Plot):
    """Frames of clips without and with the trigger, and what the trigger altered.

    Attributes:
        clean: A few frames of each clip, ``(N, C, T, H, W)`` in ``[0, 1]``.
        triggered: The same with the trigger.
        classes: The class of each clip.
        frames: Number of each frame in its clip, from 0, ``(T,)``.
    """

    clean: Tensor
    triggered: Tensor
    classes: Sequence[str]
    frames: Sequence[int]

    title = "The trigger"
    caption = (
        "Test clips, frame by frame, without and with the trigger. In the difference mid-grey "
        "is no change; it is scaled to its largest value. A model with a working backdoor "
        "gives every triggered clip the attacker's label."
    )
    wide = True

    def panels(self) -> list[ImageGrid]:
        """Return rows of frames for each clip."""
        names = [f"frame {frame + 1}" for frame in self.frames]
        return [
            ImageGrid(
                with_and_without(clean.movedim(1, 0), triggered.movedim(1, 0), names)[0],
                columns=COLUMNS,
                title=title,
            )
            for clean, triggered, title in zip(
                self.clean, self.triggered, self.classes, strict=True
            )
        ]
