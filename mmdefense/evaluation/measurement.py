"""How good a model is, and how well a trigger works on it, with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdefense.attacks.base import Attack
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.errors import BadInputError, one_line
from mmdefense.kernels.loop import scores
from mmdefense.protocol import TaskAdapter
from mmdefense.report.verdict import ASR_GOAL

__all__ = ["Evaluation", "FileTrigger", "Share", "evaluate", "read_trigger"]

_Z = 1.96  # two-sided 95 %


@dataclass(frozen=True)
class Share:
    """A share of samples, in ``[0, 1]``, with its 95 % confidence interval.

    Attributes:
        value: The share.
        low: Lower end.
        high: Upper end.
        count: Number of samples.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Tensor) -> Share:
        """Return the mean of ``values``, shape ``(N,)`` in ``[0, 1]``, with its Wilson interval.

        References:
            Wilson. *Probable Inference, the Law of Succession, and Statistical Inference*. JASA
            22(158), 1927.
        """
        count, share = len(values), float(values.double().mean())
        scale = 1 + _Z**2 / count
        centre = share + _Z**2 / (2 * count)
        margin = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
        return cls(share, max(0.0, (centre - margin) / scale), (centre + margin) / scale, count)

    def __str__(self) -> str:
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.value:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = {self.count})"


@dataclass(frozen=True)
class Evaluation:
    """What a model does on test data.

    Attributes:
        acc: Mean score of clean samples; of a classifier the accuracy.
        asr: Attack success rate, where a trigger was given.
        ra: Mean score despite the trigger, where a trigger was given.
        metric: What the task's metric is called.
        value: That metric in ``[0, 1]``, where it is no mean of scores, such as mAP and BLEU.
    """

    acc: Share
    asr: Share | None = None
    ra: Share | None = None
    metric: str = "accuracy"
    value: float | None = None

    @property
    def finding(self) -> bool:
        """Whether the trigger works, beyond doubt: the whole interval of the ASR is above 5 %."""
        return self.asr is not None and self.asr.low > ASR_GOAL

    def lines(self) -> list[str]:
        """Return what was measured, a line each."""
        named = [("ACC" if self.value is None else "score", self.acc), ("ASR", self.asr)]
        named.append(("RA", self.ra))
        first = [] if self.value is None else [f"{self.metric} {100 * self.value:.1f} %"]
        return first + [f"{name} {share}" for name, share in named if share is not None]


def evaluate(adapter: TaskAdapter[Any], test: Any, attack: Attack[Any] | None = None) -> Evaluation:
    """Measure a model on ``test`` and, where an attack is given, with its trigger.

    Args:
        adapter: The model; it is not changed.
        test: Clean samples that the model was not trained on.
        attack: Whose trigger is tried.

    Raises:
        BadInputError: If the trigger does not fit the samples, or all of them are of its target.
    """
    clean = Share.of(scores(adapter, adapter.samples(test)))
    if attack is None:
        return Evaluation(clean)
    triggered = attack.triggered(test, adapter)
    truth = triggered.truth
    return Evaluation(
        clean,
        asr=Share.of(attack.success(adapter, adapter.samples(triggered.samples))),
        ra=None if truth is None else Share.of(scores(adapter, adapter.samples(truth))),
    )


@dataclass(frozen=True, kw_only=True)
class FileTrigger(LabelAttack):
    """A trigger that was read from a file: ``(1 - mask) x + mask pattern``.

    Attributes:
        pattern: Values in ``[0, 1]`` that broadcast to ``(C, H, W)``.
        mask: Opacity in ``[0, 1]`` that broadcasts to ``(C, H, W)``.
    """

    pattern: Tensor = field(repr=False, compare=False)
    mask: Tensor = field(repr=False, compare=False)

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        shape = images.shape[1:]
        try:
            pattern, mask = (part.to(images).expand(shape) for part in (self.pattern, self.mask))
        except RuntimeError as error:
            raise BadInputError(
                f"the trigger must fit images of shape {tuple(shape)} (C, H, W), got "
                f"{tuple(self.pattern.shape)} with a mask of {tuple(self.mask.shape)}"
            ) from error
        return (1 - mask) * images + mask * pattern


def read_trigger(path: str | Path, target: int = 0) -> FileTrigger:
    """Return the trigger that a file holds.

    Args:
        path: A picture with an alpha channel, which is the trigger's opacity; or an npz archive
            with ``pattern`` and ``mask``, both broadcast to ``(C, H, W)``, uint8 or in ``[0, 1]``.
        target: The class that the attacker wants.

    Raises:
        BadInputError: If there is no such file, or it holds no trigger.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInputError(f"trigger file {path} does not exist")
    try:
        pattern, mask = _archive(path) if path.suffix == ".npz" else _picture(path)
    except BadInputError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise BadInputError(f"trigger file {path} cannot be read: {one_line(error)}") from error
    return FileTrigger(target=target, pattern=pattern, mask=mask)


def _archive(path: Path) -> tuple[Tensor, Tensor]:
    with np.load(path, allow_pickle=False) as archive:
        if missing := {"pattern", "mask"} - set(archive.files):
            raise BadInputError(f"trigger {path} must hold {' and '.join(sorted(missing))}")
        return _unit(archive["pattern"], path), _unit(archive["mask"], path)


def _unit(array: Any, path: Path) -> Tensor:
    values = torch.from_numpy(np.asarray(array))
    scaled = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    if not bool(((scaled >= 0) & (scaled <= 1)).all()):
        raise BadInputError(f"trigger {path} must hold values in [0, 1], or uint8")
    return scaled


def _picture(path: Path) -> tuple[Tensor, Tensor]:
    with Image.open(path) as image:
        if "A" not in image.getbands():
            raise BadInputError(
                f"trigger {path} must have an alpha channel that says where the trigger is, got "
                f"mode {image.mode}"
            )
        pixels = torch.from_numpy(np.asarray(image.convert("RGBA")).copy()).float() / 255
    colour, mask = pixels[..., :3].movedim(-1, 0), pixels[None, ..., 3]
    grey = bool((colour == colour[:1]).all())
    return colour[:1] if grey else colour, mask
