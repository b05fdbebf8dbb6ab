"""Image classification: data, metric, embedded default and default victim."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from mmdefense.data.batch import split
from mmdefense.data.images import random_shift
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import mean_score
from mmdefense.plots.triggered_samples import TriggeredSamples
from mmdefense.protocol import Case, TaskAdapter
from mmdefense.training import Training
from mmdefense_tasks.class_labels import Order, under_the_models_labels
from mmdefense_tasks.image_datasets import open_dataset
from mmdefense_tasks.image_files import open_archive, open_folder
from mmdefense_tasks.image_sets import Fit, ImageSet, StreamedImages, squashed
from mmdefense_tasks.options import Options
from mmdefense_tasks.parts import check_split, part_archive, part_folder
from mmdefense_tasks.staged import DATA_VARIABLE, staged, staged_sets
from mmdefense_tasks.victims import SmallResNet

__all__ = ["ImageClassification", "load_data", "load_digits"]

_ALIASES = {"cifar10": "cifar10_jpeg", "gtsrb": "gtsrb32", "tiny_imagenet": "tiny_imagenet10"}
_STAGED = ("cifar10_jpeg", "cifar10_lossless5k", "gtsrb32", "mnist", "tiny_imagenet10")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_OWNERS = {
    "beans": "AI-Lab-Makerere",
    "cats_vs_dogs": "microsoft",
    "cifar100": "uoft-cs",
    "fashion_mnist": "zalando-datasets",
    "food101": "ethz",
    "imagenet-1k": "ILSVRC",
    "svhn": "ufldl-stanford",
}
"""Hub data sets whose id has no owner."""


_RESNET = "mmdefense_tasks.victims:SmallResNet(classes={classes}, channels={channels})"
_VIT = (
    "mmdefense_tasks.victims:vit_classifier(classes={classes}, image_size={size}, "
    "channels={channels}, patch=7)"
)


def _resnet_training(steps: int) -> Training:
    return Training(steps=steps, lr=0.1, weight_decay=5e-4, schedule="one-cycle", max_norm=5.0)


def _vit_training(steps: int) -> Training:
    return Training(
        steps=steps,
        lr=2e-3,
        weight_decay=0.05,
        schedule="one-cycle",
        max_norm=1.0,
        optimizer="adamw",
    )


class ImageClassification:
    """Image classification."""

    name: ClassVar[str] = "image-classification"
    metric: ClassVar[str] = "accuracy"

    @staticmethod
    def embedded(seed: int = 0) -> tuple[LabelledSamples, LabelledSamples]:
        """Return the train and test split of the data that needs no download."""
        return load_digits(seed)

    @staticmethod
    def load(
        where: str | Path,
        *,
        split: str = "train",
        stated: Mapping[str, Any] = MappingProxyType({}),
        image_size: int | None = None,
        channels: int | None = None,
        classes: Sequence[str] = (),
        order: Order | None = None,
        image: str | None = None,
        label: str | None = None,
        fit: Fit | None = None,
    ) -> LabelledSamples | StreamedImages:
        """Return data from any supported location; see :func:`load_data`."""
        return load_data(
            where,
            split=split,
            stated=stated,
            image_size=image_size,
            channels=channels,
            classes=classes,
            order=order,
            image=image,
            label=label,
            fit=fit,
        )

    @staticmethod
    def data() -> dict[str, str]:
        """Return the data set names available to :meth:`load` here, each with its source."""
        embedded = {"digits": "embedded: digits of scikit-learn (CC BY 4.0), 16x16"}
        return embedded | staged_sets(_STAGED)

    @staticmethod
    def victim(classes: int, channels: int = 1) -> nn.Module:
        """Return a net with random weights that learns the embedded data in seconds."""
        return SmallResNet(classes, channels)

    def cases(self) -> list[Case]:
        """Return the victims of the result tables."""
        described: dict[str, dict[str, Any]] = {
            "digits": {"data": "digits", "model": _RESNET, "training": _resnet_training(300)},
            "mnist": {"data": "mnist", "model": _RESNET, "training": _resnet_training(700)},
            "mnist-vit": {"data": "mnist", "model": _VIT, "training": _vit_training(1500)},
        }
        attacks: list[tuple[str | None, dict[str, Any]]] = [
            ("badnets", {}),
            ("blended", {"key": "noise"}),
            (None, {}),
        ]
        return [
            Case(
                name=f"{name}-{attack or 'clean'}",
                task=self.name,
                attack=attack,
                settings=settings,
                **rest,
            )
            for name, rest in described.items()
            for attack, settings in attacks
        ]

    @staticmethod
    def describe(samples: LabelledSamples) -> dict[str, Any]:
        """Return ``classes``, ``channels`` and ``size`` (side in pixels)."""
        return {
            "classes": len(samples.classes) or int(samples.labels.max()) + 1,
            "channels": samples.inputs.shape[1],
            "size": samples.inputs.shape[-1],
        }

    @staticmethod
    def adapter_options(samples: LabelledSamples) -> dict[str, Any]:
        """Return nothing: the victims take images as they are."""
        return {}

    @staticmethod
    def for_training(samples: LabelledSamples) -> LabelledSamples:
        """Return the samples with small random shifts, the usual augmentation."""
        return replace(samples, augmentation=random_shift)

    @staticmethod
    def measure(adapter: TaskAdapter[LabelledBatch], samples: LabelledSamples) -> float:
        """Return the accuracy."""
        return mean_score(adapter, samples)

    @staticmethod
    def show(clean: LabelledSamples, triggered: LabelledSamples) -> TriggeredSamples:
        """Return ten images without and with the trigger, and the difference."""
        chosen = torch.linspace(0, len(clean) - 1, 10).long()  # test parts are sorted by label
        names = [
            clean.classes[label] if clean.classes else str(label)
            for label in clean.labels[chosen].tolist()
        ]
        before, after = clean.take(chosen).inputs, triggered.take(chosen).inputs
        return TriggeredSamples(before, after, names)


def load_digits(seed: int = 0) -> tuple[LabelledSamples, LabelledSamples]:
    """Return the train and test split of scikit-learn's handwritten digits, real 8x8 scans.

    Images are ``(1, 16, 16)`` in ``[0, 1]``, enlarged bilinearly; 1438 for training and 359 for
    testing, stratified by class. Training images are augmented by shifts.

    Args:
        seed: Makes the split reproducible.

    Example:
        >>> train, test = load_digits()
        >>> len(train), len(test), train.inputs.shape[1:]
        (1438, 359, torch.Size([1, 16, 16]))
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(bunch.images).float().div(16)[:, None]
    images = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    samples = LabelledSamples(
        images,
        torch.from_numpy(bunch.target).long(),
        classes=tuple(str(digit) for digit in range(10)),
    )
    train, test = split(samples, 0.2, seed)
    assert isinstance(train, LabelledSamples)
    assert isinstance(test, LabelledSamples)
    return train, test


def load_data(
    where: str | Path,
    *,
    split: str = "train",
    stated: Mapping[str, Any] = MappingProxyType({}),
    image_size: int | None = None,
    channels: int | None = None,
    classes: Sequence[str] = (),
    order: Order | None = None,
    image: str | None = None,
    label: str | None = None,
    fit: Fit | None = None,
    memory_limit: int = 2 * 2**30,
) -> LabelledSamples | StreamedImages:
    """Return labelled images from wherever they are, in ``[0, 1]`` and not normalised.

    Args:
        where: ``"digits"``; the name of a set in the folder that ``MMDEFENSE_DATA`` points to; an
            npz archive; a folder of such archives (``train.npz``, ``test.npz``); a folder with one
            sub-folder per class, or with such folders for ``train`` and ``test``; or a data set of
            the ``datasets`` library, saved to disk or by hub id.
        split: ``"train"`` or ``"test"``; data without splits is used for both.
        stated: Defaults of the options below, by name, as stated by the model.
        image_size: Side in pixels of the square that images are resized to; by default they must
            have the same size, or are resized as stated by the model.
        channels: Number of channels, to which grey images are repeated; files provide 1, 3 or, with
            alpha, 4. By default that of the first image, without alpha.
        classes: The model's class names in order; data with class names is relabelled accordingly.
        order: How class folders are numbered: ``"number"`` uses their names as labels, ``"text"``
            numbers them like torchvision's ``ImageFolder``. By default they are matched to the
            class names; without class names, folders named by integers get these as labels, and
            others are numbered in text order.
        image: The image column of a data set of ``datasets``, if there are several image columns.
        label: The label column, likewise.
        fit: Applied to images of different sizes if no ``image_size`` is given, such as the
            geometry of the model's processor; by default they are rejected.
        memory_limit: Decoded size in bytes above which images are decoded batch by batch.

    Raises:
        BadInputError: If there is no such data, it is empty or damaged, or its channels, sizes or
            class names do not fit.
        UnsupportedError: If a required library is not installed.

    Example:
        >>> data = load_data("images", image_size=16)
        >>> data.inputs.shape, data.classes
        (torch.Size([30, 1, 16, 16]), ('left', 'right', 'stop'))
    """
    options = Options(
        stated,
        image_size=image_size,
        channels=channels,
        classes=classes,
        order=order,
        image=image,
        label=label,
        fit=fit,
    )
    samples = _read(where, split, options, memory_limit)
    options.check_used(where)
    return samples


def _read(
    where: str | Path, split: str, options: Options, memory_limit: int
) -> LabelledSamples | StreamedImages:
    check_split(split)
    if str(where) == "digits":
        digits = load_digits()[split == "test"]
        return under_the_models_labels(digits, options, where, counted=False)
    image_size, channels = options.take("image_size"), options.take("channels")
    fit = options.take("fit")
    images = _open(where, split, options)
    images = under_the_models_labels(images, options, where, counted=images.counted)
    if image_size:
        fit = squashed((image_size, image_size))
    elif fit and images.is_even():
        fit = None  # done by the model's adapter, so that triggers have the data's size
    samples = StreamedImages.of(images, fit, channels)
    return samples if samples.bytes > memory_limit else samples.in_memory()


def _open(where: str | Path, split: str, options: Options) -> ImageSet:
    path = Path(where)
    if not path.exists():
        path = staged(_ALIASES.get(str(where), str(where))) or path
    if path.is_file():
        return open_archive(path, split)
    if path.is_dir():
        return _open_folder(path, split, options)
    if str(where) in _OWNERS:
        where = f"{_OWNERS[str(where)]}/{where}"
    if _HUB_ID.fullmatch(str(where)) and not Path(where).parent.exists():
        return open_dataset(where, split, options)
    raise BadInputError(
        f"data {str(where)!r} must be a folder, an npz archive, a data set of the Hugging Face hub "
        f"(OWNER/NAME), digits, or one of {', '.join(_STAGED)} in the folder that {DATA_VARIABLE} "
        "points to; none found"
    )


def _open_folder(folder: Path, split: str, options: Options) -> ImageSet:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return open_dataset(folder, split, options)
    archive = part_archive(folder, split)
    return open_folder(part_folder(folder, split)) if archive is None else open_archive(archive)
