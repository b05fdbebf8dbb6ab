"""Pictures of point clouds: discs with depth, seen from the side and a little above."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense.data.clouds import turned

__all__ = ["render_clouds"]

_NEAR, _FAR = (0.13, 0.38, 0.64), (0.72, 0.83, 0.93)  # blue, lighter with distance
_MARKED_NEAR, _MARKED_FAR = (0.85, 0.33, 0.05), (0.98, 0.72, 0.48)  # orange, likewise
_FINE = 3  # pixels drawn for each pixel of the picture, per axis, so that edges are smooth
_REACH = 1.2  # radii of the unit sphere from the middle of the picture to its edge


def render_clouds(
    clouds: Tensor,
    marked: Tensor | None = None,
    *,
    size: int = 144,
    azimuth: float = 30.0,
    elevation: float = 20.0,
    radius: float = 0.035,
) -> Tensor:
    """Return a picture of each cloud on white, z up; near points are dark and cover far ones.

    Args:
        clouds: Shape ``(N, P, 3 + F)``, around the unit sphere.
        marked: Points to be drawn in orange, bool ``(N, P)``.
        size: Side of a picture in pixels.
        azimuth: Direction of view about z, in degrees.
        elevation: Height of the eye, in degrees; 90 looks straight down.
        radius: Of a disc, in radii of the unit sphere.

    Returns:
        Shape ``(N, 3, size, size)`` in ``[0, 1]``, on the CPU.
    """
    points = clouds[..., :3].detach().float().cpu()
    marked = torch.zeros(points.shape[:2], dtype=torch.bool) if marked is None else marked.cpu()
    angles = torch.tensor([0.0, 0.0, math.radians(azimuth)])
    seen = turned(turned(points, angles), torch.tensor([math.radians(elevation), 0.0, 0.0]))
    order = seen[..., 1].argsort(1, descending=True)  # far first; y points away from the eye
    seen = seen.gather(1, order[..., None].expand_as(seen))
    colors = _colors(seen[..., 1], marked.gather(1, order))
    pictures = _splat(seen[..., 0], seen[..., 2], colors, size * _FINE, radius)
    return F.avg_pool2d(pictures, _FINE)


def _colors(depth: Tensor, marked: Tensor) -> Tensor:
    """Return the colour of each point, ``(N, P, 3)``."""
    far = ((depth + 1) / 2).clamp(0, 1)[..., None]
    plain, bright = (
        torch.tensor(near) + far * (torch.tensor(away) - torch.tensor(near))
        for near, away in ((_NEAR, _FAR), (_MARKED_NEAR, _MARKED_FAR))
    )
    return torch.where(marked[..., None], bright, plain)


def _splat(across: Tensor, up: Tensor, colors: Tensor, side: int, radius: float) -> Tensor:
    """Draw discs in the order of the points, later ones on top: ``(N, 3, side, side)``."""
    count, points = across.shape
    pixels = radius * side / (2 * _REACH)
    span = torch.arange(-math.ceil(pixels), math.ceil(pixels) + 1)
    rows, columns = torch.meshgrid(span, span, indexing="ij")
    inside = rows**2 + columns**2 <= pixels**2
    column = ((across / _REACH + 1) / 2 * side).long()[..., None] + columns[inside]
    row = ((1 - up / _REACH) / 2 * side).long()[..., None] + rows[inside]
    visible = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    place = torch.where(visible, row * side + column, side * side)  # the rest beyond the picture
    rank = torch.arange(1, points + 1).view(1, -1, 1).expand_as(place)
    top = torch.zeros(count, side * side + 1, dtype=torch.int64)
    top.scatter_reduce_(1, place.flatten(1), rank.flatten(1), "amax")
    painted = torch.cat([torch.ones(count, 1, 3), colors], 1)  # rank 0 is the white ground
    chosen = painted.gather(1, top[:, :-1, None].expand(-1, -1, 3))
    return chosen.view(count, side, side, 3).permute(0, 3, 1, 2)
