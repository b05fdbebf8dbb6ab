"""Image classifiers to plant a backdoor in: residual nets, a VGG and a vision transformer."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PreActResNet18", "SmallResNet", "SmallVGG", "vit_classifier"]


class SmallResNet(nn.Module):
    """A residual net that two CPU cores train in seconds on images of 16 to 32 pixels a side.

    Three stages of basic blocks, each stage half as large and twice as wide as the one before
    (He et al., *Deep Residual Learning*, section 4.2, arXiv 1512.03385).
    """

    def __init__(
        self, classes: int, channels: int = 3, width: int = 16, blocks: int = 1, cells: int = 1
    ) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            channels: Number of image channels C.
            width: Filters of the first stage.
            blocks: Basic blocks in each stage.
            cells: The last feature map is pooled to a grid with this many cells per side; 1 is the
                paper's global pooling. For aligned images, such as traffic signs, a few cells need
                far fewer training steps.
        """
        super().__init__()
        self.cells = cells
        self.conv = _conv3x3(channels, width, 1)
        self.bn = nn.BatchNorm2d(width)
        widths = [width * 2**stage for stage in range(3)]
        self.stages = nn.Sequential(
            *(
                _stage(_BasicBlock, before, after, blocks, 1 if stage == 0 else 2)
                for stage, (before, after) in enumerate(zip([width, *widths], widths, strict=False))
            )
        )
        self.linear = nn.Linear(widths[-1] * cells**2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        hidden = self.stages(F.relu(self.bn(self.conv(images))))
        if self.cells == 1:
            return self.linear(hidden.mean((2, 3)))  # type: ignore[no-any-return]
        return self.linear(F.adaptive_avg_pool2d(hidden, self.cells).flatten(1))  # type: ignore[no-any-return]


class SmallVGG(nn.Module):
    """A plain network of pairs of 3x3 convolutions with BatchNorm, without shortcuts.

    Each pair is followed by pooling by two, and the next pair is twice as wide (Simonyan and
    Zisserman, *Very Deep Convolutional Networks*, arXiv 1409.1556, with three scales and
    BatchNorm).
    """

    def __init__(self, classes: int, channels: int = 3, width: int = 16, size: int = 32) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            channels: Number of image channels C.
            width: Filters of the first pair.
            size: Height and width of the images, a multiple of 8.
        """
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            for given in (before, after):
                layers += [_conv3x3(given, after, 1), nn.BatchNorm2d(after), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * (size // 8) ** 2, 4 * widths[-1]),
            nn.ReLU(),
            nn.Linear(4 * widths[-1], classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, size, size)`` to logits ``(N, K)``."""
        return self.classifier(self.features(images).flatten(1))  # type: ignore[no-any-return]


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 for small images, with the layers and names of BackdoorBench.

    There is no BatchNorm and no ReLU before the pooling, so the embedding is signed, unlike in the
    original (He et al., *Identity Mappings*, arXiv 1603.05027). Its checkpoints can be loaded.
    """

    def __init__(self, classes: int, channels: int = 3, width: int = 64) -> None:
        """Build the net with random weights.

        Args:
            classes: Number of classes K.
            channels: Number of image channels C.
            width: Filters of the first stage.
        """
        super().__init__()
        self.conv1 = _conv3x3(channels, width, 1)
        self.layer1 = _stage(_PreActBlock, width, width, 2, 1)
        self.layer2 = _stage(_PreActBlock, width, 2 * width, 2, 2)
        self.layer3 = _stage(_PreActBlock, 2 * width, 4 * width, 2, 2)
        self.layer4 = _stage(_PreActBlock, 4 * width, 8 * width, 2, 2)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to logits ``(N, K)``."""
        hidden = self.conv1(images)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = layer(hidden)
        return self.linear(hidden.mean((2, 3)))  # type: ignore[no-any-return]


def vit_classifier(
    classes: int,
    image_size: int,
    channels: int = 3,
    *,
    patch: int = 4,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
) -> nn.Module:
    """Return a small ``transformers.ViTForImageClassification`` with random weights.

    Args:
        classes: Number of classes K.
        image_size: Side of the square images in pixels, a multiple of ``patch``.
        channels: Number of image channels C.
        patch: Side of a patch in pixels.
        hidden: Features per token, a multiple of ``heads``.
        layers: Number of transformer blocks.
        heads: Attention heads in each block.
    """
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        num_channels=channels,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_labels=classes,
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


class _BasicBlock(nn.Module):
    """Two convolutions, each with BatchNorm, and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(before, after, stride)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = _conv3x3(after, after, 1)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class _PreActBlock(nn.Module):
    """Two convolutions, each after BatchNorm and ReLU, and a shortcut from the first ReLU."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = _conv3x3(before, after, stride)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = _conv3x3(after, after, 1)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        active = F.relu(self.bn1(images))
        shortcut = images if self.shortcut is None else self.shortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))  # type: ignore[no-any-return]


def _conv3x3(before: int, after: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def _stage(
    block: type[_BasicBlock | _PreActBlock], before: int, after: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(before, after, stride)
    return nn.Sequential(first, *(block(after, after, 1) for _ in range(1, blocks)))
