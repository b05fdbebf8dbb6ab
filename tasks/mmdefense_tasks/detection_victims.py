"""Object detectors to plant a backdoor in: one convolutional, two transformers."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

from torch import Tensor, nn

from mmdefense.libraries import needed
from mmdefense_tasks.victims import SmallResNet

__all__ = ["PyramidBackbone", "small_fcos", "small_rt_detr", "small_yolos"]


class PyramidBackbone(nn.Module):
    """The stages of a small residual net with a feature pyramid over them.

    After a stem of stride 2 the pyramid's levels have strides 4 and 8 (Lin et al., *Feature
    Pyramid Networks*, arXiv 1612.03144).
    """

    def __init__(self, channels: int, width: int, out_channels: int) -> None:
        """Build the net with random weights.

        Args:
            channels: Number of image channels C.
            width: Filters of the stem; the stages have twice and four times as many.
            out_channels: Filters of each level of the pyramid.
        """
        from torchvision.ops import FeaturePyramidNetwork

        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.fine, self.coarse = SmallResNet(1, 1, width).stages[1:]
        self.pyramid = FeaturePyramidNetwork([2 * width, 4 * width], out_channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map images ``(N, C, H, W)`` to feature maps of strides 4 and 8, by name."""
        fine = self.fine(self.stem(images))
        maps: OrderedDict[str, Tensor] = self.pyramid(
            OrderedDict(fine=fine, coarse=self.coarse(fine))
        )
        return maps


def small_fcos(
    classes: int,
    channels: int = 1,
    size: tuple[int, int] = (48, 48),
    width: int = 8,
    features: int = 16,
    depth: int = 1,
) -> nn.Module:
    """Return torchvision's FCOS over a small residual pyramid, with random weights.

    Args:
        classes: Number of classes K.
        channels: Number of image channels C.
        size: Height and width of the images, multiples of 8, which are not resized.
        width: Filters of the first stage of the backbone.
        features: Filters of the pyramid and of the heads, a multiple of 8.
        depth: Convolutions of each head before its predictor.

    Raises:
        UnsupportedError: If torchvision is not installed.
    """
    with needed("this detector", "torchvision", "pycocotools"):  # the latter for evaluation
        from torchvision.models.detection import FCOS
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead
        from torchvision.models.detection.fcos import FCOSRegressionHead as Regression
    # Not BatchNorm: a head runs on every level, whose statistics differ.
    norm: Any = partial(nn.GroupNorm, 8)
    head = FCOSHead(32, 1, classes, num_convs=0)  # its own heads need 32 features; both replaced
    head.classification_head = FCOSClassificationHead(features, 1, classes, depth, norm_layer=norm)
    head.regression_head = Regression(features, 1, depth, norm_layer=norm)
    model: nn.Module = FCOS(
        PyramidBackbone(channels, width, features),
        classes,
        min_size=min(size),
        max_size=max(size),
        image_mean=[0.3] * channels,
        image_std=[0.3] * channels,
        anchor_generator=AnchorGenerator(((4,), (8,)), ((1.0,),) * 2),
        head=head,
        center_sampling_radius=1.5,
        size_divisible=8,
        score_thresh=0.05,
    )
    return model


def small_yolos(
    classes: int,
    channels: int = 1,
    size: tuple[int, int] = (48, 48),
    patch: int = 8,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    tokens: int = 10,
) -> nn.Module:
    """Return a YOLOS detector of ``transformers`` with random weights: a plain transformer.

    Args:
        classes: Number of classes K.
        channels: Number of image channels C.
        size: Height and width of the images, multiples of ``patch``.
        patch: Side of a patch in pixels.
        hidden: Features per token, a multiple of ``heads``.
        layers: Number of transformer blocks.
        heads: Attention heads in each block.
        tokens: Detection tokens: the largest number of objects that can be found.

    Raises:
        UnsupportedError: If transformers is not installed.
    """
    with needed("this detector"):
        from transformers import YolosConfig, YolosForObjectDetection
    config = YolosConfig(
        image_size=list(size),
        patch_size=patch,
        num_channels=channels,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_detection_tokens=tokens,
        num_labels=classes,
        attn_implementation="eager",
    )
    model: Any = YolosForObjectDetection(config)
    # With the library's zero initialisation all patches look alike at first, which slows training.
    for name in ("position_embeddings", "detection_tokens"):
        nn.init.normal_(getattr(model.vit.embeddings, name), std=0.3)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model  # type: ignore[no-any-return]


def small_rt_detr(
    classes: int,
    channels: int = 1,
    size: tuple[int, int] = (48, 48),
    width: int = 16,
    hidden: int = 32,
    heads: int = 4,
    queries: int = 8,
) -> nn.Module:
    """Return an RT-DETR of ``transformers`` with random weights: a transformer on a ResNet.

    Args:
        classes: Number of classes K.
        channels: Number of image channels C.
        size: Height and width of the images, multiples of 16.
        width: Filters of the first stage of the backbone, whose strides are 4, 8 and 16.
        hidden: Features per location and query, a multiple of ``heads``.
        heads: Attention heads in each block.
        queries: The largest number of objects that can be found.

    Raises:
        UnsupportedError: If transformers is not installed.
    """
    with needed("this detector"):
        from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig
    widths = [width, 2 * width, 4 * width]
    backbone = RTDetrResNetConfig(
        num_channels=channels,
        embedding_size=width,
        hidden_sizes=widths,
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
        downsample_in_first_stage=False,
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=widths,
        feat_strides=[4, 8, 16],
        encode_proj_layers=[2],
        encoder_hidden_dim=hidden,
        encoder_ffn_dim=2 * hidden,
        encoder_attention_heads=heads,
        hidden_expansion=0.5,
        d_model=hidden,
        num_queries=queries,
        decoder_in_channels=[hidden] * 3,
        decoder_ffn_dim=2 * hidden,
        decoder_n_points=2,
        decoder_layers=2,
        decoder_attention_heads=heads,
        num_labels=classes,
    )
    model: nn.Module = RTDetrForObjectDetection(config)
    return model
