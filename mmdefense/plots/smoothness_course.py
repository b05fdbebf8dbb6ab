"""How sharp the clean loss is along a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmdefense.plots.base import Numbers, Panel, Plot
from mmdefense.plots.colors import AFTER, ATTACK
from mmdefense.plots.loss_smoothness import spectral_density
from mmdefense.plots.panels import Curve, Curves

__all__ = ["SmoothnessCourse"]


@dataclass(frozen=True, eq=False)
class SmoothnessCourse(Plot):
    """Curvature of the clean loss, ACC and ASR over the updates of a training.

    Attributes:
        steps: Updates done at each point, ``(T,)``.
        acc: ACC at each, ``(T,)`` in ``[0, 1]``.
        asr: ASR at each, ``(T,)`` in ``[0, 1]``; none of a clean model.
        lambda_max: Largest eigenvalue of the Hessian at each, ``(T,)``.
        trace: Trace of the Hessian at each, ``(T,)``.
        spectra: Nodes and weights of the spectrum at some of them, by name.
    """

    steps: Numbers
    acc: Numbers
    asr: Numbers | None
    lambda_max: Numbers
    trace: Numbers
    spectra: Mapping[str, tuple[Numbers, Numbers]]

    title = "Loss smoothness along the training"
    wide = True

    @property
    def caption(self) -> str:
        """How to read it, with the rates that are shown."""
        rates = "ACC" if self.asr is None else "ACC and ASR"
        return (
            f"Curvature of the clean loss after a number of updates, beside {rates} (FIP, "
            "arXiv:2409.00863, Fig. 1 and 3). The density is how many eigenvalues of the Hessian "
            "lie where."
        )

    def panels(self) -> list[Panel]:
        """Return the rates, the curvature and the spectra."""
        rates = [Curve("ACC", self.steps, self.acc, AFTER)]
        if self.asr is not None:
            rates.append(Curve("ASR", self.steps, self.asr, ATTACK))
        curvature = [
            Curve("λmax", self.steps, self.lambda_max),
            Curve("Tr(H)", self.steps, self.trace),
        ]
        return [
            Curves(rates, "updates", "rate", percent="y"),
            Curves(curvature, "updates", "curvature (log)", log=True),
            spectral_density(self.spectra),
        ]
