"""Which defenses stand in a table, with fine-tuning and FT-SAM of the same budget beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mmdefense import registry
from mmdefense.defenses.base import Defense, TrainingDefense
from mmdefense.pipeline.purification import configured

__all__ = ["Contender", "Lineup", "with_baselines"]

_BASELINE = "fine-tuning"
_BASELINES = (_BASELINE, "ft-sam")
"""What every defense stands beside: what the field compares with first."""


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """A defense in a grid.

    Attributes:
        defense: Its registered name.
        settings: Those that are not at their defaults.
        label: What tables call it; by default its name, with the settings behind it.
    """

    defense: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        given = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return self.label or (f"{self.defense} ({given})" if given else self.defense)

    def build(self, seed: int) -> Defense:
        """Return the defense with its settings.

        Raises:
            BadInputError: If the name, a setting or a value is unknown.
        """
        return configured(self.defense, {**self.settings, "seed": seed})


@dataclass(frozen=True)
class Contender:
    """A row of a table.

    Attributes:
        label: What the table calls it.
        defense: With its settings.
        baseline: The label of plain fine-tuning with its budget; empty where there is none.
    """

    label: str
    defense: Defense
    baseline: str = ""


def with_baselines(defenses: Mapping[str, Defense]) -> list[Contender]:
    """Return defenses with plain fine-tuning and FT-SAM of the same budget behind each.

    A budget is steps, learning rates, batch size and clipping. Each budget has its baselines once,
    and none that stands among the defenses already. Where no defense trains, the baselines
    have their own budgets.

    Args:
        defenses: By the name that the table gives them.
    """
    rows: list[Contender] = []
    labels = [(defense, label) for label, defense in defenses.items()]
    for label, defense in defenses.items():
        beside, behind = "", []
        for name, baseline in _like(defense):
            known = next((known for other, known in labels if other == baseline), "")
            if not known:
                known = f"{name} like {label}"
                labels.append((baseline, known))
                behind.append(Contender(known, baseline))
            beside = known if name == _BASELINE else beside
        rows += [Contender(label, defense, beside), *behind]
    if defenses and not any(isinstance(defense, TrainingDefense) for defense in defenses.values()):
        seed = next(iter(defenses.values())).seed
        rows += [Contender(name, configured(name, {"seed": seed})) for name in _registered()]
    return rows


def _like(defense: Defense) -> Iterator[tuple[str, Defense]]:
    """Yield the baselines with the budget of a defense that trains, each with its name."""
    if not isinstance(defense, TrainingDefense):
        return
    budget = {part.name: getattr(defense, part.name) for part in fields(TrainingDefense)}
    for name in _registered():
        kind = registry.load("defenses", name)
        if type(defense) is not kind:
            yield name, kind(**budget)


def _registered() -> Sequence[str]:
    known = registry.names("defenses")
    return [name for name in _BASELINES if name in known]
