"""Geometry of point clouds that attacks, adapters and tasks share.

A batch of clouds has shape ``(N, P, 3 + F)``: coordinates first, z up, then F features of each
point, which are carried along and never changed. A cloud is a set: the order of its points has no
meaning.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdefense.errors import BadInputError

__all__ = [
    "check_clouds",
    "farthest_points",
    "inserted",
    "nearest_points",
    "random_cloud_view",
    "random_jitter",
    "rotations",
    "to_unit_sphere",
    "turned",
]

_REACH = (
    1.3  # our choice; how far out a view puts noise, in radii: beyond the surface on every side
)


def check_clouds(clouds: Tensor, name: str = "clouds") -> None:
    """Refuse anything that is not a batch of clouds.

    Raises:
        BadInputError: If the shape is not ``(N, P, 3 + F)``, there is no point, or a value is not
            finite.
    """
    if clouds.ndim != 3 or clouds.shape[2] < 3 or not clouds.is_floating_point():
        raise BadInputError(
            f"{name} must be floating-point, of shape (N, P, 3 + F), got {clouds.dtype} of shape "
            f"{tuple(clouds.shape)}"
        )
    if clouds.shape[1] == 0:
        raise BadInputError(f"{name} must have at least one point each, got empty clouds")
    if len(damaged := (~clouds.isfinite()).flatten(1).any(1).nonzero()):
        raise BadInputError(
            f"{name} must be finite, got NaN or infinity in {len(damaged)} of {len(clouds)}, "
            f"first in cloud {int(damaged[0])}; remove those points"
        )


def to_unit_sphere(clouds: Tensor) -> Tensor:
    """Return clouds with their centroid at 0 and their farthest point at distance 1."""
    points = clouds[..., :3]
    points = points - points.mean(1, keepdim=True)
    radius = points.norm(dim=2).amax(1).clamp(min=1e-9)
    return torch.cat([points / radius[:, None, None], clouds[..., 3:]], 2)


def rotations(angles: Tensor) -> Tensor:
    """Return ``Rz Ry Rx`` for angles about x, y and z in radians: ``(..., 3)`` to ``(..., 3, 3)``.

    Points are rows, and are turned by ``points @ matrix.mT``.
    """
    cos, sin = angles.cos(), angles.sin()
    zero, one = torch.zeros_like(cos[..., 0]), torch.ones_like(cos[..., 0])
    (cx, cy, cz), (sx, sy, sz) = cos.unbind(-1), sin.unbind(-1)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, -1).reshape(*cos.shape[:-1], 3, 3)

    about_x = matrix(one, zero, zero, zero, cx, -sx, zero, sx, cx)
    about_y = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    about_z = matrix(cz, -sz, zero, sz, cz, zero, zero, zero, one)
    return about_z @ about_y @ about_x


def turned(clouds: Tensor, angles: Tensor) -> Tensor:
    """Return clouds turned about the origin by ``angles`` ``(N, 3)`` or ``(3,)``, in radians."""
    return torch.cat([clouds[..., :3] @ rotations(angles).mT, clouds[..., 3:]], -1)


def inserted(clouds: Tensor, cluster: Tensor, places: Tensor) -> Tensor:
    """Return clouds with the points at ``places`` moved to a cluster.

    A cloud keeps its number of points, so that a batch stays rectangular: the moved points are
    those that the inserted ones replace, and lend them their features.

    Args:
        clouds: Shape ``(N, P, 3 + F)``.
        cluster: Coordinates of the k new points, ``(N, k, 3)``.
        places: Which points are replaced, ``(N, k)``.
    """
    points = clouds[..., :3].scatter(1, places[..., None].expand(-1, -1, 3), cluster)
    return torch.cat([points, clouds[..., 3:]], 2)


def nearest_points(points: Tensor, centers: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` points nearest to each center, nearest first.

    Args:
        points: Shape ``(N, P, D)``.
        centers: Shape ``(N, M, D)``.
        count: At most P.

    Returns:
        Shape ``(N, M, count)``, without grad.
    """
    with torch.no_grad():
        return torch.cdist(centers, points).topk(count, dim=2, largest=False).indices


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Return indices of points spread over each cloud, by farthest point sampling.

    The first is the point farthest from the centroid, so that nothing is drawn and the order of
    the points does not matter.

    Args:
        points: Coordinates, ``(N, P, 3)``.
        count: At most P.

    Returns:
        Shape ``(N, count)``, without grad.
    """
    points = points.detach()
    rows = torch.arange(len(points), device=points.device)
    distance = (points - points.mean(1, keepdim=True)).square().sum(2)
    chosen = [distance.argmax(1)]
    distance = torch.full_like(distance, math.inf)
    for _ in range(1, count):
        last = points[rows, chosen[-1]][:, None]
        distance = torch.minimum(distance, (points - last).square().sum(2))
        chosen.append(distance.argmax(1))
    return torch.stack(chosen, 1)


def random_jitter(
    clouds: Tensor, generator: torch.Generator, *, scale: float = 0.2, jitter: float = 0.01
) -> Tensor:
    """Return each cloud rescaled, with jittered points.

    The usual augmentation of those who train such models (PointNet and PointNet++).

    Args:
        clouds: Shape ``(N, P, 3 + F)``.
        generator: Source of the changes, on the device of the clouds.
        scale: Largest change of the logarithm of the size.
        jitter: Standard deviation of each coordinate, in radii of the cloud.
    """
    draw = _signed(generator, clouds, len(clouds), 1, 1)
    noise = torch.randn(clouds[..., :3].shape, generator=generator, device=clouds.device)
    points = clouds[..., :3] * (scale * draw).exp() + jitter * noise.clamp(-5, 5)
    return torch.cat([points, clouds[..., 3:]], 2)


def random_turn(clouds: Tensor, generator: torch.Generator) -> Tensor:
    """Return each cloud turned, rescaled and jittered as by :func:`random_cloud_view`, no more."""
    return random_cloud_view(clouds, generator, thin=0.0, erase=0.0, keep=0.0)


def random_cloud_view(
    clouds: Tensor,
    generator: torch.Generator,
    *,
    degrees: float = 15.0,
    scale: float = 0.1,
    jitter: float = 0.01,
    thin: float = 0.3,
    erase: float = 0.8,
    keep: float = 0.1,
) -> Tensor:
    """Return each cloud randomly rotated, scaled, thinned out and partly replaced.

    The views "insertions" of clouds. The sizes are our choice.

    Args:
        clouds: Shape ``(N, P, 3 + F)``, in the unit sphere.
        generator: Source of the changes, on the device of the clouds.
        degrees: Largest rotation about the vertical axis; a third of it about the others.
        scale: Largest change of the logarithm of the size.
        jitter: Standard deviation of each coordinate.
        thin: Largest share of the points that are dropped; others stand there twice.
        erase: Share of the clouds in which a patch of the surface, up to a quarter of the points,
            becomes a ball of noise somewhere else (random erasing).
        keep: Share of the clouds that stay as they are.
    """
    angles = _signed(generator, clouds, len(clouds), 3) * math.radians(degrees)
    angles = angles * angles.new_tensor([1 / 3, 1 / 3, 1.0])
    viewed = _thinned(clouds, generator, thin)
    viewed = turned(random_jitter(viewed, generator, scale=scale, jitter=jitter), angles)
    viewed = _erased(viewed, generator, erase)
    kept = torch.rand(len(clouds), 1, 1, generator=generator, device=clouds.device) < keep
    return torch.where(kept, clouds, viewed)


def _signed(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    """Return numbers drawn uniformly from ``[-1, 1]``."""
    return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype) * 2 - 1


def _thinned(clouds: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Replace up to a ``share`` of the points of each cloud by copies of others of its points."""
    count, points = clouds.shape[:2]
    draw = torch.rand(2, count, points, generator=generator, device=clouds.device)
    most = torch.rand(count, 1, generator=generator, device=clouds.device) * share
    own = torch.arange(points, device=clouds.device).expand(count, -1)
    source = torch.where(draw[0] < most, (draw[1] * points).long(), own)
    return clouds.gather(1, source[..., None].expand_as(clouds))


def _erased(clouds: Tensor, generator: torch.Generator, share: float) -> Tensor:
    """Gather the points nearest to a random one into a ball at a random place in or around."""
    count, points = clouds.shape[:2]
    draw = torch.rand(4, count, 1, generator=generator, device=clouds.device)
    seed = (draw[0] * points).long()[..., None].expand(-1, -1, 3)
    distance = (clouds[..., :3] - clouds[..., :3].gather(1, seed)).square().sum(2)
    rank = distance.argsort(1).argsort(1)
    hit = (rank < (1 / 32 + draw[1] * 7 / 32) * points) & (draw[2] < share)
    place = _REACH * _in_ball(clouds, generator, count, 1)
    ball = place + (0.05 + 0.25 * draw[3][..., None]) * _in_ball(clouds, generator, count, points)
    moved = torch.where(hit[..., None], ball, clouds[..., :3])
    return torch.cat([moved, clouds[..., 3:]], 2)


def _in_ball(like: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Return points drawn uniformly from the unit ball, shape ``(*shape, 3)``."""
    direction = torch.randn(*shape, 3, generator=generator, device=like.device, dtype=like.dtype)
    radius = torch.rand(*shape, 1, generator=generator, device=like.device, dtype=like.dtype)
    unit: Tensor = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    return unit * radius ** (1 / 3)
