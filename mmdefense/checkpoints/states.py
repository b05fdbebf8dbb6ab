"""The sets of weights that a training checkpoint holds, and which of them belongs to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdefense.checkpoints.pickled import Array, Object
from mmdefense.errors import BadInputError
from mmdefense.notes import note

__all__ = ["Weights", "check_keys", "main_weights", "sets_of_weights", "that_fit"]

TOP = "."
"""The name for the top level of a file when a set of weights is asked for."""

_DEPTH, _WIDEST = 4, 8
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params")
_PREFIXES = ("module", "_orig_mod", "model", "net")  # of DataParallel, torch.compile and Lightning


@dataclass(frozen=True)
class Weights:
    """A set of weights in a file.

    Attributes:
        name: The keys that lead to it, joined by dots; empty at the top.
        prefix: The prefix of the keys in the file, with its last dot.
        tensors: The weights under their keys without that prefix.
        others: Everything else in the same mapping, under its keys in the file.
    """

    name: str
    tensors: Mapping[str, Tensor]
    prefix: str = ""
    others: Mapping[str, Tensor] | None = None

    @property
    def place(self) -> str:
        """The ``--weights`` value that selects this set."""
        return f"{self.name}.{self.prefix}".strip(".") or TOP

    def below(self, prefix: str) -> Weights:
        """Return the part whose keys start with a prefix."""
        length, every = len(prefix), self.tensors.items()
        inside = {key[length:]: value for key, value in every if key.startswith(prefix)}
        others = {key: value for key, value in every if not key.startswith(prefix)}
        return Weights(self.name, inside, prefix, others)


def sets_of_weights(held: Any) -> list[Weights]:
    """Return each mapping in a checkpoint that holds tensors by name, outermost first."""
    return list(_sets(held, ()))


def _sets(held: Any, place: tuple[str, ...]) -> Iterator[Weights]:
    entries = held.items if isinstance(held, Object) else held
    if not isinstance(entries, Mapping) or len(place) > _DEPTH:
        return
    named = {key: _as_tensor(value) for key, value in entries.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield Weights(".".join(place), tensors)
    for key, value in named.items():
        yield from _sets(value, (*place, key))


def _as_tensor(value: Any) -> Any:
    array = value.value() if isinstance(value, Array) else None
    if array is None or array.dtype.kind not in "biuf" or array.dtype.itemsize > _WIDEST:
        return value
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def main_weights(sets: list[Weights], subject: str, asked: str | None = None) -> Weights:
    """Return the set to use when there is no model to match.

    Args:
        sets: What the file holds.
        subject: The file, for messages.
        asked: The place of one, as the user gives it.

    Raises:
        BadInputError: If there is none.
    """
    chosen = _asked(sets, subject, asked)
    weights = [found for found in chosen if "optim" not in found.name] or chosen
    named = {found.name: found for found in reversed(weights)}
    first = next((name for name in _WRAPPERS if name in named), None)
    largest = max(weights, key=lambda found: sum(v.numel() for v in found.tensors.values()))
    best = largest if first is None else named[first]
    twins = [one for one in weights if one is not best and len(one.tensors) == len(best.tensors)]
    if twins:
        note(
            f"{subject} has several sets of weights; only {best.place} was scanned, not "
            f"{_list(twins)}: choose with --weights"
        )
    return best


def _asked(sets: list[Weights], subject: str, asked: str | None) -> list[Weights]:
    """Return the sets, or their parts by a prefix, at the given place."""
    if not sets:
        raise BadInputError(
            f"{subject} must hold a state dict (names to tensors), got none; save "
            "model.state_dict()"
        )
    if asked is None:
        return sets
    found = [one for one in sets if one.place == asked or one.name.startswith(f"{asked}.")]
    for one in sets:
        if not one.name or asked.startswith(f"{one.name}."):
            part = one.below(asked[len(one.name) :].strip(".") + ".")
            found += [part] if part.tensors else []
    if not found:
        raise BadInputError(f"{subject} has no weights {asked!r}; choose from {_list(sets)}")
    return found


def _list(sets: list[Weights]) -> str:
    return _some([one.place for one in sets], 8)


def that_fit(
    held: Any, expected: Mapping[str, Tensor], file: str, model: str, asked: str | None = None
) -> Weights:
    """Return the one set of weights whose keys and shapes are those of a model.

    It may be at any depth of the checkpoint, and all of its keys may have a prefix, as wrappers add
    them.

    Args:
        held: What the file holds.
        expected: The state dict of the model.
        file: Its name, for messages.
        model: What was built, for messages.
        asked: The place of one, as the user gives it.

    Raises:
        BadInputError: If none fits, or more than one does.
    """
    subject = f"model file {file}"
    sets = _asked(sets_of_weights(held), subject, asked)
    every = [part for one in sets for part in _by_prefix(one, expected)]
    fitting = [part for part in every if not any(_misfits(part, expected))]
    whole = [part for part in fitting if not part.others or part.place == asked]
    if not whole and fitting:
        beside = _some(list(fitting[0].others or {}))
        raise BadInputError(
            f"{subject} holds more than the weights of {model}: {beside}; to use "
            f"{fitting[0].place} only, give --weights {fitting[0].place}"
        )
    if not whole:
        best = max(every, key=lambda part: len(part.tensors.keys() & expected.keys()))
        check_keys(*_misfits(best, expected), f"{file} do not match {model}")
    if len(whole) > 1 and not all(_equal(whole[0], other) for other in whole[1:]):
        raise BadInputError(
            f"{subject} holds {len(whole)} sets of weights that fit {model}: {_list(whole)}; "
            f"choose one, for example --weights {whole[0].place}"
        )
    return whole[0]


def _by_prefix(one: Weights, expected: Mapping[str, Tensor]) -> list[Weights]:
    """Return a set under each prefix that turns keys of the model into keys of the file."""
    if one.prefix:
        return [one]
    anchors = sorted(expected, key=len)[-3:]
    prefixes = {
        key.removesuffix(anchor)
        for anchor in anchors
        for key in one.tensors
        if key.endswith(anchor) and key.removesuffix(anchor)[-1:] in {"", "."}
    }
    return [one.below(prefix) for prefix in sorted(prefixes)] or [one.below(_common(one))]


def _common(one: Weights) -> str:
    """Return the prefixes of wrappers that all keys have."""
    prefix = ""
    while added := next(
        (p for p in _PREFIXES if all(k.startswith(f"{prefix}{p}.") for k in one.tensors)), None
    ):
        prefix += f"{added}."
    return prefix


def _misfits(
    part: Weights, expected: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Return the keys that are missing, that are unexpected, and that have another shape."""
    given = {value.data_ptr() for key, value in expected.items() if key in part.tensors}
    missing = [
        key
        for key, value in expected.items()
        if key not in part.tensors
        and not key.endswith("num_batches_tracked")
        and value.data_ptr() not in given  # a shared tensor, stored once
    ]
    unexpected = [part.prefix + key for key in part.tensors if key not in expected]
    shapes = [
        f"{key} is {tuple(part.tensors[key].shape)} but must be {tuple(value.shape)}"
        for key, value in expected.items()
        if key in part.tensors and part.tensors[key].shape != value.shape
    ]
    return missing, unexpected, shapes


def _equal(one: Weights, other: Weights) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        value.dtype == other.tensors[key].dtype and torch.equal(value, other.tensors[key])
        for key, value in one.tensors.items()
    )


def check_keys(missing: list[str], unexpected: list[str], shapes: list[str], subject: str) -> None:
    """Refuse weights that do not fit, naming the first few of each kind.

    Args:
        missing: Keys that only the model has.
        unexpected: Keys that only the weights have.
        shapes: Descriptions of keys of another shape.
        subject: Whose weights fit what; a phrase for the message.

    Raises:
        BadInputError: If there is any.
    """
    kinds = (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes))
    parts = [f"{label}: {_some(names)}" for label, names in kinds if names]
    if parts:
        raise BadInputError(f"the weights of {subject}; {'; '.join(parts)}")


def _some(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
