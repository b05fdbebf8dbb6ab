"""Tiny models with random weights, one row per family that the image adapters serve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mmdefense_tasks.victims import PreActResNet18, SmallResNet, vit_classifier

CLASSES, SIDE = 4, 16


def plain_cnn() -> nn.Module:
    """Neither BatchNorm nor a module for the pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.ReLU(),
        nn.Linear(12, CLASSES),
    )


class EncoderClassifier(nn.Module):
    """``nn.TransformerEncoder`` over the rows of an image: fused attention, bare weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * SIDE, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images):
        rows = images.transpose(1, 2).flatten(2)
        return self.head(self.encoder(self.embed(rows)).mean(1))


def fully_convolutional() -> nn.Module:
    """Its classes are filters, pooled at the end."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, CLASSES, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def torchvision_resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=CLASSES)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(SIDE, 4, 2, 2, 16, 32, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)
    return model


def torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 8, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)


def timm_vit() -> nn.Module:
    from timm import create_model

    return create_model(
        "vit_tiny_patch16_224",
        img_size=SIDE,
        patch_size=4,
        depth=2,
        embed_dim=16,
        num_heads=2,
        num_classes=CLASSES,
    )


def hf_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config)


def hf_convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, num_labels=CLASSES
    )
    return ConvNextForImageClassification(config)


def hf_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=SIDE,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
        num_labels=CLASSES,
    )
    return SwinForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small-resnet": lambda: SmallResNet(CLASSES, width=4),
    "preact-resnet18": lambda: PreActResNet18(CLASSES, width=4),
    "cnn-without-batchnorm": plain_cnn,
    "fully-convolutional": fully_convolutional,
    "transformer-encoder": EncoderClassifier,
    "torchvision-resnet18": torchvision_resnet18,
    "torchvision-vit": torchvision_vit,
    "torchvision-swin": torchvision_swin,
    "timm-vit": timm_vit,
    "hf-vit": lambda: vit_classifier(CLASSES, SIDE, hidden=16, layers=2, heads=2),
    "hf-resnet": hf_resnet,
    "hf-convnext": hf_convnext,
    "hf-swin": hf_swin,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model ``name`` in eval mode, with weights drawn from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()
