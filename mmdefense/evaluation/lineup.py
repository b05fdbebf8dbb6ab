"""The rows of a table: defenses, and fine-tuning and FT-SAM with the same budget."""

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
"""The baselines of every defense: what the field compares with first."""


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """A defense in a grid.

    Attributes:
        defense: Its registered name.
        settings: Settings that differ from the defaults.
        label: Name in tables; by default the name of the defense and its settings.
    """

    defense: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """Name in tables."""
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
        label: Name in the table.
        defense: The defense with its settings.
        baseline: The label of plain fine-tuning with its budget; empty if there is none.
    """

    label: str
    defense: Defense
    baseline: str = ""


def with_baselines(defenses: Mapping[str, Defense]) -> list[Contender]:
    """Return the defenses, each followed by plain fine-tuning and FT-SAM with the same budget.

    A budget is steps, learning rates, batch size and clipping. Each budget gets its baselines once,
    except those that are among the defenses already. If no defense trains, the baselines have
    their own budgets.

    Args:
        defenses: Defenses by their name in the table.
    """
    rows: list[Contender] = []
    labels = [(defense, label) for label, defense in defenses.items()]
    for label, defense in defenses.items():
        baseline_label, added = "", []
        for name, baseline in _baselines_of(defense):
            known = next((known for other, known in labels if other == baseline), "")
            if not known:
                known = f"{name} like {label}"
                labels.append((baseline, known))
                added.append(Contender(known, baseline))
            baseline_label = known if name == _BASELINE else baseline_label
        rows += [Contender(label, defense, baseline_label), *added]
    if defenses and not any(isinstance(defense, TrainingDefense) for defense in defenses.values()):
        seed = next(iter(defenses.values())).seed
        rows += [Contender(name, configured(name, {"seed": seed})) for name in _registered()]
    return rows


def _baselines_of(defense: Defense) -> Iterator[tuple[str, Defense]]:
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
