"""The triggers that a search recovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdefense.errors import BadInputError
from mmdefense.plots.base import Numbers, Plot, as_array
from mmdefense.plots.images import ImageGrid, ImageRow

__all__ = ["RecoveredTriggers"]

_FATES = (
    "accepted",
    "works, not told apart from the triggers of clean models",
    "does not work, or is too large for a trigger",
)


@dataclass(frozen=True, eq=False)
class RecoveredTriggers(Plot):
    """The triggers that a search recovered.

    Attributes:
        images: One per trigger, ``(C, H, W)`` in ``[0, 1]``; families may differ in size. Kept as
            they are shown, in whole numbers to 255.
        names: What each is, such as its family and target.
        success: Share of the clean samples that each leads to its target, in ``[0, 1]``.
        accepted: Which of them were unlearnt.
        works: Which of the others work all the same, but were not told apart from the triggers
            that clean models have; none means none.
    """

    images: Sequence[Numbers]
    names: Sequence[str]
    success: Sequence[float]
    accepted: Sequence[bool]
    works: Sequence[bool] = ()

    title = "Recovered triggers"
    wide = True

    @property
    def caption(self) -> str:
        """How to read it, with what is there of each fate."""
        fates = {self._fate(index) for index in range(len(self.images))}
        said = [
            "Sampled from the trigger generators, with no knowledge of the true trigger or target; "
            "the share is of the clean samples that each leads to its target."
        ]
        if 0 in fates:
            said.append("They need not look like the true trigger to undo its effect.")
        else:
            said.append("That none was accepted is not proof that there is none.")
        if 1 in fates:
            said.append(
                "A trigger that works and was not accepted may be a backdoor's: models that nobody "
                "tampered with have such triggers, too."
            )
        return " ".join(said)

    def __post_init__(self) -> None:
        columns = (self.images, self.names, self.success, self.accepted)
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1 or len(self.works) not in {0, lengths[0]}:
            raise BadInputError(
                "images, names, success, accepted and works must have one length, got "
                f"{', '.join(map(str, lengths))} and {len(self.works)}"
            )
        images = [
            image if np.asarray(image).dtype == np.uint8 else _in_bytes(image)
            for image in self.images
        ]
        object.__setattr__(self, "images", images)

    def panels(self) -> list[ImageGrid]:
        """Return a row of images for each fate and size of image; none where there is no image."""
        alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for index, image in enumerate(self.images):
            alike.setdefault((self._fate(index), np.shape(image)), []).append(index)
        rows = [
            ImageRow(
                _FATES[fate],
                np.stack([np.asarray(self.images[n]) for n in chosen]),
                [f"{self.names[n]}, {100 * self.success[n]:.0f}%" for n in chosen],
            )
            for (fate, _), chosen in sorted(alike.items())
        ]
        return [ImageGrid(rows)] if rows else []

    def _fate(self, index: int) -> int:
        """Return which of the fates a trigger has."""
        works = bool(self.works) and self.works[index]
        return 0 if self.accepted[index] else 1 if works else 2


def _in_bytes(image: Numbers) -> Numbers:
    values = np.nan_to_num(as_array(image)).clip(0, 1)
    return (255 * values).round().astype(np.uint8)
