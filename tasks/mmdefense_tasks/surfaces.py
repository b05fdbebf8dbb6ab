"""Eight kinds of surfaces as point clouds, generated from a seed: data that needs no download."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmdefense.data.clouds import to_unit_sphere, turned
from mmdefense.data.labelled import LabelledSamples

__all__ = ["KINDS", "draw_surfaces"]

_DENSITY = 4  # points drawn per kept point, so that a part can be cut away
_HIDDEN = 0.4  # largest hidden fraction of a surface
_TILT = math.radians(20)
_OUTLIERS = 0.02  # fraction of outliers


def draw_surfaces(count: int, points: int, seed: int) -> LabelledSamples:
    """Return clouds ``(count, points, 3)`` in the unit sphere, cycling through the kinds.

    Each surface has random proportions, is rotated about the vertical and tilted, is only partly
    visible, and has noise and a few outliers; so similar kinds, such as a cone and a cylinder that
    are largely hidden, are hard to distinguish.

    Args:
        count: Number of clouds.
        points: Points per cloud.
        seed: Random seed.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(KINDS)
    clouds = torch.empty(count, _DENSITY * points, 3)
    for label, draw in enumerate(KINDS.values()):
        mine = labels == label
        clouds[mine] = draw(torch.rand(int(mine.sum()), _DENSITY * points, 4, generator=generator))
    clouds = _posed(clouds, generator)
    clouds = _seen(clouds, points, generator)
    return LabelledSamples(
        to_unit_sphere(_noisy(clouds, generator)),
        labels,
        classes=tuple(KINDS),
    )


def _posed(clouds: Tensor, generator: torch.Generator) -> Tensor:
    """Stretch each cloud along its axes, and rotate it."""
    draw = torch.rand(2, len(clouds), 3, generator=generator) * 2 - 1
    angles = draw[1] * torch.tensor([_TILT, _TILT, math.pi])
    return turned(clouds * (0.35 * draw[0]).exp()[:, None], angles)


def _seen(clouds: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """Remove the points farthest along a random direction, and keep ``points`` of the rest."""
    direction = torch.randn(len(clouds), 3, 1, generator=generator)
    share = 1 - _HIDDEN * torch.rand(len(clouds), 1, generator=generator)
    total = clouds.shape[1]
    rank = (clouds @ direction).squeeze(2).argsort(1).argsort(1)
    order = torch.rand(len(clouds), total, generator=generator)
    order = torch.where(rank < share * total, order, 2.0).argsort(1)[:, :points]
    return clouds.gather(1, order[..., None].expand(-1, -1, 3))


def _noisy(clouds: Tensor, generator: torch.Generator) -> Tensor:
    radius = clouds.norm(dim=2).mean(1)[:, None, None]
    noise = 0.03 * torch.randn(clouds.shape, generator=generator)
    stray = 1.1 * (torch.rand(clouds.shape, generator=generator) * 2 - 1)
    is_stray = torch.rand(*clouds.shape[:2], 1, generator=generator) < _OUTLIERS
    return torch.where(is_stray, stray, clouds / radius + noise)


# Each of these maps uniform numbers (N, P, 4) to points (N, P, 3) of about unit size.


def _sphere(u: Tensor) -> Tensor:
    height, turn = 2 * u[..., 0] - 1, 2 * math.pi * u[..., 1]
    return _ring((1 - height**2).sqrt(), turn, height)


def _box(u: Tensor) -> Tensor:
    points = 2 * u[..., :3] - 1
    face = (6 * u[..., 3]).long()
    axis = (face // 2)[..., None]
    side = (2.0 * (face % 2) - 1)[..., None]
    return points.scatter(2, axis, side) * 0.75


def _cylinder(u: Tensor) -> Tensor:
    """A tube with both lids, which make up a third of its area."""
    turn, height = 2 * math.pi * u[..., 1], 2 * u[..., 0] - 1
    on_lid = u[..., 3] < 1 / 3
    radius = torch.where(on_lid, u[..., 2].sqrt(), 1.0)
    return _ring(0.7 * radius, turn, torch.where(on_lid, height.sign(), height))


def _cone(u: Tensor) -> Tensor:
    """A cone with its base."""
    turn, down = 2 * math.pi * u[..., 1], u[..., 0].sqrt()
    on_base = u[..., 3] < 0.3
    height = torch.where(on_base, torch.ones_like(down), down)
    return _ring(0.9 * down, turn, 1 - 2 * height)


def _torus(u: Tensor) -> Tensor:
    turn, around = 2 * math.pi * u[..., 0], 2 * math.pi * u[..., 1]
    return _ring(0.85 + 0.3 * around.cos(), turn, 0.3 * around.sin())


def _saddle(u: Tensor) -> Tensor:
    x, y = (2 * u[..., :2] - 1).unbind(-1)
    return torch.stack([x, y, 0.7 * (x**2 - y**2)], -1)


def _bowl(u: Tensor) -> Tensor:
    radius, turn = u[..., 0].sqrt(), 2 * math.pi * u[..., 1]
    return _ring(radius, turn, 1.2 * radius**2 - 0.6)


def _helix(u: Tensor) -> Tensor:
    """A tube of two turns."""
    along, around = u[..., 0], 2 * math.pi * u[..., 1]
    return _ring(0.75 + 0.15 * around.cos(), 4 * math.pi * along, 1.6 * along - 0.8) + _ring(
        torch.zeros_like(around), around, 0.15 * around.sin()
    )


def _ring(radius: Tensor, turn: Tensor, height: Tensor) -> Tensor:
    return torch.stack([radius * turn.cos(), radius * turn.sin(), height], -1)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sphere": _sphere,
    "box": _box,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "saddle": _saddle,
    "bowl": _bowl,
    "helix": _helix,
}
"""The kinds of surfaces, in the order of their labels."""
