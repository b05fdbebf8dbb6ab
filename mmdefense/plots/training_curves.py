"""What a run reported as it trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdefense.plots.base import Plot, as_array
from mmdefense.plots.panels import Curve, Curves

__all__ = ["TrainingCurves"]


@dataclass(frozen=True, eq=False)
class TrainingCurves(Plot):
    """Every value that a run reported, one panel each, one line per stage.

    Attributes:
        history: Mappings of ``stage``, ``step`` and values by name, in order of time.
    """

    history: Sequence[Mapping[str, Any]]

    title = "Training curves"

    @property
    def caption(self) -> str:
        """How to read them, and a word on a stage that unlearns, where there is one."""
        curves = [curve for panel in self.panels() for curve in panel.curves]
        unlearns = any("unlearn" in curve.name for curve in curves)
        return (
            "What the defense reported as it ran"
            + (", a line for each stage" if len({curve.name for curve in curves}) > 1 else "")
            + "."
            + (" A stage that unlearns raises its loss on purpose." if unlearns else "")
        )

    @property
    def wide(self) -> bool:
        """Whether there are more than two panels."""
        return len(self.panels()) > 2

    def panels(self) -> list[Curves]:
        """Return the curves of what was reported more than once in a stage."""
        found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for entry in self.history:
            for name, value in entry.items():
                if name not in {"stage", "step"} and _is_number(value):
                    found[name][str(entry.get("stage", ""))].append((entry.get("step", 0), value))
        panels = []
        for name, stages in found.items():
            curves = [
                Curve(stage, *np.transpose(as_array(points)))
                for stage, points in stages.items()
                if len(points) > 1
            ]
            if curves:
                panels.append(Curves(curves, "step", name))
        return panels


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
