"""Tiny video models with random weights, one row per family that the video adapters serve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mmdefense_adapters import pytorchvideo_models
from mmdefense_tasks.video_victims import SmallVideoResNet, videomae_classifier

CLASSES, FRAMES, SIDE = 4, 8, 16


def plain_conv3d() -> nn.Module:
    """Neither BatchNorm nor a module for the pooling."""
    return nn.Sequential(
        nn.Conv3d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv3d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def torchvision_r2plus1d() -> nn.Module:
    from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet

    # Its widths are fixed: stages are left out so that it is small.
    model = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [1, 1, 1, 1], R2Plus1dStem, CLASSES)
    model.layer2, model.layer3, model.layer4 = nn.Identity(), nn.Identity(), nn.Identity()
    model.fc = nn.Linear(64, CLASSES)
    return model


def torchvision_swin3d() -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d(
        [2, 4, 4], 8, [1, 1], [2, 2], [2, 2, 2], stochastic_depth_prob=0, num_classes=CLASSES
    )


def torchvision_mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 8, 16, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 16, 16, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return MViT((SIDE, SIDE), FRAMES, blocks, True, False, True, True, num_classes=CLASSES)


def x3d() -> nn.Module:
    return pytorchvideo_models.build(
        "x3d",
        input_clip_length=FRAMES,
        input_crop_size=32,
        model_num_class=CLASSES,
        width_factor=0.5,
        depth_factor=0.5,
        head_dim_out=16,
        dropout_rate=0.0,
    )


def slow() -> nn.Module:
    return pytorchvideo_models.build(
        "slow",
        model_depth=50,
        model_num_class=CLASSES,
        stem_dim_out=4,
        head_pool_kernel_size=(FRAMES, 1, 1),
        dropout_rate=0.0,
    )


def slowfast() -> nn.Module:
    return pytorchvideo_models.build(
        "slowfast",
        model_depth=18,
        model_num_class=CLASSES,
        stem_dim_outs=(8, 4),
        slowfast_channel_reduction_ratio=2,
        head_pool_kernel_sizes=((FRAMES // 4, 1, 1), (FRAMES, 1, 1)),
        dropout_rate=0.0,
    )


def mvit() -> nn.Module:
    return pytorchvideo_models.build(
        "mvit",
        spatial_size=SIDE,
        temporal_size=FRAMES,
        depth=2,
        patch_embed_dim=16,
        num_heads=2,
        head_num_classes=CLASSES,
        head_dropout_rate=0.0,
    )


def timesformer() -> nn.Module:
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    config = TimesformerConfig(
        image_size=SIDE,
        patch_size=8,
        num_frames=FRAMES,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=CLASSES,
    )
    return TimesformerForVideoClassification(config)


def vivit() -> nn.Module:
    from transformers import VivitConfig, VivitForVideoClassification

    config = VivitConfig(
        image_size=SIDE,
        num_frames=FRAMES,
        tubelet_size=[2, 8, 8],
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=CLASSES,
    )
    return VivitForVideoClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small-video-resnet": lambda: SmallVideoResNet(CLASSES, width=4),
    "conv3d-without-batchnorm": plain_conv3d,
    "torchvision-r2plus1d": torchvision_r2plus1d,
    "torchvision-swin3d": torchvision_swin3d,
    "torchvision-mvit": torchvision_mvit,
    "pytorchvideo-x3d": x3d,
    "pytorchvideo-slow": slow,
    "pytorchvideo-slowfast": slowfast,
    "pytorchvideo-mvit": mvit,
    "hf-videomae": lambda: videomae_classifier(CLASSES, SIDE, FRAMES, hidden=16, layers=2, heads=2),
    "hf-timesformer": timesformer,
    "hf-vivit": vivit,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model ``name`` in eval mode, with weights drawn from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()
