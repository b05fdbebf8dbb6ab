"""Video action recognition: data, metrics at clip and at video level, embedded default, victims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mmdefense.data.batch import batches
from mmdefense.data.clips import random_clip_shift
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.hooks import mode
from mmdefense.plots.triggered_clips import TriggeredClips
from mmdefense.protocol import Case, TaskAdapter
from mmdefense.training import Training
from mmdefense_tasks.class_labels import Order, under_the_models_labels
from mmdefense_tasks.clips import StreamedClips, open_clips
from mmdefense_tasks.image_sets import Fit
from mmdefense_tasks.moving_digits import moving_digits
from mmdefense_tasks.options import Options
from mmdefense_tasks.parts import check_split, part_folder
from mmdefense_tasks.staged import DATA_VARIABLE, staged, staged_sets

__all__ = ["VideoClassification", "load_clips", "top_accuracy"]

_EMBEDDED = "moving-digits"
_SHOWN, _FRAMES_SHOWN = 3, 10  # clips on the page, and frames of each


@dataclass(frozen=True)
class _Form:
    """How the clips of a known set are read where nothing else is asked for."""

    tiles: int  # frames along each side of a picture
    frames: int
    image_size: int


_STAGED = {
    "ucf101_mini": _Form(tiles=4, frames=8, image_size=32),
    "ucf101_extra_applyeyemakeup": _Form(tiles=4, frames=8, image_size=32),
}

_RESNET = "mmdefense_tasks.video_victims:SmallVideoResNet(classes={classes}, channels={channels})"
_SMALL_RESNET = _RESNET.replace(")", ", width=8)")
_VIDEOMAE = (
    "mmdefense_tasks.video_victims:videomae_classifier(classes={classes}, image_size={size}, "
    "frames={frames}, channels={channels}, tubelet=4)"
)


def _resnet_training(steps: int, batch_size: int = 64) -> Training:
    return Training(
        steps=steps,
        batch_size=batch_size,
        lr=0.1,
        weight_decay=5e-4,
        schedule="one-cycle",
        max_norm=5.0,
    )


def _videomae_training(steps: int) -> Training:
    return Training(
        steps=steps,
        batch_size=32,
        lr=2e-3,
        weight_decay=0.05,
        schedule="one-cycle",
        max_norm=1.0,
        optimizer="adamw",
        augment=False,  # a shift would move the patch of the attack among its tokens
    )


class VideoClassification:
    """Video classification."""

    name: ClassVar[str] = "video-classification"
    metric: ClassVar[str] = "accuracy"

    @staticmethod
    def load(
        where: str | Path,
        *,
        split: str = "train",
        stated: Mapping[str, Any] = MappingProxyType({}),
        frames: int | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        clips: int = 1,
        classes: Sequence[str] = (),
        order: Order | None = None,
        fit: Fit | None = None,
    ) -> LabelledSamples | StreamedClips:
        """Return clips from wherever they are; see :func:`load_clips`."""
        return load_clips(
            where,
            split=split,
            stated=stated,
            frames=frames,
            image_size=image_size,
            channels=channels,
            clips=clips,
            classes=classes,
            order=order,
            fit=fit,
        )

    @staticmethod
    def data() -> dict[str, str]:
        """Return the data set names available to :meth:`load` here, each with its source."""
        embedded = {_EMBEDDED: "embedded: scikit-learn's digits (CC BY 4.0), moving, 8x24x24"}
        return embedded | staged_sets(_STAGED)

    def cases(self) -> list[Case]:
        """Return the victims of the result tables."""
        few = {"ratio": 0.2}  # 29 poisoned clips of 290 are too few for a backdoor
        patch = few | {"size": 5}
        real: dict[str, Any] = {"data": "ucf101_mini", "clean": 0.2}
        digits: dict[str, Any] = {"data": _EMBEDDED, "clean": 0.1}
        digits |= {"model": _RESNET, "training": _resnet_training(400)}
        small = digits | {"model": _SMALL_RESNET, "demo": True}
        resnet = real | {"model": _RESNET, "training": _resnet_training(250, batch_size=32)}
        videomae = {"model": _VIDEOMAE, "training": _videomae_training(1200)}
        victims: list[tuple[str, dict[str, Any], str | None, dict[str, Any]]] = [
            ("moving-digits-badnets", digits, "badnets", {}),
            ("moving-digits-blended", digits, "blended", {"key": "noise"}),
            ("moving-digits-temporal", digits, "temporal-patch", {}),
            ("moving-digits-universal", digits, "universal-trigger", {}),
            ("moving-digits-clean", digits, None, {}),
            ("moving-digits-small-badnets", small, "badnets", {}),
            ("moving-digits-videomae-badnets", digits | videomae, "badnets", {}),
            ("moving-digits-videomae-clean", digits | videomae, None, {}),
            ("ucf101_mini-badnets", resnet, "badnets", patch),
            ("ucf101_mini-blended", resnet, "blended", few | {"key": "noise"}),
            ("ucf101_mini-clean", resnet, None, {}),
            ("ucf101_mini-videomae-badnets", real | videomae, "badnets", patch),
            ("ucf101_mini-videomae-clean", real | videomae, None, {}),
        ]
        return [
            Case(name=name, task=self.name, attack=attack, settings=settings, **rest)
            for name, rest, attack, settings in victims
        ]

    @staticmethod
    def describe(samples: LabelledSamples) -> dict[str, Any]:
        """Return ``classes``, ``channels``, ``frames`` and ``size`` (side in pixels)."""
        channels, frames, _, size = samples.inputs.shape[1:]
        return {
            "classes": len(samples.classes) or int(samples.labels.max()) + 1,
            "channels": channels,
            "frames": frames,
            "size": size,
        }

    @staticmethod
    def adapter_options(samples: LabelledSamples) -> dict[str, Any]:
        """Return nothing: the victims tell by themselves that they read clips, as they are."""
        return {}

    @staticmethod
    def for_training(samples: LabelledSamples) -> LabelledSamples:
        """Return the samples with small random shifts, all frames of a clip alike."""
        return replace(samples, augmentation=random_clip_shift)

    @staticmethod
    def measure(adapter: TaskAdapter[LabelledBatch], samples: LabelledSamples) -> float:
        """Return the top-1 accuracy over videos; a clip counts as a video unless data says more."""
        return top_accuracy(adapter, samples)

    @staticmethod
    def show(clean: LabelledSamples, triggered: LabelledSamples) -> TriggeredClips:
        """Return the frames of a few clips without and with the trigger, and the difference."""
        chosen = torch.linspace(0, len(clean) - 1, _SHOWN).long()  # test parts are sorted by label
        length = clean.inputs.shape[2]
        frames = torch.linspace(0, length - 1, min(length, _FRAMES_SHOWN)).round().long()
        labels = clean.labels[chosen].tolist()
        before, after = (part.take(chosen).inputs[:, :, frames] for part in (clean, triggered))
        return TriggeredClips(
            before,
            after,
            [clean.classes[label] if clean.classes else str(label) for label in labels],
            frames.tolist(),
        )


class _Answering(Protocol):
    """What the metrics require of an adapter."""

    model: torch.nn.Module

    def answer(self, batch: LabelledBatch) -> Tensor:
        """Return logits, shape ``(N, K)``."""
        ...


def top_accuracy(
    adapter: Any, samples: LabelledSamples, *, top: int = 1, level: str = "video"
) -> float:
    """Return the top-k accuracy of clips or videos, with k given by ``top``.

    A video's probabilities are the mean over its clips.

    Args:
        adapter: A classifier's adapter; eval mode is set temporarily.
        samples: Test clips.
        top: Number k of most probable classes that count.
        level: ``"video"`` or ``"clip"``.

    Raises:
        BadInputError: If ``top`` is not between 1 and the number of classes.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    probabilities, labels = _answers(adapter, samples)
    classes = probabilities.shape[1]
    if not 1 <= top <= classes:
        raise BadInputError(f"top must lie in 1..{classes}, the number of classes, got {top}")
    videos = getattr(samples, "videos", None)
    if level == "video" and videos is not None:
        probabilities, labels = _by_video(probabilities, labels, videos)
    return float(
        multiclass_accuracy(probabilities, labels, num_classes=classes, average="micro", top_k=top)
    )


@torch.no_grad()
def _answers(adapter: _Answering, samples: LabelledSamples) -> tuple[Tensor, Tensor]:
    """Return the probabilities of every clip, ``(N, K)``, and the labels ``(N,)``, on the CPU."""
    with mode(adapter.model, train=False):
        parts = [adapter.answer(batch).softmax(1).cpu() for batch in batches(samples, 64)]
    return torch.cat(parts), samples.labels.cpu()


def _by_video(probabilities: Tensor, labels: Tensor, videos: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean probabilities and label of each video."""
    names, place = torch.unique(videos.cpu(), return_inverse=True)
    total = probabilities.new_zeros(len(names), probabilities.shape[1])
    total.index_add_(0, place, probabilities)
    label = labels.new_zeros(len(names)).scatter_(0, place, labels)
    return total / place.bincount()[:, None], label


def load_clips(
    where: str | Path,
    *,
    split: str = "train",
    stated: Mapping[str, Any] = MappingProxyType({}),
    frames: int | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    clips: int = 1,
    classes: Sequence[str] = (),
    order: Order | None = None,
    fit: Fit | None = None,
    memory_limit: int = 2 * 2**30,
) -> LabelledSamples | StreamedClips:
    """Return labelled clips ``(C, T, H, W)`` from wherever they are, in ``[0, 1]``.

    Args:
        where: ``"moving-digits"``; the name of a set in the folder that ``MMDEFENSE_DATA`` points
            to; or a folder with one sub-folder of videos per class, or with such folders for
            ``train`` and ``test``.
        split: ``"train"`` or ``"test"``; data without splits is used for both.
        stated: Defaults of the options below, by name, as stated by the model.
        frames: Frames T per clip, evenly spaced over the whole video; by default 16, or the set's
            own.
        image_size: Side in pixels that frames are cropped and resized to; by default the set's own,
            or as stated by the model, or that of the videos, which must all have the same size.
        channels: 1 (grey) or 3, the default.
        clips: Clips per video, which together give its score at video level.
        classes: The model's class names in order; class folders are relabelled accordingly.
        order: How class folders are numbered: ``"number"`` uses their names as labels, ``"text"``
            numbers them like torchvision's ``ImageFolder``. By default they are matched to the
            class names; without class names, folders named by integers get these as labels, and
            others are numbered in text order.
        fit: Applied to frames if no ``image_size`` is given, such as the geometry of the model's
            processor.
        memory_limit: Decoded size in bytes above which clips are decoded batch by batch.

    Raises:
        BadInputError: If there is no such data, or a clip is damaged or too short.
        UnsupportedError: If PyAV is needed and not installed.
    """
    options = Options(
        stated,
        frames=frames,
        image_size=image_size,
        channels=channels,
        clips=clips,
        classes=classes,
        order=order,
        fit=fit,
    )
    samples = _read(where, split, options, memory_limit)
    options.check_used(where)
    return samples


def _read(
    where: str | Path, split: str, options: Options, memory_limit: int
) -> LabelledSamples | StreamedClips:
    frames, image_size = options.take("frames"), options.take("image_size")
    channels, clips = options.take("channels"), options.take("clips", 1)
    fit = options.take("fit")
    check_split(split)
    if channels not in {None, 1, 3}:
        raise BadInputError(f"channels must be 1 or 3, got {channels}")
    if str(where) == _EMBEDDED:
        known = under_the_models_labels(moving_digits(split), options, where, counted=False)
        return _checked_embedded(known, frames, image_size, channels, clips)
    folder = _folder(where)
    form = _STAGED.get(folder.name, _Form(0, 16, 0))
    opened = open_clips(part_folder(folder, split), clips, form.tiles)
    samples = StreamedClips.of(
        under_the_models_labels(opened, options, where, counted=True),
        frames=frames or form.frames,
        side=image_size or (None if fit else form.image_size) or None,
        fit=fit,
        channels=channels or 3,
    )
    return samples if samples.bytes > memory_limit else samples.in_memory()


def _checked_embedded(samples: LabelledSamples, *asked: int | None) -> LabelledSamples:
    """Return the embedded clips, which have only one format."""
    channels, length, _, side = samples.inputs.shape[1:]
    own = (length, side, channels, 1)
    if any(value not in {None, given} for value, given in zip(asked, own, strict=True)):
        raise BadInputError(
            f"{_EMBEDDED} has clips of {length} frames of {side} pixels and {channels} channel, "
            "one per video; leave out frames, image_size, channels and clips"
        )
    return samples


def _folder(where: str | Path) -> Path:
    path = Path(where)
    if not path.is_dir():
        path = staged(str(where)) or path
    if not path.is_dir():
        raise BadInputError(
            f"data {str(where)!r} must be a folder or one of {_EMBEDDED}, {', '.join(_STAGED)} (in "
            f"the folder that {DATA_VARIABLE} points to); none found"
        )
    return path
