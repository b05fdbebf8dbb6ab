"""What a scan finds: findings, the record that joins them, and a verdict that claims no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from mmdefense.errors import BadInputError, printable
from mmdefense.shown import Shown, as_html
from mmdefense.tabular import Table

__all__ = [
    "FAILING",
    "LEVELS",
    "Finding",
    "Level",
    "Rule",
    "ScanRecord",
    "ScanVerdict",
    "reaches",
    "worst_level",
]

Level = Literal["info", "low", "medium", "high"]

LEVELS: tuple[Level, ...] = get_args(Level)
"""From weak to strong."""

FAILING: tuple[Level, ...] = LEVELS[1:]
"""Those that a pipeline may fail on: what any model has is none of them."""

MAX_TEXT = 2000
"""Characters of a subject or value that come from a file; what is longer is cut. Ours."""

PARTS = ("files", "weights", "behaviour")


@dataclass(frozen=True, kw_only=True, repr=False)
class Finding(Shown):
    """One thing that a reviewer should know.

    Attributes:
        id: The rule that found it, for example ``"pickle-import"``.
        level: How strong it is: ``"info"`` is a figure that any model has, to keep and compare;
            ``"low"`` is a remark on what stands out, ``"medium"`` wants a look before the model is
            loaded, ``"high"`` means do not load it.
        subject: The file, layer or class; what lies in an archive stands behind an ``!``.
        measured: What was looked at.
        value: What was found there.
        reference: What it was held against.
        meaning: What it means.
        blind_spot: What the rule cannot see.
        numbers: Numbers behind the value, as JSON has them.
        pictures: Pictures of the triggers that were found, as ``data:`` addresses by caption.
        known: Whether a baseline, an earlier report, has it; none where there is no baseline.
    """

    id: str
    level: Level
    subject: str
    measured: str
    value: str | float
    reference: str
    meaning: str
    blind_spot: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    known: bool | None = None

    @property
    def shown(self) -> str:
        """The value for a person."""
        return f"{self.value:.3g}" if isinstance(self.value, float) else str(self.value)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise BadInputError(f"level must be one of {', '.join(LEVELS)}, got {self.level!r}")
        for name in ("subject", "value"):
            text = getattr(self, name)
            if isinstance(text, str) and len(text) > MAX_TEXT:
                short = f"{text[: MAX_TEXT // 2]} ... {text[-MAX_TEXT // 2 :]}"
                object.__setattr__(self, name, f"{short} ({len(text)} characters)")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What all findings of one kind have in common.

    Attributes:
        id: As in :class:`Finding`; so are all others.
        level: The level where a finding gives none of its own.
        measured: See :class:`Finding`.
        reference: See :class:`Finding`.
        meaning: See :class:`Finding`.
        blind_spot: See :class:`Finding`.
    """

    id: str
    level: Level
    measured: str
    reference: str
    meaning: str
    blind_spot: str

    def found(
        self,
        subject: str,
        value: str | float,
        *,
        level: Level | None = None,
        reference: str | None = None,
        numbers: Mapping[str, Any] | None = None,
        pictures: Mapping[str, str] | None = None,
    ) -> Finding:
        """Return a finding of this rule."""
        return Finding(
            id=self.id,
            level=level or self.level,
            subject=subject,
            measured=self.measured,
            value=value,
            reference=reference or self.reference,
            meaning=self.meaning,
            blind_spot=self.blind_spot,
            numbers=numbers or {},
            pictures=pictures or {},
        )


def worst_level(findings: Iterable[Finding]) -> Level | None:
    """Return the strongest level, or none where there is no finding."""
    return max((finding.level for finding in findings), key=LEVELS.index, default=None)


def reaches(findings: Iterable[Finding], level: Level) -> bool:
    """Whether any finding is as strong as ``level`` or stronger."""
    worst = worst_level(findings)
    return worst is not None and LEVELS.index(worst) >= LEVELS.index(level)


@dataclass(frozen=True, kw_only=True)
class ScanVerdict:
    """What may be concluded, in one sentence or two.

    Attributes:
        level: The strongest level that was found; none where nothing was.
        text: Never says that a model is clean: no scan can know that.
    """

    level: Level | None
    text: str


@dataclass(frozen=True, kw_only=True, repr=False)
class ScanRecord:
    """All that a scan looked at and found.

    Attributes:
        model: What was scanned, as the user called it.
        findings: Strongest first.
        parts: Which of files, weights and behaviour were looked at.
        files: SHA-256 of each file by its name, as ``sha256sum`` prints it.
        version: Of mmdefense.
    """

    model: str
    findings: Sequence[Finding]
    parts: Sequence[str]
    files: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    def __post_init__(self) -> None:
        ordered = sorted(self.findings, key=lambda found: -LEVELS.index(found.level))
        object.__setattr__(self, "findings", tuple(ordered))

    def __repr__(self) -> str:
        named = [f"{found.level}: {found.id}, {found.subject}" for found in self.findings[:5]]
        more = [f"... {len(self.findings)} findings in all"] if len(self.findings) > 5 else []
        lines = [f"Scan of {self.model}: {self.verdict.text}", *named, *more]
        return "\n  ".join(map(printable, lines))

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    def table(self) -> Table:
        """Return the findings, a row each, to write as CSV or JSON or to read by pandas."""
        names = ("level", "id", "subject", "value", "measured", "reference", "meaning", "known")
        rows = [
            {"model": self.model, **{name: getattr(found, name) for name in names}}
            for found in self.findings
        ]
        return Table(rows, f"Scan of {self.model}")

    @property
    def verdict(self) -> ScanVerdict:
        """What may be concluded."""
        level = worst_level(self.findings)
        return ScanVerdict(
            level=level, text=f"{self._found(level)}{self._known()} {self._limits()}"
        )

    @property
    def new(self) -> Sequence[Finding]:
        """The findings that the baseline does not have; all of them where there is none."""
        return [found for found in self.findings if not found.known]

    def is_of(self, files: Mapping[str, str]) -> bool:
        """Say whether all of these files, given as SHA-256 by name, were scanned."""
        return bool(files) and set(files.values()) <= set(self.files.values())

    def _found(self, level: Level | None) -> str:
        count = sum(finding.level == level for finding in self.findings)
        if level is None:
            return "Nothing was found by what was looked at."
        if level == "info":
            figures = "1 figure" if count == 1 else f"{count} figures"
            return f"Nothing was found by what was looked at, but {figures} for information."
        worst = [finding.id for finding in self.findings if finding.level == level]
        many = f"{count} finding{'s' * (count > 1)} of {level} level"
        if len(set(worst)) < count:
            many += f", of {len(set(worst))} kind{'s' * (len(set(worst)) > 1)}"
        harmless = all(name.startswith("behaviour") for name in worst)  # to load it
        advice = {
            "high": "do not use this model as it is; purify it, and scan the result."
            if harmless
            else "do not load this model.",
            "medium": f"look at them before this model is {'used' if harmless else 'loaded'}.",
            "low": "remarks, none of which alone speaks against the model.",
        }
        return f"{many}: {advice[level]}"

    def _known(self) -> str:
        if all(found.known is None for found in self.findings):
            return ""
        worst = worst_level(self.new)
        newest = f", the worst of {worst} level" if worst else ""
        return f" Not in the baseline: {len(self.new)} of {len(self.findings)}{newest}."

    def _limits(self) -> str:
        looked = f"Looked at: {', '.join(self.parts) or 'nothing'}"
        left = [part for part in PARTS if part not in self.parts]
        not_looked = f"; not looked at: {', '.join(left)}" if left else ""
        return f"{looked}{not_looked}. No trigger found is not proof that there is none."
