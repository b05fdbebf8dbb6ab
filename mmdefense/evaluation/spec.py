"""A grid as a file: TOML with the axes as lists."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdefense.errors import BadInputError
from mmdefense.evaluation.cases import CleanData, described_case, named_cases
from mmdefense.evaluation.grid import VIEWS, Grid
from mmdefense.evaluation.lineup import Lineup
from mmdefense.evaluation.zoo import zoo_named
from mmdefense.protocol import Case
from mmdefense.settings import checked_settings

__all__ = ["read_spec"]

_KEYS = {
    *("cases", "shared", "zoo", "seeds", "views", "clean", "retune"),
    *("defenses", "baselines", "device"),
}
_OF_DEFENSE = {"name", "label", "settings"}


def read_spec(path: Path) -> Grid:
    """Return the grid that a file describes.

    Args:
        path: TOML such as::

            cases = ["digits-badnets", { base = "digits-badnets", ratio = 0.01 }]
            shared = { training = { steps = 500 } }  # defaults of each case that is a table
            seeds = 3                     # a number, or a list of seeds
            views = ["standard"]
            clean = [0.05, { share = 0.05, kind = "unseen" }]
            retune = 5                    # poisoned samples; left out if not given
            zoo = true                    # victims of the zoo, by default those that are here
            defenses = ["tsbd", { name = "fip", settings = { radius = 4.0 } }]

    Raises:
        BadInputError: If it cannot be read, or a key, name or value is unknown.
    """
    try:
        held = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"grid {path} cannot be read as TOML: {error}") from error
    _check_keys(held, _KEYS, path)
    if "defenses" not in held or not isinstance(held["defenses"], list):
        raise BadInputError(f"grid {path} must list its defenses, such as defenses = ['fip']")
    zoo = held.get("zoo", False)
    if not isinstance(zoo, bool):
        raise BadInputError(f"zoo of {path} must be true or false, got {zoo!r}")
    seeds = held.get("seeds", [0] if zoo else 3)
    if isinstance(seeds, int):
        seeds = list(range(seeds))
    views = _listed(held, "views", str, path) or ["standard"]
    for name in views:
        if name not in VIEWS:
            raise BadInputError(f"views of {path} must be among {', '.join(VIEWS)}, got {name!r}")
    try:
        shared = _shared(held)
        entries = _entries(held, "cases", path)
        if zoo:
            cases = [*zoo_named(entries)]
        else:
            cases = [_case(entry, shared) for entry in entries] or named_cases()
        clean = [_clean(entry) for entry in _entries(held, "clean", path)] or [CleanData()]
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from error
    retune = held.get("retune", 0)
    if not isinstance(retune, int) or isinstance(retune, bool) or retune < 0:
        raise BadInputError(
            f"retune of {path} must be a number of poisoned samples, such as 5, got {retune!r}"
        )
    return Grid(
        cases=cases,
        defenses=[_lineup(entry, path) for entry in held["defenses"]],
        seeds=_listed({"seeds": seeds}, "seeds", int, path),
        baselines=bool(held.get("baselines", True)),
        views=views,
        clean=clean,
        retune=retune,
        device=str(held.get("device", "cpu")),
        zoo=zoo,
    )


def _entries(held: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """Return the entries of an axis; a single one may be given without brackets."""
    values = held.get(key, [])
    return values if isinstance(values, list) else [values]


def _shared(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the defaults of each case that is a table."""
    shared = held.get("shared", {})
    if not isinstance(shared, Mapping):
        raise BadInputError(f"shared must be a table of keys of a case, got {shared!r}")
    return shared


def _case(entry: Any, shared: Mapping[str, Any]) -> Case:
    if isinstance(entry, Mapping):
        return described_case({**shared, **entry})
    return described_case({"base": entry})


def _clean(entry: Any) -> CleanData:
    """Return clean data from a share or a table of share and kind."""
    given = entry if isinstance(entry, Mapping) else {"share": entry}
    return CleanData(**checked_settings(CleanData, given))


def _check_keys(held: Mapping[str, Any], keys: set[str], path: Path) -> None:
    for key in held:
        if key not in keys:
            raise BadInputError(
                f"grid {path} has no key {key!r}; known are {', '.join(sorted(keys))}"
            )


def _listed(held: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    values = held.get(key, [])
    kinds = (int, float) if kind is float else kind
    if not isinstance(values, list) or not all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    ):
        raise BadInputError(
            f"{key} of {path} must be a list of {kind.__name__} values, got {values!r}"
        )
    return values


def _lineup(entry: Any, path: Path) -> Lineup:
    if isinstance(entry, str):
        return Lineup(defense=entry)
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise BadInputError(
            f"a defense in {path} must be a name or a table with a name, got {entry!r}"
        )
    _check_keys(entry, _OF_DEFENSE, path)
    return Lineup(
        defense=str(entry["name"]),
        settings=dict(entry.get("settings", {})),
        label=str(entry.get("label", "")),
    )
