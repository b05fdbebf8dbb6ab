"""Map the labels of data to the model's class indices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from mmdefense.class_names import UnknownNameError, contradicted, few, match
from mmdefense.errors import BadInputError
from mmdefense.notes import note
from mmdefense_tasks.options import Options

__all__ = ["MOST_CLASSES", "Named", "Order", "under_the_models_labels"]

Order = Literal["text", "number"]
"""How class folders are numbered: in text order, or by numeric folder names."""

MOST_CLASSES = 10**6
"""The largest label; ours."""

_SYNSET = re.compile(r"n\d{8}")  # a WordNet id, used by ImageNet as folder name


class Named(Protocol):
    """A dataclass with labels and the name of each."""

    @property
    def labels(self) -> Tensor:
        """Shape ``(N,)``, int64."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each label, if known."""
        ...


S = TypeVar("S", bound=Named)


def under_the_models_labels(source: S, options: Options, where: object, *, counted: bool) -> S:
    """Return data with its labels mapped to those of the model.

    Names are matched to the model's class names, of which some may be missing. If the model has
    none, or with ``order="number"``, integer folder names are the labels themselves, and labels
    stored in the data are not changed; other folders are numbered in text order, as torchvision's
    ``ImageFolder`` does for all, and as ``order="text"`` requests.

    Args:
        source: A dataclass; its labels index its own class names, if it has any.
        options: ``classes``, the model's class names in order, and ``order``.
        where: Name of the data in messages.
        counted: Whether the labels just index the names, as for a folder per class; otherwise they
            are stored in the data.

    Raises:
        BadInputError: If a name is not one of the model's, or labels do not fit the names.
    """
    given, own = tuple(options.stated("classes") or ()), source.classes
    if not own:
        names = tuple(options.take("classes", ()))
        return replace(source, classes=_checked(names, source.labels, where))  # type: ignore[type-var]
    _checked(own, source.labels, where)
    order = options.take("order")
    if order is None:
        model = tuple(options.take("classes", ()))
        _check_count(model, given)
        labels, names = _placed(own, model, where, counted)
    elif order == "text":
        _check_count(own, given)
        labels, names = [sorted(own).index(name) for name in own], tuple(sorted(own))
    elif order == "number":
        labels, names = _by_number(own, where, counted), given or (() if counted else own)
    else:
        raise BadInputError(f"order must be text or number, got {order!r}")
    if given and contradicted(names, given):
        names = ()  # the user's names take precedence over the model's
    placed: Tensor = torch.tensor(labels)[source.labels]
    return replace(source, labels=placed, classes=names)  # type: ignore[type-var]


def _check_count(names: Sequence[str], given: Sequence[str]) -> None:
    """Reject class names if their number differs from the model's."""
    if given and len(names) != len(given):
        raise BadInputError(
            f"classes must match the model's {len(given)} ({few(given)}), got {len(names)} "
            f"({few(names)})"
        )


def _checked(names: tuple[str, ...], labels: Tensor, where: object) -> tuple[str, ...]:
    """Return the names, checked to be one per label; labels count from 0."""
    if len(labels) and int(labels.min()) < 0:
        raise BadInputError(
            f"labels of {where} must start at 0, got {int(labels.min())}; drop the samples that "
            "have no label"
        )
    if names and len(labels) and int(labels.max()) >= len(names):
        raise BadInputError(
            f"labels of {where} must have a class name each, got {len(names)} names ({few(names)}) "
            f"and a label {int(labels.max())}"
        )
    return names


def _placed(
    own: Sequence[str], model: tuple[str, ...], where: object, counted: bool
) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each name, and the name of each label."""
    numbered = all(name.isdecimal() for name in own)
    if not model:
        if counted and numbered:
            return _with_note(_numbers(own, where), own, where), ()
        return list(range(len(own))), tuple(own)
    try:
        return match(own, model, where), model
    except UnknownNameError as error:
        if counted and numbered:
            return _with_note(_numbers(own, where), own, where), model
        if not counted and [*own] == [str(label) for label in range(len(own))]:
            return list(range(len(own))), model  # names that carry no further information
        if counted and len(own) == len(model) and all(map(_SYNSET.fullmatch, own)):
            note(f"folders of {where} are named by WordNet ids; labels follow their sorted order")
            return list(range(len(own))), model
        remedy = (
            "text to number them in text order"
            if counted
            else ("number to use the numbers as labels")
        )
        raise BadInputError(
            f"{error}; give the model's class names in label order, as the data spells them: "
            f"--classes FILE, or add --read order={remedy}"
        ) from error


def _by_number(own: Sequence[str], where: object, counted: bool) -> list[int]:
    return _numbers(own, where) if counted else list(range(len(own)))


def _numbers(own: Sequence[str], where: object) -> list[int]:
    """Return the numbers in folder names."""
    if wrong := [name for name in own if not name.isdecimal()]:
        raise BadInputError(
            f"for order=number class folders of {where} must be integers, got {few(wrong)}"
        )
    if large := [name for name in own if len(name) > 9 or int(name) > MOST_CLASSES]:
        raise BadInputError(
            f"numbered class folders of {where} must be labels of at most {MOST_CLASSES}, got "
            f"{few(large)}"
        )
    numbers = [int(name) for name in own]
    if twice := [name for name in own if numbers.count(int(name)) > 1]:
        raise BadInputError(f"class folders of {where} must be different, got {few(twice)}")
    return numbers


def _with_note(numbers: list[int], own: Sequence[str], where: object) -> list[int]:
    """Return the numbers, with a note if torchvision would number the folders differently."""
    if numbers != list(range(len(own))):
        note(
            f"the numbered class folders of {where} are taken as labels; for a model trained "
            f"with torchvision's ImageFolder, which sorts them as text ({few(own)}), add --read "
            "order=text"
        )
    return numbers
