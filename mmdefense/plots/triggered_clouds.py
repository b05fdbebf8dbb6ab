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
    caption = (
        "Each column is one test sample without and with the trigger, on the unit sphere; near "
        "points are dark. Points that the trigger put there are orange. A model with a working "
        "backdoor gives every triggered sample the attacker's label."
    )
    wide = True

    def panels(self) -> list[ImageGrid]:
        """Return rows of pictures of the clouds."""
        altered = (self.clean != self.triggered).any(2)
        partial = altered.float().mean() < 0.5  # else the whole cloud moved: mark nothing
        marked = altered if partial else torch.zeros_like(altered)
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
