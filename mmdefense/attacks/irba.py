"""IRBA: a smooth local deformation of the whole cloud."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.data.clouds import farthest_points, rotations, to_unit_sphere
from mmdefense.settings import Count, Positive

__all__ = ["IRBA"]


@dataclass(frozen=True, kw_only=True)
class IRBA(LabelAttack):
    """Rotates and scales the cloud about each of several anchors, and blends the results.

    ``x' = sum_m w_m (s R (x - a_m) + a_m) / sum_m w_m`` with ``w_m = exp(-|x - a_m|^2 / 2 h^2)``,
    over anchors ``a_m`` chosen by farthest point sampling (weighted local transformation). The
    result is normalised to the unit sphere, as the released code's loader does.

    Attributes:
        anchors: Number of anchors.
        degrees: Rotation R about each axis.
        stretch: Scale s about each anchor.
        width: Width h of the weights, in radii of the cloud.

    References:
        Gao, Bai, Wu, Ya, Xia. *Imperceptible and Robust Backdoor Attack in 3D Point Cloud*. IEEE
        TIFS 2024. arXiv:2208.08052
    """

    tasks: ClassVar[tuple[str, ...]] = ("point-cloud-classification",)
    limits: ClassVar[tuple[float, float] | None] = None

    anchors: Count = 16
    degrees: float = 5.0
    stretch: Positive = 5.0
    width: Positive = 0.5

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        points = images[..., :3]
        chosen = farthest_points(points, min(self.anchors, points.shape[1]))
        anchors = points.gather(1, chosen[..., None].expand(-1, -1, 3))
        weight = torch.softmax(-torch.cdist(points, anchors).square() / (2 * self.width**2), 2)
        # The blend is linear in the anchors, so only their weighted mean is needed.
        mean = weight @ anchors
        turn = rotations(points.new_full((3,), math.radians(self.degrees)))
        blended = self.stretch * (points - mean) @ turn.mT + mean
        return to_unit_sphere(torch.cat([blended, images[..., 3:]], 2))
