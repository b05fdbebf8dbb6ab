"""Samples with a trigger that a search recovered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.images import COLUMNS, ImageGrid, with_and_without

__all__ = ["InvertedSamples"]


@dataclass(frozen=True, eq=False)
class InvertedSamples(Plot):
    """Clean samples without and with a trigger that a search recovered.

    Attributes:
        clean: Images ``(N, C, H, W)`` in ``[0, 1]``; the first ten are shown.
        triggered: The same images with the trigger.
        name: What the trigger is and where it leads.
        success: Share of clean samples that it led there before the purification, in ``[0, 1]``.
    """

    clean: Numbers
    triggered: Numbers
    name: str
    success: float

    title = "Samples with a recovered trigger"
    wide = True

    @classmethod
    def of_batches(
        cls, clean: Any, triggered: Any, name: str, success: float
    ) -> InvertedSamples | None:
        """Return the plot of two batches; none where they are not of images."""
        pair = []
        for batch in (clean, triggered):
            images = getattr(batch, "images", getattr(batch, "inputs", None))
            if images is None or images.ndim != 4 or images.shape[1] not in {1, 3}:
                return None
            pair.append(images.detach().cpu())
        return cls(pair[0], pair[1], name, success)

    @property
    def caption(self) -> str:
        """How to read it, with the scale of the difference."""
        _, largest = with_and_without(self.clean, self.triggered)
        return (
            f"The recovered trigger that worked best ({self.name}): the given model fell for it in "
            f"{100 * self.success:.0f}% of the clean samples. In the difference mid-grey is no "
            f"change; it is scaled to its largest value, {largest:.3g} of the full range. It need "
            "not look like an attacker's trigger."
        )

    def panels(self) -> list[ImageGrid]:
        """Return rows of samples without and with the trigger, and the difference."""
        return [ImageGrid(with_and_without(self.clean, self.triggered)[0], columns=COLUMNS)]
