"""Tiny point cloud models with random weights, one row per family, and clouds for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmdefense_tasks.point_victims import DGCNN, PointNet, PointNetPlusPlus, PointTransformer

CLASSES, POINTS = 4, 24


class ChannelsFirst(nn.Module):
    """The layout and the answer of PointNet's released code."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 1)
        )
        self.classes = nn.Linear(12, CLASSES)

    def forward(self, points):
        return self.classes(self.features(points).amax(2)), torch.eye(3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pointnet": lambda: PointNet(CLASSES, width=4),
    "aligned-pointnet": lambda: PointNet(CLASSES, 5, width=4, align=True),
    "pointnet++": lambda: PointNetPlusPlus(CLASSES, 5, width=4),
    "dgcnn": lambda: DGCNN(CLASSES, width=4, neighbours=6),
    "point-transformer": lambda: PointTransformer(
        CLASSES, 4, width=8, patches=6, samples=5, layers=2, heads=2
    ),
    "channels-first": ChannelsFirst,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model ``name`` in eval mode, with weights drawn from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def clouds_for(model: nn.Module, count: int, seed: int = 2) -> Tensor:
    """Return clouds with as many values a point as ``model`` reads."""
    values = getattr(model, "features", 3)
    values = values if isinstance(values, int) else 3
    return torch.randn(count, POINTS, values, generator=torch.Generator().manual_seed(seed))
