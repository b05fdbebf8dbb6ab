"""How far each layer moved in several purifications."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmdefense.plots.base import Plot
from mmdefense.plots.panels import Curve, Curves

__all__ = ["LayersCompared"]


@dataclass(frozen=True, eq=False)
class LayersCompared(Plot):
    """The weight change over the layers, a line for each purification.

    Attributes:
        changes: Relative weight change by layer, input side first, by name of the purification.
    """

    changes: Mapping[str, Mapping[str, float]]

    title = "What was changed"
    caption = (
        "Distance between a layer's weights after and before, relative to the norm before; layers "
        "are numbered from the input side as in the table of layers."
    )

    def panels(self) -> list[Curves]:
        """Return a line for each purification; nothing where no layer is known."""
        order = dict.fromkeys(layer for layers in self.changes.values() for layer in layers)
        place = {layer: number for number, layer in enumerate(order, 1)}
        curves = [
            Curve(name, [place[layer] for layer in layers], list(layers.values()))
            for name, layers in self.changes.items()
            if layers
        ]
        return [Curves(curves, "layer, by number", "relative weight change")] if curves else []
