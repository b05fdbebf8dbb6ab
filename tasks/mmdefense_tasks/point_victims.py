"""Point cloud classifiers to plant a backdoor in, in plain torch.

All map clouds ``(N, P, 3 + F)`` to logits ``(N, K)`` and are invariant to the order of the points.
The widths are small, for two CPU cores. A shared perceptron applies linear layers to all points at
once, with BatchNorm over points and clouds. Indices (sampled points, neighbours) have no gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.data.clouds import farthest_points, nearest_points

__all__ = ["DGCNN", "PointNet", "PointNetPlusPlus", "PointTransformer"]


class _PointModel(ABC, nn.Module):
    """A classifier of clouds whose points have ``features`` values, coordinates first."""

    reads: ClassVar[str] = "points"
    """Lets an adapter recognise the model."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, clouds: Tensor) -> Tensor:
        """Map clouds ``(N, P, 3 + F)`` to logits ``(N, K)``."""
        if clouds.ndim != 3 or clouds.shape[2] != self.features:
            raise ValueError(
                f"clouds must have {self.features} values per point, got {tuple(clouds.shape)}"
            )
        return self._logits(clouds)

    @abstractmethod
    def _logits(self, clouds: Tensor) -> Tensor:
        """Map clouds with the right number of features to logits ``(N, K)``."""


class _Shared(nn.Module):
    """One perceptron for every point: linear, BatchNorm, activation, layer by layer."""

    def __init__(self, *widths: int, slope: float = 0.0) -> None:
        super().__init__()
        self.slope = slope
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=False) for before, after in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths[1:])

    def forward(self, points: Tensor) -> Tensor:
        """Map ``(..., before)`` to ``(..., after)``."""
        hidden = points.flatten(0, -2)  # BatchNorm wants the channels second
        for layer, norm in zip(self.layers, self.norms, strict=True):
            hidden = F.leaky_relu(norm(layer(hidden)), self.slope)
        return hidden.view(*points.shape[:-1], hidden.shape[-1])


class _Head(nn.Sequential):
    """The classifier on top of a cloud's descriptor."""

    def __init__(self, width: int, hidden: Sequence[int], classes: int, dropout: float) -> None:
        super().__init__(
            _Shared(width, *hidden), nn.Dropout(dropout), nn.Linear((width, *hidden)[-1], classes)
        )


class _Alignment(nn.Module):
    """A T-Net: predicts a matrix for each cloud and applies it to its points."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.points = _Shared(size, width, 2 * width, 8 * width)
        self.cloud = _Shared(8 * width, 4 * width, 2 * width)
        self.matrix = nn.Linear(2 * width, size * size)
        nn.init.zeros_(self.matrix.weight)
        nn.init.zeros_(self.matrix.bias)

    def forward(self, points: Tensor) -> Tensor:
        size = points.shape[-1]
        change: Tensor = self.matrix(self.cloud(self.points(points).amax(1)))
        identity = torch.eye(size, device=points.device, dtype=points.dtype)
        return points @ (identity + change.view(-1, size, size))


class PointNet(_PointModel):
    """A shared perceptron and a maximum over the points.

    The paper's regularisation of the T-Nets is left out here.

    References:
        Qi, Su, Mo, Guibas. *PointNet: Deep Learning on Point Sets for 3D Classification and
        Segmentation*. CVPR 2017. arXiv:1612.00593
    """

    def __init__(
        self,
        classes: int,
        features: int = 3,
        width: int = 32,
        *,
        align: bool = False,
        dropout: float = 0.3,
    ) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            features: Values per point, 3 + F.
            width: Channels of the first layer; 64 in the paper.
            align: Whether T-Nets align coordinates and features, as in the paper's full net; its
                plain net ("vanilla") has none.
            dropout: Dropout rate of the last hidden units.
        """
        super().__init__(features)
        self.align_points = _Alignment(3, width) if align else None
        self.early = _Shared(features, width, width)
        self.align_features = _Alignment(width, width) if align else None
        self.late = _Shared(width, 2 * width, 8 * width)
        self.head = _Head(8 * width, (4 * width, 2 * width), classes, dropout)

    def _logits(self, clouds: Tensor) -> Tensor:
        if self.align_points is not None:
            clouds = torch.cat([self.align_points(clouds[..., :3]), clouds[..., 3:]], 2)
        hidden = self.early(clouds)
        if self.align_features is not None:
            hidden = self.align_features(hidden)
        return self.head(self.late(hidden).amax(1))  # type: ignore[no-any-return]


class _SetAbstraction(nn.Module):
    """Centers, the points in a ball around each, and a small PointNet over every ball."""

    def __init__(self, centers: int, radius: float, samples: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.centers, self.radius, self.samples = centers, radius, samples
        self.shared = _Shared(widths[0] + 3, *widths[1:])

    def forward(self, points: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centers ``(N, M, 3)`` and the descriptor of each, ``(N, M, C)``."""
        centers = _gather(points, farthest_points(points, min(self.centers, points.shape[1])))
        near = nearest_points(points, centers, min(self.samples, points.shape[1]))
        offsets = _gather(points, near) - centers[:, :, None]
        # Points outside the ball are replaced by the nearest, which does not change the maximum.
        outside = offsets.detach().norm(dim=3) > self.radius
        near = torch.where(outside, near[..., :1], near)
        offsets = torch.where(outside[..., None], offsets[:, :, :1], offsets)
        grouped = torch.cat([offsets / self.radius, _gather(values, near)], 3)
        return centers, self.shared(grouped).amax(2)


class PointNetPlusPlus(_PointModel):
    """PointNet over balls of points, twice, then over their features (single-scale grouping).

    If a ball has more points than are sampled, the nearest are kept; the released code keeps the
    first in file order.

    References:
        Qi, Yi, Su, Guibas. *PointNet++: Deep Hierarchical Feature Learning on Point Sets in a
        Metric Space*. NeurIPS 2017. arXiv:1706.02413
    """

    def __init__(
        self, classes: int, features: int = 3, width: int = 16, *, dropout: float = 0.3
    ) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            features: Values per point, 3 + F.
            width: Channels of the first layer; 64 in the paper.
            dropout: Dropout rate of the last hidden units.
        """
        super().__init__(features)
        self.small = _SetAbstraction(64, 0.3, 16, (features - 3, width, width, 2 * width))
        self.large = _SetAbstraction(16, 0.6, 16, (2 * width, 2 * width, 2 * width, 4 * width))
        self.whole = _Shared(4 * width + 3, 4 * width, 8 * width)
        self.head = _Head(8 * width, (4 * width,), classes, dropout)

    def _logits(self, clouds: Tensor) -> Tensor:
        points, values = self.small(clouds[..., :3], clouds[..., 3:])
        points, values = self.large(points, values)
        descriptor = self.whole(torch.cat([points, values], 2)).amax(1)
        return self.head(descriptor)  # type: ignore[no-any-return]


class DGCNN(_PointModel):
    """Edge convolutions, each over the neighbours of a point in the features so far.

    References:
        Wang, Sun, Liu, Sarma, Bronstein, Solomon. *Dynamic Graph CNN for Learning on Point
        Clouds*. ACM TOG 2019. arXiv:1801.07829
    """

    def __init__(
        self,
        classes: int,
        features: int = 3,
        width: int = 16,
        *,
        neighbours: int = 12,
        dropout: float = 0.3,
    ) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            features: Values per point, 3 + F.
            width: Channels of the first edge convolution; 64 in the paper.
            neighbours: Number k of neighbours of each point, including itself; 20 in the paper.
            dropout: Dropout rate of the last hidden units.
        """
        super().__init__(features)
        self.neighbours = neighbours
        widths = (features, width, width, 2 * width)
        self.edges = nn.ModuleList(
            _Shared(2 * before, after, slope=0.2) for before, after in pairwise(widths)
        )
        self.joined = _Shared(sum(widths[1:]), 8 * width, slope=0.2)
        self.head = _Head(16 * width, (4 * width,), classes, dropout)

    def _logits(self, clouds: Tensor) -> Tensor:
        hidden, found = clouds, []
        for edges in self.edges:
            near = nearest_points(hidden, hidden, min(self.neighbours, clouds.shape[1]))
            own = hidden[:, :, None].expand(-1, -1, near.shape[2], -1)
            hidden = edges(torch.cat([own, _gather(hidden, near) - own], 3)).amax(2)
            found.append(hidden)
        joined = self.joined(torch.cat(found, 2))
        return self.head(torch.cat([joined.amax(1), joined.mean(1)], 1))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    """Multi-head self-attention over tokens ``(N, L, D)``."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*split.unbind())
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = _Attention(size, heads)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))  # type: ignore[no-any-return]


class PointTransformer(_PointModel):
    """A plain transformer whose tokens are patches of the surface.

    A small PointNet turns each of M centers and its nearest points into a token; the position
    embedding is computed from the center. The tokens' mean and maximum are classified.

    References:
        Yu, Tang, Rao, Huang, Zhou, Lu. *Point-BERT: Pre-training 3D Point Cloud Transformers with
        Masked Point Modeling*. CVPR 2022. arXiv:2111.14819 (its backbone, without pre-training)
    """

    def __init__(
        self,
        classes: int,
        features: int = 3,
        width: int = 48,
        *,
        patches: int = 32,
        samples: int = 16,
        layers: int = 3,
        heads: int = 4,
    ) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            features: Values per point, 3 + F.
            width: Size D of a token, a multiple of ``heads``.
            patches: Tokens M.
            samples: Points in a patch.
            layers: Number of transformer blocks.
            heads: Attention heads in each block.
        """
        super().__init__(features)
        self.patches, self.samples = patches, samples
        self.embed = _Shared(features, width, width)
        self.place = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(2 * width, classes)

    def _logits(self, clouds: Tensor) -> Tensor:
        points = clouds[..., :3]
        centers = _gather(points, farthest_points(points, min(self.patches, points.shape[1])))
        near = nearest_points(points, centers, min(self.samples, points.shape[1]))
        offsets = _gather(points, near) - centers[:, :, None]
        patches = torch.cat([4 * offsets, _gather(clouds[..., 3:], near)], 3)
        tokens = self.embed(patches).amax(2) + self.place(centers)
        tokens = self.norm(self.blocks(tokens))
        return self.head(torch.cat([tokens.amax(1), tokens.mean(1)], 1))  # type: ignore[no-any-return]


def _gather(values: Tensor, indices: Tensor) -> Tensor:
    """Return values ``(N, P, C)`` at ``indices`` ``(N, ...)``, shape ``(N, ..., C)``."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, values.shape[2])
    return values.gather(1, flat).view(*indices.shape, values.shape[2])
