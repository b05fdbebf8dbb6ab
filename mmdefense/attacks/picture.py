"""A picture to use as a trigger, drawn by code so that none has to be shipped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cartoon_cat"]

_FINE = 4  # supersampling factor, for smooth edges

_SKY, _GRASS, _SUN = (0.55, 0.80, 0.98), (0.35, 0.70, 0.30), (1.0, 0.90, 0.25)
_FUR, _STRIPE, _PALE = (0.98, 0.62, 0.20), (0.75, 0.35, 0.08), (1.0, 0.95, 0.85)
_LINE, _NOSE, _EYE = (0.10, 0.08, 0.10), (0.90, 0.35, 0.45), (0.30, 0.75, 0.35)
_GREY = (0.299, 0.587, 0.114)


def cartoon_cat(channels: int, height: int, width: int) -> Tensor:
    """Return a ginger cat on a meadow, shape ``(C, H, W)``, in ``[0, 1]``.

    Args:
        channels: With three, the picture is in colour; otherwise each channel is a grey version.
        height: Rows of pixels.
        width: Columns of pixels.
    """
    y, x = torch.meshgrid(
        (torch.arange(_FINE * height) + 0.5) / (_FINE * height),
        (torch.arange(_FINE * width) + 0.5) / (_FINE * width),
        indexing="ij",
    )
    side = (x - 0.5).abs()  # the cat is symmetric
    picture = torch.tensor(_SKY)[:, None, None].expand(3, *y.shape)

    def paint(where: Tensor, colour: tuple[float, float, float]) -> None:
        nonlocal picture
        picture = torch.where(where, torch.tensor(colour)[:, None, None], picture)

    def ellipse(across: Tensor, cx: float, cy: float, rx: float, ry: float) -> Tensor:
        return ((across - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

    paint(y > 0.75, _GRASS)
    paint(ellipse(x, 0.0, 0.0, 0.2, 0.2), _SUN)
    for border, colour in ((0.02, _LINE), (0.0, _FUR)):
        slope = (y - 0.08 + 2 * border) / 0.34
        ear = (side - 0.27).abs() < 0.14 * slope + border
        paint(ear & (slope > 0) & (y < 0.4), colour)
        paint(ellipse(side, 0.0, 0.98, 0.27 + border, 0.3 + border), colour)
        paint(ellipse(side, 0.0, 0.5, 0.4 + border, 0.3 + border), colour)
    paint((side % 0.1 < 0.04) & (side < 0.14) & (y > 0.22) & (y < 0.36), _STRIPE)
    paint((side > 0.3) & (side < 0.38) & ((y - 0.5) % 0.1 < 0.04) & (y > 0.5) & (y < 0.64), _STRIPE)
    paint(ellipse(side, 0.0, 0.66, 0.16, 0.11), _PALE)
    paint(ellipse(side, 0.0, 1.0, 0.14, 0.14), _PALE)
    paint(ellipse(side, 0.17, 0.46, 0.075, 0.085), _EYE)
    paint(ellipse(side, 0.17, 0.46, 0.03, 0.08), _LINE)
    paint(ellipse(side, 0.0, 0.6, 0.05, 0.035), _NOSE)
    paint((side > 0.14) & (side < 0.5) & ((y - 0.66 - 0.2 * side).abs() < 0.01), _LINE)
    small = F.avg_pool2d(picture[None], _FINE)[0]
    if channels == 3:
        return small
    grey = (torch.tensor(_GREY)[:, None, None] * small).sum(0)
    return grey.expand(channels, -1, -1)
