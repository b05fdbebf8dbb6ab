"""How far each layer moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdefense.plots.base import Plot
from mmdefense.plots.panels import Bars

__all__ = ["LayerChanges"]

_MOST = 24  # ours


@dataclass(frozen=True, eq=False)
class LayerChanges(Plot):
    """How far each layer moved, or the layers that moved most where there are many.

    Attributes:
        layers: Name of each layer, input side first.
        changes: Norm of the change of each one's weights, relative to their norm before.
        pruned: Number of units of each whose weights are all zero now and were not before.
        units: Number of units of each.
    """

    layers: Sequence[str]
    changes: Sequence[float]
    pruned: Sequence[int]
    units: Sequence[int]

    title = "What was changed"

    @property
    def caption(self) -> str:
        """How to read it, and how many layers and units that is about."""
        shown, layers = len(self._shown()), len(self.layers)
        cut = f", the {shown} of {layers} that moved most" if shown < layers else ""
        return (
            "Distance between a layer's weights after and before, relative to the norm before: "
            f"layers in order, input side first{cut}. {sum(self.pruned)} of {sum(self.units)} "
            "units were pruned."
        )

    def panels(self) -> list[Bars]:
        """Return a bar for each layer; nothing where there is no layer."""
        shown = self._shown()
        if not shown:
            return []
        names = [
            f"{self.layers[n]} ({self.pruned[n]} pruned)" if self.pruned[n] else self.layers[n]
            for n in shown
        ]
        return [Bars(names, [self.changes[n] for n in shown], "relative weight change")]

    def _shown(self) -> list[int]:
        order = sorted(range(len(self.layers)), key=lambda n: -self.changes[n])
        return sorted(order[:_MOST])
