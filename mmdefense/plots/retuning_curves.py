"""Whether a backdoor that was removed comes back when the model is trained on a few triggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Plot
from mmdefense.plots.colors import AFTER, BEFORE
from mmdefense.plots.panels import Curve, Curves

__all__ = ["RetuningCurves"]


@dataclass(frozen=True, eq=False)
class RetuningCurves(Plot):
    """ASR and ACC of a model, and of its clean twin, over the updates of a retuning attack.

    Attributes:
        models: What each model is.
        updates: Updates after which each was measured, ``(P,)`` for each model.
        asr: Attack success rate after these, ``(P,)`` for each model.
        acc: Score of clean samples after these, ``(P,)`` for each model.
    """

    models: Sequence[str]
    updates: Sequence[Numbers]
    asr: Sequence[Numbers]
    acc: Sequence[Numbers]

    title = "Retuning attack"

    @property
    def caption(self) -> str:
        """How to read the curves, and what they cannot say without a clean twin."""
        beside = (
            "A purified model whose ASR rises sooner than that of its clean twin still knows the "
            "backdoor."
            if len(self.models) > 1
            else "There is no clean twin to compare with: a model that never knew the backdoor "
            "learns it from these samples as well, only later."
        )
        return (
            "The model is fine-tuned on clean samples, a few of them with the trigger (Min et al., "
            f"arXiv:2410.09838). {beside}"
        )

    def panels(self) -> list[Curves]:
        """Return one panel with the ASR and one with the ACC, a line for each model."""
        colors = (AFTER, BEFORE)
        return [
            Curves(
                [
                    Curve(name, x, y, color)
                    for name, x, y, color in zip(self.models, self.updates, rates, colors)  # noqa: B905  # one model has no twin
                ],
                "updates",
                what,
                percent="y",
            )
            for what, rates in (("ASR", self.asr), ("ACC", self.acc))
        ]
