"""Images without and with the trigger of an attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.images import COLUMNS, ImageGrid, ImageRow, with_and_without

__all__ = ["TriggeredSamples"]


@dataclass(frozen=True, eq=False)
class TriggeredSamples(Plot):
    """Images without and with the trigger, and what the trigger altered.

    Attributes:
        clean: Images ``(N, C, H, W)`` in ``[0, 1]``; the first ten are shown.
        triggered: The same images with the trigger.
        names: What stands below each image, such as its class.
        trigger: The trigger itself, ``(M, C, H, W)``, where it is an image.
    """

    clean: Numbers
    triggered: Numbers
    names: Sequence[str] = ()
    trigger: Numbers | None = None

    title = "The trigger"
    wide = True

    @property
    def caption(self) -> str:
        """How to read it, with the scale of the difference."""
        _, largest = with_and_without(self.clean, self.triggered)
        return (
            "Each column is one test sample without and with the trigger. In the difference "
            f"mid-grey is no change; it is scaled to its largest value, {largest:.3g} of the full "
            "range. A model with a working backdoor gives every triggered sample the attacker's "
            "label."
        )

    def panels(self) -> list[ImageGrid]:
        """Return rows of samples without and with the trigger, and the difference."""
        rows, _ = with_and_without(self.clean, self.triggered, self.names)
        if self.trigger is not None:
            rows.insert(0, ImageRow("trigger", self.trigger))
        return [ImageGrid(rows, columns=COLUMNS)]
