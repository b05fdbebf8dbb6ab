"""Map the classes of a detection set to the model's numbering."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmdefense.class_names import UnknownNameError, few, match
from mmdefense.errors import BadInputError
from mmdefense.notes import note
from mmdefense_tasks.detection_files import ObjectSet
from mmdefense_tasks.options import Options

__all__ = ["numbered"]

_FORMS = ("ids", "dense")
_NAMELESS = "(no name) {}"  # for a class that only the model has


def numbered(
    found: ObjectSet, options: Options, where: str | Path
) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each class of a set, and the class name of each label.

    Labels count the model's classes from 0. If the model's class names are known, classes are
    matched by name. Otherwise: if the model has as many classes as the set, they are matched in
    order; if it has more, COCO category ids are used as the model's numbers if they fit.

    Args:
        found: The set.
        options: ``labels`` (``"ids"`` or ``"dense"``) overrides this; ``classes`` are the model's
            names; ``numbers``, stated by the model, is the range of its numbers.
        where: The data, for messages.

    Raises:
        BadInputError: If the model lacks a class, or the numbering is ambiguous.
    """
    form = options.take("labels")
    if form is not None and form not in _FORMS:
        raise BadInputError(f"labels must be one of {', '.join(_FORMS)}, got {form!r}")
    if form is None and (classes := tuple(options.take("classes", ()))):
        return _by_name(found, classes, where), classes
    numbers = options.take("numbers")
    form = form or _form(found, numbers, where)
    if form == "dense":
        rest = range(len(found.names), 0 if numbers is None else len(numbers))
        return list(range(len(found.names))), (*found.names, *map(_NAMELESS.format, rest))
    if not found.ids:
        raise BadInputError(f"labels=ids needs COCO json, and {where} is not; leave it out")
    numbers = range(max(found.ids) + 1) if numbers is None else numbers
    return _by_id(found, numbers, where)


def _by_name(found: ObjectSet, classes: Sequence[str], where: str | Path) -> list[int]:
    """Return the model's label of each class that has objects; -1 for the others."""
    used = sorted({kind for entry in found.files for kind in entry.kinds})
    try:
        labels = match([found.names[kind] for kind in used], classes, where)
    except UnknownNameError as error:
        ids = ", or use the category ids as labels: --read labels=ids" if found.ids else ""
        raise BadInputError(
            f"{error}; give the model's class names in label order, as the data spells them: "
            f"--classes FILE{ids}"
        ) from error
    place = dict(zip(used, labels, strict=True))
    return [place.get(kind, -1) for kind in range(len(found.names))]


def _form(found: ObjectSet, numbers: range | None, where: str | Path) -> str:
    """Return the numbering that the model's numbers and the ids of the set imply."""
    if numbers is None or len(numbers) == len(found.names):
        return "dense"
    ids = few(map(str, found.ids))
    # If the model counts from 0 and has one more class, class 0 may be the background.
    shifted = 0 in found.ids and len(numbers) == len(found.names) + 1
    fit = bool(found.ids) and set(found.ids) <= set(numbers)
    if fit and not shifted:
        note(
            f"the model has {len(numbers)} classes and the data {len(found.names)}: using the "
            f"COCO category ids ({ids}) as labels; for consecutive labels give --read "
            "labels=dense"
        )
        return "ids"
    with_ids = f" with the COCO category ids {ids}" if ids else ""
    ways = ["labels=dense numbers the data's classes consecutively"] + [
        "labels=ids uses these ids"
    ] * fit
    if numbers[0] == 0 and len(numbers) == len(found.names) + 1:
        ways.append("offset=1 makes 0 the background, as in torchvision's models")
    raise BadInputError(
        (
            f"data {where} has {len(found.names)} classes ({few(found.names)}){with_ids}, but the "
            f"model has {len(numbers)}, numbered {numbers[0]} to {numbers[-1]} and without names; "
            "give their names (--classes FILE), or choose a numbering (--read ...): "
        )
        + "; ".join(ways)
    )


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
