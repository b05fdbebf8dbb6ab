"""How good a model is, and how well a trigger works on it, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdefense.attacks.base import Attack
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.errors import BadInputError, one_line
from mmdefense.files import plain_file
from mmdefense.kernels.loop import scores
from mmdefense.metrics.utility import check_utility
from mmdefense.pictures import open_picture
from mmdefense.prepared import Prepared
from mmdefense.report.evaluation import Proportion

__all__ = ["FileTrigger", "Measured", "learnt_tensors", "measured", "read_trigger"]


@dataclass(frozen=True)
class Measured:
    """What a model does on test data.

    Attributes:
        score: Mean score of clean samples; of a classifier the accuracy.
        asr: Attack success rate, where an attack was given.
        ra: Mean score despite the trigger, where the attack leaves a right answer.
    """

    score: Proportion
    asr: Proportion | None = None
    ra: Proportion | None = None


def measured(
    prepared: Prepared[Any],
    test: Any,
    attack: Attack[Any] | None = None,
    *,
    accept_low_utility: bool = False,
) -> Measured:
    """Measure a model on test samples and, where an attack is given, with its trigger.

    Args:
        prepared: The model, and clean samples that it was not trained on.
        test: The same samples as the task read them, for the attack.
        attack: Whose trigger is tried.
        accept_low_utility: Whether to go on where the model is near chance.

    Raises:
        LowUtilityError: If the model is near chance on the samples, as they were read.
        BadInputError: If the trigger does not fit the samples, or all of them are of its target.
    """
    check_utility(prepared, accept=accept_low_utility)
    adapter, clean = prepared.adapter, Proportion.of(prepared.scores)
    if attack is None:
        return Measured(clean)
    triggered = attack.triggered(test, adapter)
    truth = triggered.truth
    return Measured(
        clean,
        asr=Proportion.of(attack.success(adapter, adapter.samples(triggered.samples))),
        ra=None if truth is None else Proportion.of(scores(adapter, adapter.samples(truth))),
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
    path = plain_file(Path(path))
    try:
        pattern, mask = _archive(path) if path.suffix == ".npz" else _picture(path)
    except BadInputError:
        raise
    except Exception as error:  # damaged files fail in many ways
        raise BadInputError(f"trigger file {path} cannot be read: {one_line(error)}") from error
    return FileTrigger(target=target, pattern=pattern, mask=mask)


def learnt_tensors(path: Path) -> dict[str, Tensor]:
    """Return what an attack has learnt (its ``fitted``) from a safetensors file.

    Raises:
        BadInputError: If the file cannot be read.
    """
    try:
        return load_file(plain_file(path))
    except Exception as error:  # damaged files fail in many ways
        raise BadInputError(f"trigger file {path} cannot be read: {one_line(error)}") from error


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
    with open_picture(path) as image:
        if "A" not in image.getbands():
            raise BadInputError(
                f"trigger {path} must have an alpha channel that says where the trigger is, got "
                f"mode {image.mode}"
            )
        pixels = torch.from_numpy(np.asarray(image.convert("RGBA")).copy()).float() / 255
    colour, mask = pixels[..., :3].movedim(-1, 0), pixels[None, ..., 3]
    grey = bool((colour == colour[:1]).all())
    return colour[:1] if grey else colour, mask
