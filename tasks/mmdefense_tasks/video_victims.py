"""Video classifiers to plant a backdoor in: a small 3-D residual net and a video transformer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SmallVideoResNet", "videomae_classifier"]


class SmallVideoResNet(nn.Module):
    """A residual net of (2+1)D convolutions that two CPU cores train in a minute on small clips.

    Each spatiotemporal convolution is split into one over space and one over time, with BatchNorm
    and ReLU between them (Tran et al., *A Closer Look at Spatiotemporal Convolutions*, arXiv
    1711.11248). The stem and each stage but the first halve the spatial resolution; the temporal
    resolution is kept, so that short clips are sufficient.
    """

    def __init__(self, classes: int, channels: int = 3, width: int = 16, stages: int = 3) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            channels: Number of channels C of a frame.
            width: Filters of the first stage; each stage has twice as many as the one before.
            stages: Number of stages, each of one block.
        """
        super().__init__()
        widths = [width * 2**stage for stage in range(stages)]
        self.stem = _Conv2Plus1d(channels, width, 2)
        self.stages = nn.Sequential(
            *(
                _Block(before, after, 1 if stage == 0 else 2)
                for stage, (before, after) in enumerate(zip([width, *widths], widths, strict=False))
            )
        )
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips ``(N, C, T, H, W)`` to logits ``(N, K)``."""
        hidden = self.stages(F.relu(self.stem(clips)))
        return self.linear(hidden.mean((2, 3, 4)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """A (2+1)D convolution and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv = _Conv2Plus1d(before, after, stride)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv3d(before, after, 1, (1, stride, stride), bias=False), nn.BatchNorm3d(after)
            )

    def forward(self, clips: Tensor) -> Tensor:
        return F.relu(self.conv(clips) + self.shortcut(clips))


class _Conv2Plus1d(nn.Module):
    """A convolution of 3x3 pixels, then one of 3 frames, each with BatchNorm, ReLU between."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(
            before, after, (1, 3, 3), (1, stride, stride), padding=(0, 1, 1), bias=False
        )
        self.space_bn = nn.BatchNorm3d(after)
        self.time = nn.Conv3d(after, after, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.time_bn = nn.BatchNorm3d(after)

    def forward(self, clips: Tensor) -> Tensor:
        hidden = F.relu(self.space_bn(self.space(clips)))
        return self.time_bn(self.time(hidden))  # type: ignore[no-any-return]


def videomae_classifier(
    classes: int,
    image_size: int,
    frames: int,
    channels: int = 3,
    *,
    patch: int = 8,
    tubelet: int = 2,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
) -> nn.Module:
    """Return a small ``transformers.VideoMAEForVideoClassification`` with random weights.

    Args:
        classes: Number of classes K.
        image_size: Side of the square frames in pixels, a multiple of ``patch``.
        frames: Number of frames T, a multiple of ``tubelet``.
        channels: Number of channels C of a frame.
        patch: Side of a patch in pixels.
        tubelet: Frames per patch.
        hidden: Features per token, a multiple of ``heads``.
        layers: Number of transformer blocks.
        heads: Attention heads in each block.
    """
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=image_size,
        num_frames=frames,
        num_channels=channels,
        patch_size=patch,
        tubelet_size=tubelet,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_labels=classes,
    )
    model: nn.Module = VideoMAEForVideoClassification(config)
    # The library's initialisation suits models ten times as wide; this small one hardly learns.
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model
