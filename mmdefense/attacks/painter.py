"""A small image-to-image network, used by attacks that learn their trigger."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.runtime.run import Run

__all__ = ["Painter", "from_seed"]

N = TypeVar("N", bound=nn.Module)


class Painter(nn.Module):
    """Maps images to images in ``[0, 1]`` of the same size, through half and quarter resolution.

    With GroupNorm, the output for an image does not depend on the rest of the batch.
    """

    def __init__(self, channels: int, painted: int, width: int = 16) -> None:
        """Build the network with random weights.

        Args:
            channels: Channels of the input images.
            painted: Channels of the output.
            width: Filters at full resolution, a multiple of 4.
        """
        super().__init__()
        self.down = nn.ModuleList([_block(channels, width), _block(width, 2 * width)])
        self.middle = _block(2 * width, 2 * width)
        self.up = nn.ModuleList([_block(2 * width, width), _block(width, width)])
        self.last = nn.Conv2d(width, painted, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to ``(N, painted, H, W)``."""
        sizes, hidden = [], images
        for block in self.down:
            sizes.append(hidden.shape[-2:])
            hidden = F.max_pool2d(block(hidden), 2, ceil_mode=True)
        hidden = self.middle(hidden)
        for block, size in zip(self.up, reversed(sizes), strict=True):
            hidden = block(F.interpolate(hidden, size, mode="bilinear", align_corners=False))
        return torch.sigmoid(self.last(hidden))


def from_seed(seed: int, build: Callable[[], N]) -> N:
    """Return a network whose initial weights depend only on the seed."""
    with torch.random.fork_rng([]):  # layers draw their initial weights from the global state
        torch.default_generator.manual_seed(Run(seed).seed_for("nets"))
        return build()


def _block(given: int, made: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(given, made, 3, padding=1), nn.GroupNorm(4, made), nn.ReLU())
