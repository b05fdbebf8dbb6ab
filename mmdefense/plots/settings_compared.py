"""ACC and ASR that one defense leaves at several settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.panels import Bars

__all__ = ["SettingsCompared"]


@dataclass(frozen=True, eq=False)
class SettingsCompared(Plot):
    """The trade-off between ACC and ASR over the settings of a defense.

    Attributes:
        names: Of the settings, ``S``; the given model may be one.
        acc: ACC at each, in percent, ``(S,)``.
        asr: ASR at each, in percent, ``(S,)``.
    """

    names: Sequence[str]
    acc: Numbers
    asr: Numbers

    title = "ACC and ASR by setting"
    caption = "Test figures, which no defense sees: higher ACC and lower ASR are better."
    wide = True

    def panels(self) -> list[Bars]:
        """Return bars of the ACC and of the ASR."""
        return [Bars(self.names, self.acc, "ACC, %"), Bars(self.names, self.asr, "ASR, %")]
