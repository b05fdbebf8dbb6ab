"""How far each layer moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdefense.plots.base import Plot
from mmdefense.plots.panels import LABEL, Bars

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
        order = f", input side first{cut}" if layers > 1 else ""
        pruned, units = sum(self.pruned), sum(self.units)
        return (
            "Distance between a layer's weights after and before, relative to the norm "
            f"before{order}. "
            + (f"{pruned} of {units} units were pruned." if pruned else "No unit was pruned.")
        )

    def panels(self) -> list[Bars]:
        """Return a bar for each layer; nothing where there is no layer."""
        shown = self._shown()
        if not shown:
            return []
        pruned = [f" ({self.pruned[n]} pruned)" * bool(self.pruned[n]) for n in shown]
        names = [
            _shortened(self.layers[n], LABEL - len(note)) + note
            for n, note in zip(shown, pruned, strict=True)
        ]
        return [Bars(names, [self.changes[n] for n in shown], "relative weight change")]

    def _shown(self) -> list[int]:
        order = sorted(range(len(self.layers)), key=lambda n: -self.changes[n])
        return sorted(order[:_MOST])


def _shortened(name: str, most: int) -> str:
    """Return a dotted name with its first parts cut to a letter each, as many as it takes to fit.

    So ``encoder.stages.0.layers.1.convolution`` becomes ``e.s.0.l.1.convolution``. Where that is
    too long as well, its end is cut.
    """
    parts = name.split(".")
    for number in range(len(parts) - 1):
        if len(".".join(parts)) <= most:
            break
        parts[number] = parts[number][:1] if parts[number].isalpha() else parts[number]
    short = ".".join(parts)
    return short if len(short) <= most else f"{short[: most - 1]}…"
