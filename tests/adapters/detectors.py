"""Tiny detectors with random weights, one of each family, and images for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign, SqueezeExcitation

from mmdefense.data.detection import DetectionSamples
from mmdefense_tasks.detection_victims import small_fcos, small_rt_detr, small_yolos

CLASSES, SIDE, N = 3, 32, 5


class TwoLevels(nn.Module):
    """A backbone with BatchNorm, hardsigmoid, and feature maps of strides 4 and 8."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.Hardswish(),
            SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid),
        )
        self.coarse = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, images):
        fine = self.fine(images)
        return {"0": fine, "1": self.coarse(fine).relu()}


def anchors() -> AnchorGenerator:
    return AnchorGenerator(((8,), (16,)), ((0.5, 1.0),) * 2)


def retinanet() -> nn.Module:
    return detection.RetinaNet(
        TwoLevels(), CLASSES, anchor_generator=anchors(), min_size=SIDE, max_size=SIDE
    )


def faster_rcnn() -> nn.Module:
    counts = {
        f"rpn_{when}_nms_top_n_{mode}": count
        for when, count in (("pre", 50), ("post", 20))
        for mode in ("train", "test")
    }
    return detection.FasterRCNN(
        TwoLevels(),
        rpn_anchor_generator=anchors(),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(8 * 9, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, CLASSES + 1),
        rpn_batch_size_per_image=16,
        box_batch_size_per_image=8,
        min_size=SIDE,
        max_size=SIDE,
        **counts,
    )


def ssdlite() -> nn.Module:
    boxes = DefaultBoxGenerator([[2], [2]])
    count = boxes.num_anchors_per_location()
    head = SSDLiteHead([8, 8], count, CLASSES + 1, nn.BatchNorm2d)
    return SSD(TwoLevels(), boxes, (SIDE, SIDE), CLASSES + 1, head=head)


def detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_labels=CLASSES,
        auxiliary_loss=True,
        dropout=0.0,
    )
    return DetrForObjectDetection(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fcos": lambda: small_fcos(CLASSES, 3, (SIDE, SIDE), width=4, features=8),
    "retinanet": retinanet,
    "ssdlite": ssdlite,
    "faster-rcnn": faster_rcnn,
    "yolos": lambda: small_yolos(CLASSES, 3, (SIDE, SIDE), hidden=16, layers=2, heads=2, tokens=5),
    "detr": detr,
    "rt-detr": lambda: small_rt_detr(CLASSES, 3, (SIDE, SIDE), width=8, hidden=16, queries=6),
}
TORCHVISION = ("fcos", "retinanet", "ssdlite", "faster-rcnn")


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the detector ``name`` in eval mode, with weights drawn from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def images(seed: int = 2) -> DetectionSamples:
    """Return images with 0, 1, 2, 0 and 1 objects."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for count in (0, 1, 2, 0, 1):
        corner = torch.rand(count, 2, generator=generator) * 16
        side = 8 + torch.rand(count, 2, generator=generator) * 8
        boxes.append(torch.cat([corner, corner + side], 1))
        labels.append(torch.randint(CLASSES, (count,), generator=generator))
    pixels = torch.rand(N, 3, SIDE, SIDE, generator=generator)
    return DetectionSamples(pixels, tuple(boxes), tuple(labels))
