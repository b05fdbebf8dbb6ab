"""Cases by name, and cases that differ from a known one in data, network, attack or ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from mmdefense import registry
from mmdefense.data.shifts import SHIFTS, Shift
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.protocol import Case
from mmdefense.settings import OpenShare, check_settings, checked_settings
from mmdefense.training import Training

__all__ = ["KINDS", "Change", "CleanData", "all_cases", "described_case", "named_cases"]

Change = Literal[Shift, "other"]
"""How clean data differs from the victim's training data."""

Kind = Literal["seen", "unseen", Change]
"""Kind of clean data.

``"seen"`` and ``"unseen"``: the victim was, or was not, trained on these samples too. ``"noisy"``
and ``"blurred"``: the samples of the case, altered; see :mod:`mmdefense.data.shifts`. ``"other"``:
images of other classes, labelled by the victim; see :mod:`mmdefense.evaluation.others`.
"""

KINDS: tuple[Kind, ...] = ("seen", "unseen", *SHIFTS, "other")

_PLAIN = ("name", "task", "data", "model", "seen")
_NEEDED = ("name", "task", "data", "model", "training")
_CHANGEABLE = {*_NEEDED, "base", "attack", "ratio", "settings", "seen"}


@dataclass(frozen=True, kw_only=True)
class CleanData:
    """The clean data that the defenses of a grid get.

    Attributes:
        share: Share of the training set; by default that of the case.
        kind: Kind of data; by default ``"seen"`` or ``"unseen"``, as the case says.
    """

    share: OpenShare | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def change(self) -> Change | None:
        """How the samples differ from the victim's training data; None if they do not."""
        return None if self.kind in {"seen", "unseen"} else self.kind  # type: ignore[return-value]

    def of(self, case: Case) -> Case:
        """Return the case with this share of clean data, seen by the victim or not."""
        seen = self.kind == "seen" if self.kind in {"seen", "unseen"} else case.seen
        return replace(case, clean=self.share or case.clean, seen=seen)


def all_cases() -> dict[str, Case]:
    """Return the cases of all tasks whose libraries are installed, by name."""
    found: dict[str, Case] = {}
    for name in registry.names("tasks"):
        with suppress(UnsupportedError):
            found |= {case.name: case for case in registry.load("tasks", name)().cases()}
    return found


def named_cases(names: Sequence[str] | None = None) -> list[Case]:
    """Return the cases of these names, or all.

    Raises:
        BadInputError: If a name is unknown.
    """
    known = all_cases()
    if unknown := [name for name in names or () if name not in known]:
        raise BadInputError(f"unknown case {unknown[0]!r}; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def described_case(given: Mapping[str, Any]) -> Case:
    """Return the case that a file or an option describes.

    Args:
        given: ``base``, the name of a known case, and what differs from it: ``data``, ``model``,
            ``attack`` (``"none"`` for a clean model), ``ratio``, further ``settings`` of the
            attack, ``training`` (fields of :class:`~mmdefense.training.Training`), ``seen``, and a
            ``name``. Without a base, name, task, data, model and training are needed.

    Raises:
        BadInputError: If a key, name or value is unknown or missing.
    """
    if unknown := sorted(given.keys() - _CHANGEABLE):
        raise BadInputError(
            f"a case has no {unknown[0]!r}; known are {', '.join(sorted(_CHANGEABLE))}"
        )
    base = named_cases([str(given["base"])])[0] if "base" in given else None
    missing = [name for name in _NEEDED if name not in given]
    if base is None and missing:
        raise BadInputError(
            f"a case without a base needs {', '.join(_NEEDED)}; {', '.join(missing)} is missing"
        )
    kept = {name: value for name, value in given.items() if name in _PLAIN}
    attack = given.get("attack", base and base.attack)
    attack = None if attack == "none" else attack
    settings = dict(base.settings) if base and attack == base.attack else {}
    settings |= given.get("settings", {})
    settings |= {"ratio": given["ratio"]} if "ratio" in given else {}
    trained = checked_settings(Training, given.get("training", {}))
    if base is None:
        case = Case(**kept, training=Training(**trained), attack=attack, settings=settings)
    else:
        changes = ", ".join(f"{key}={value}" for key, value in given.items() if key != "base")
        kept.setdefault("name", f"{base.name} ({changes})" if changes else base.name)
        training = replace(base.training, **trained)
        case = replace(base, **kept, training=training, attack=attack, settings=settings)
    return _checked(case)


def _checked(case: Case) -> Case:
    """Return a case if its task, attack and settings are known and fit together."""
    checked_settings(Case, {name: getattr(case, name) for name in _PLAIN})
    registry.load("tasks", case.task)
    if case.attack is None:
        if case.settings:
            raise BadInputError(
                f"case {case.name!r} has no attack, so {', '.join(case.settings)} has no effect; "
                "name an attack"
            )
        return case
    kind = registry.load("attacks", case.attack)
    kind(**checked_settings(kind, case.settings))
    if case.task not in kind.tasks:
        raise BadInputError(
            f"attack {case.attack!r} of case {case.name!r} is for {', '.join(kind.tasks)}, not for "
            f"{case.task}"
        )
    return case
