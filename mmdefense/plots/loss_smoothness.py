"""How sharp the minimum of the clean loss is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmdefense.plots.base import Array, Numbers, Panel, Plot, as_array
from mmdefense.plots.colors import AFTER, BEFORE
from mmdefense.plots.panels import Bars, Curve, Curves

__all__ = ["LossSmoothness", "density", "spectral_density"]

_SPECTRUM = (
    " The density is how many of the eigenvalues lie where, by Lanczos quadrature (Ghorbani et "
    "al., arXiv:1901.10159): almost all are close to zero, and the few far to the right are the "
    "sharp directions; left of zero the loss curves down. Single humps are nodes of the quadrature."
)


@dataclass(frozen=True, eq=False)
class LossSmoothness(Plot):
    """The curvature of the clean loss at the weights of some models, such as before and after.

    Attributes:
        models: What each model is.
        trace: Trace of the Hessian of each, ``(M,)``.
        lambda_max: Largest eigenvalue of the Hessian of each; none where it was not measured.
        spectra: How all eigenvalues are spread, by model: nodes and weights, each ``(Q,)``, as
            :class:`~mmdefense.kernels.curvature.HessianSpectrum` has them.
        trace_error: Standard error of each trace; NaN, or none, where it is not known.
    """

    models: Sequence[str]
    trace: Numbers
    lambda_max: Numbers | None = None
    spectra: Mapping[str, tuple[Numbers, Numbers]] | None = None
    trace_error: Numbers | None = None

    title = "Loss smoothness"

    @property
    def caption(self) -> str:
        """How to read the bars and, where there is one, the spectrum."""
        errors = self.trace_error is not None and np.isfinite(as_array(self.trace_error)).any()
        return (
            "Curvature of the clean loss at the model's weights; smaller is smoother. Backdoored "
            "models were found to sit in sharper minima than clean ones (FIP, arXiv:2409.00863). "
            "The scale depends on the model: compare it with itself alone."
            f"{' Behind the ± stands the standard error over several probes.' if errors else ''}"
            f"{_SPECTRUM if self.spectra else ''}"
        )

    @property
    def wide(self) -> bool:
        """Whether there is a spectrum, or more than two models."""
        return bool(self.spectra) or len(self.models) > 2

    def panels(self) -> list[Panel]:
        """Return bars of the largest eigenvalue and the trace, and the spectrum."""
        name = "Tr(H): trace of the Hessian"
        found: list[Panel] = [Bars(self.models, self.trace, name, self.trace_error)]
        if self.lambda_max is not None:
            name = "λmax: largest eigenvalue of the Hessian"
            found.insert(0, Bars(self.models, self.lambda_max, name))
        if self.spectra:
            found.append(spectral_density(self.spectra))
        return found


def spectral_density(spectra: Mapping[str, tuple[Numbers, Numbers]]) -> Curves:
    """Return the density of the eigenvalues of the Hessian, a line for each spectrum.

    The nodes are smoothed by Gaussians a hundredth as wide as all of them together.

    Args:
        spectra: Nodes and weights by name, each ``(Q,)``.
    """
    every = np.concatenate([as_array(nodes) for nodes, _ in spectra.values()])
    width = max(float(np.ptp(every)) / 100, 1e-9)
    grid = np.linspace(every.min() - 4 * width, every.max() + 4 * width, 300)
    colors = {"before": BEFORE, "after": AFTER}
    return Curves(
        [
            Curve(name, grid, density(nodes, weights, grid, width), colors.get(name, ""))
            for name, (nodes, weights) in spectra.items()
        ],
        "eigenvalue of the Hessian",
        "density (log)",
        log=True,
    )


def density(nodes: Numbers, weights: Numbers, grid: Array, width: float) -> Array:
    """Return the density of a spectrum at each point of ``grid``, with Gaussians for the nodes.

    Args:
        nodes: Eigenvalues, ``(Q,)``.
        weights: Share of all eigenvalues that each stands for, ``(Q,)``.
        grid: Points, shape ``(P,)``.
        width: Standard deviation of the Gaussians, in units of the eigenvalues, above zero.

    Returns:
        Shape ``(P,)``.
    """
    apart = (grid[:, None] - as_array(nodes)) / width
    heights = np.exp(-0.5 * apart**2) / (width * np.sqrt(2 * np.pi))
    found: Array = heights @ as_array(weights)
    return found
