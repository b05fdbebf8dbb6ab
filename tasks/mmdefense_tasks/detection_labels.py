"""Numbers the classes of a detection set as the model numbers them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmdefense.errors import BadInputError
from mmdefense.notes import note
from mmdefense_tasks.detection_files import ObjectSet
from mmdefense_tasks.options import Options

__all__ = ["numbered"]

_FORMS = ("ids", "dense")
_NAMELESS = "(no name) {}"  # of a class that the model has and the data has not


def numbered(
    found: ObjectSet, options: Options, where: str | Path
) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each class of a set, and the class name of each label.

    Labels count the model's classes from 0. A class is found by its name where the model's names
    are known. Else the model's numbers decide: as many classes as the set has are the set's in
    order; where there are more, COCO category ids are the model's numbers if they fit.

    Args:
        found: The set.
        options: ``labels`` (``"ids"`` or ``"dense"``) decides; ``classes`` are the model's names;
            ``numbers``, which the model states, is the range of its numbers.
        where: The data, for messages.

    Raises:
        BadInputError: If the model lacks a class, or the numbering cannot be told.
    """
    form = options.take("labels")
    if form is not None and form not in _FORMS:
        raise BadInputError(f"labels must be one of {', '.join(_FORMS)}, got {form!r}")
    if form is None and (classes := tuple(options.take("classes", ()))):
        return _by_name(found, classes), classes
    numbers = options.take("numbers")
    form = form or _form(found, numbers, where)
    if form == "dense":
        rest = range(len(found.names), 0 if numbers is None else len(numbers))
        return list(range(len(found.names))), (*found.names, *map(_NAMELESS.format, rest))
    if not found.ids:
        raise BadInputError(f"labels=ids needs COCO json, and {where} is none; leave it out")
    numbers = range(max(found.ids) + 1) if numbers is None else numbers
    return _by_id(found, numbers, where)


def _by_name(found: ObjectSet, classes: Sequence[str]) -> list[int]:
    place = {_folded(name): label for label, name in reversed(list(enumerate(classes)))}
    labels = [place.get(_folded(name), -1) for name in found.names]
    hint = "; --read labels=ids takes the category ids instead" if found.ids else ""
    for entry in found.files:
        if unknown := [found.names[kind] for kind in entry.kinds if labels[kind] < 0]:
            raise BadInputError(
                f"classes must be among the model's {len(classes)} ({', '.join(classes[:6])}), got "
                f"{unknown[0]!r} in {entry.path.name}{hint}"
            )
    return labels


def _folded(name: str) -> str:
    return " ".join(name.split()).casefold()


def _form(found: ObjectSet, numbers: range | None, where: str | Path) -> str:
    """Return which numbering the model's numbers and the ids of the set speak for."""
    if numbers is None or len(numbers) == len(found.names):
        return "dense"
    # In a model that numbers from 0, with one class more, that may be a background before all.
    shifted = 0 in found.ids and len(numbers) == len(found.names) + 1
    if found.ids and set(found.ids) <= set(numbers) and not shifted:
        note(
            f"the model has {len(numbers)} classes and the data {len(found.names)}: labels are the "
            f"COCO category ids of the data ({_few(found.ids)}); --read labels=dense counts them"
        )
        return "ids"
    ids = f" with the COCO category ids {_few(found.ids)}" if found.ids else ""
    choices = "labels=ids takes these ids, labels=dense" if found.ids else "labels=dense"
    raise BadInputError(
        f"data {where} has {len(found.names)} classes ({_few(found.names)}){ids}, but the model "
        f"has {len(numbers)}, numbered {numbers[0]} to {numbers[-1]}, and does not name them; "
        f"give their names (classes), or say how to number: {choices} counts the data's from "
        f"{numbers[0]} (--read labels=...)"
    )


def _few(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")


def _by_id(
    found: ObjectSet, numbers: range, where: str | Path
) -> tuple[list[int], tuple[str, ...]]:
    used = {kind for entry in found.files for kind in entry.kinds}
    if wrong := [found.ids[kind] for kind in sorted(used) if found.ids[kind] not in numbers]:
        raise BadInputError(
            f"category ids of {where} must be among the model's numbers {numbers[0]} to "
            f"{numbers[-1]}, got {wrong[0]}"
        )
    names = dict(zip(found.ids, found.names, strict=True))
    labels = [number - numbers.start for number in found.ids]
    return labels, tuple(names.get(number, _NAMELESS.format(number)) for number in numbers)
