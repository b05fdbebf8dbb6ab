"""The results of BackdoorBench: weights with the name of their architecture and of their data.

References:
    Wu et al. *BackdoorBench: A Comprehensive Benchmark of Backdoor Learning*. NeurIPS 2022. Its
    ``attack_result.pt`` holds the state dict as ``model`` beside ``model_name``, ``num_classes``,
    ``img_size`` and ``clean_data``; its data sets are normalised as in the table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Result", "result_in"]

_NORMALISED = {
    "cifar10": ("0.4914,0.4822,0.4465", "0.247,0.243,0.261"),
    "cifar100": ("0.5071,0.4865,0.4409", "0.2673,0.2564,0.2762"),
    "mnist": ("0.5", "0.5"),
    "tiny": ("0.4802,0.4481,0.3975", "0.2302,0.2265,0.2262"),
    "imagenet": ("0.485,0.456,0.406", "0.229,0.224,0.225"),
}
_NOT_NORMALISED = {"gtsrb", "celeba"}
_OF_TORCHVISION = {
    *("resnet18", "resnet34", "resnet50", "alexnet", "vgg11", "vgg16", "vgg19", "vgg19_bn"),
    *("squeezenet1_0", "densenet121", "densenet161", "shufflenet_v2_x1_0", "mobilenet_v2"),
    *("mobilenet_v3_large", "resnext50_32x4d", "wide_resnet50_2", "mnasnet1_0"),
    *("efficientnet_b0", "efficientnet_b3", "googlenet", "inception_v3"),
}


@dataclass(frozen=True)
class Result:
    """What a result says about its model.

    Attributes:
        model: The name of the architecture.
        classes: Number of classes K.
        size: Side of the images in pixels; None if it is not stated.
        data: The name of the data set; may be empty.
    """

    model: str
    classes: int
    size: int | None
    data: str

    @property
    def arch(self) -> str | None:
        """What builds the architecture, as ``--arch`` takes it; none where it is not known."""
        if self.model == "preactresnet18":
            return f"mmdefense_tasks.victims:PreActResNet18({self.classes})"
        if self.model in _OF_TORCHVISION:
            return f"torchvision.models:{self.model}(num_classes={self.classes})"
        return None

    @property
    def description(self) -> str:
        """A description for the user, without a final period."""
        about = f"a result of BackdoorBench: {self.model}, {self.classes} classes"
        about += f", data {self.data}" if self.data else ""
        options = [f"--image-size {self.size}"] if self.size else []
        if self.data in _NORMALISED:
            mean, std = _NORMALISED[self.data]
            options.append(f"--mean {mean} --std {std}")
        if not options:
            return about
        return f"{about}; to read data as BackdoorBench does, give {' '.join(options)}"


def result_in(held: Any) -> Result | None:
    """Return the result in a checkpoint, or None if it is not one."""
    if not isinstance(held, Mapping) or not isinstance(held.get("model"), Mapping):
        return None
    match held.get("model_name"), held.get("num_classes"):
        case str(model), int(classes):
            return Result(
                model, classes, _side(held.get("img_size")), _text(held.get("clean_data"))
            )
    return None


def _side(size: Any) -> int | None:
    match size:
        case [int(height), int(width), *_] | (int(height), int(width), *_) if height == width:
            return height
    return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() and len(value) < 80 else ""
