"""Point clouds without and with the trigger of an attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdefense.plots.base import Plot
from mmdefense.plots.clouds import render_clouds
from mmdefense.plots.images import ImageGrid, ImageRow

__all__ = ["TriggeredClouds"]


@dataclass(frozen=True, eq=False)
class TriggeredClouds(Plot):
    """Clouds without and with the trigger, from the side and from above.

    Attributes:
        clean: Shape ``(N, P, 3 + F)``, around the unit sphere.
        triggered: The same clouds with the trigger.
        names: Class of each cloud.
    """

    clean: Tensor
    triggered: Tensor
    names: Sequence[str] = ()

    title = "The trigger"
    wide = True

    @property
    def caption(self) -> str:
        """How to read it, and what is orange, if anything is."""
        orange = " Points that the trigger put there are orange." * bool(self._marked().any())
        return (
            "Each column is one test sample without and with the trigger, on the unit sphere; near "
            f"points are dark.{orange} A model with a working backdoor gives every triggered "
            "sample the attacker's label."
        )

    def panels(self) -> list[ImageGrid]:
        """Return rows of pictures of the clouds."""
        marked = self._marked()
        return [
            ImageGrid(
                [
                    ImageRow("clean", render_clouds(self.clean), self.names),
                    ImageRow("with trigger", render_clouds(self.triggered, marked)),
                    ImageRow("from above", render_clouds(self.triggered, marked, elevation=85)),
                ],
                columns=len(self.clean),
            )
        ]

    def _marked(self) -> Tensor:
        """Return which points the trigger put there, bool ``(N, P)``; none if all moved."""
        altered = (self.clean != self.triggered).any(2)
        return altered if altered.float().mean() < 0.5 else torch.zeros_like(altered)
