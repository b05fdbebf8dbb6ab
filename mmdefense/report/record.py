"""What is known about a purification when it is over: what ``purification.json`` states.

Rates (ACC, ASR, RA, DER, a drop, a bound) are fractions in ``[0, 1]``; only what is shown to a
person is in percent. A figure that was not measured is none, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mmdefense.checkpoints.runs import write_atomically
from mmdefense.defenses.guard import KEPT, UNDECIDED, VIOLATED, not_decidable
from mmdefense.defenses.outcome import Choice, TriggerSearch
from mmdefense.errors import BadInputError, one_line
from mmdefense.findings import ScanRecord
from mmdefense.metrics.backdoor import Rates
from mmdefense.report.encoding import JsonRecord, parse_record, plain
from mmdefense.report.evaluation import Evaluation
from mmdefense.tabular import Table

__all__ = [
    "AttackInfo",
    "ComparisonRecord",
    "DataInfo",
    "DefenseInfo",
    "EvidenceInfo",
    "GuardInfo",
    "LayerChange",
    "ModelInfo",
    "Provenance",
    "PurificationRecord",
    "Record",
    "Row",
    "SpectrumInfo",
    "read_record",
    "write_record",
]


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The model, and hashes of its weights as they came and as they went.

    Attributes:
        name: What the user called it: a path, an id or a class.
        architecture: Class name, or what the adapter calls it.
        parameters: Number of parameters.
        sha256_before: Of the weights that were given.
        sha256_after: Of the weights that were handed back; none where many were.
        files_before: SHA-256 of each weight file that was read, as ``sha256sum`` prints it.
        files_after: The same of each weight file that was written.
    """

    name: str
    architecture: str
    parameters: int
    sha256_before: str
    sha256_after: str | None = None
    files_before: Mapping[str, str] = field(default_factory=dict)
    files_after: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The clean data that the defense was given.

    Attributes:
        name: A folder, or the name of a data set.
        samples: Number of samples, hold-out part included.
        fingerprint: A hash of the samples.
    """

    name: str
    samples: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class DefenseInfo:
    """A defense and all its settings, as plain JSON values.

    Attributes:
        name: As in ``mmdefense list``.
        settings: The defense's fields.
        reference: The paper, for example ``"Karim et al., CCS 2024, arXiv:2409.00863"``.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", plain(self.settings))


@dataclass(frozen=True, kw_only=True)
class GuardInfo:
    """The utility guard's judgement, on the hold-out part of the clean data.

    Attributes:
        before: Task metric of the given model.
        after: Task metric of the returned model.
        drop: ``before - after``.
        drop_low: Lower end of the drop's confidence interval.
        drop_high: Upper end.
        bound: Largest drop allowed.
        state: Label of the state that was returned.
        violated: Whether that state breaks the bound, beyond the error of the hold-out part.
        samples: Number of held-out samples, of all folds.
        message: The guard's own words.
        metric: What is measured: the name of the adapter's score.
        confidence: Level of the interval.
        verdict: ``"kept"``, ``"violated"`` or ``"not decidable"``; by default as the interval says.
        needed: Held-out samples that would decide; none where these do, or no number would.
        folds: Number of hold-out parts, each measured on a purification of its own.
        caution: Why a backdoor may remain although the bound is kept; empty if nothing says so.
    """

    before: float
    after: float
    drop: float
    drop_low: float
    drop_high: float
    bound: float
    state: str
    violated: bool
    samples: int
    message: str = ""
    metric: str = "accuracy"
    confidence: float = 0.95
    verdict: str = ""
    needed: int | None = None
    folds: int = 1
    caution: str = ""

    def __post_init__(self) -> None:
        if not self.verdict:  # a record of before there were three
            decided = KEPT if self.drop_high <= self.bound else UNDECIDED
            object.__setattr__(self, "verdict", VIOLATED if self.violated else decided)
        if self.verdict not in {KEPT, VIOLATED, UNDECIDED}:
            raise BadInputError(f"the guard's verdict must be one of three, got {self.verdict!r}")

    @property
    def undecided(self) -> str:
        """That the samples do not decide, and how many would; empty where they do."""
        return not_decidable(self.samples, self.needed) if self.verdict == UNDECIDED else ""


@dataclass(frozen=True, kw_only=True)
class AttackInfo:
    """What is known where the attack is known: in demos and evaluations only.

    Attributes:
        attack: Its name and settings in words, for example ``"BadNets, 10 %, target 0"``.
        before: Rates of the given model on test data.
        after: Rates of the returned model.
        metric: What the task calls what stands as ACC.
    """

    attack: str
    before: Rates
    after: Rates
    metric: str = "accuracy"


@dataclass(frozen=True, kw_only=True)
class SpectrumInfo:
    """How the eigenvalues of the Hessian are spread: those at a node have its weight together.

    Attributes:
        nodes: Eigenvalues, ascending.
        weights: Share of all eigenvalues that each stands for; they sum to one.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """How far one layer moved.

    Attributes:
        layer: Dotted name.
        change: Relative weight change ``||W' - W|| / ||W||`` in the Frobenius norm.
        units: Number of prunable units; zero where the layer owns none.
        pruned: Units whose weights are all zero now and were not before.
    """

    layer: str
    change: float
    units: int = 0
    pruned: int = 0


@dataclass(frozen=True, kw_only=True)
class EvidenceInfo:
    """How much was measured beyond the verdict.

    Attributes:
        level: ``"none"``, ``"fast"`` or ``"full"``.
        seconds: Wall-clock time of it.
        skipped: What was left out and why, a sentence each.
    """

    level: str
    seconds: float = 0.0
    skipped: tuple[str, ...] = ()

    @property
    def left_out(self) -> tuple[str, ...]:
        """What was left out, in sentences for a person."""
        if self.level == "none":
            return ("Nothing beyond the verdict was measured (evidence none).",)
        return tuple(f"{sentence[0].upper()}{sentence[1:]}." for sentence in self.skipped)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What is needed to do it again.

    Attributes:
        seed: The root of all randomness.
        versions: Version by name: mmdefense, torch, python and so on.
        device: For example ``"cpu"``.
        created: Date and time in ISO 8601.
        command: The command line, if there was one.
        threads: Number of threads of each part of the run; several where it went on after a cut.
    """

    seed: int
    versions: Mapping[str, str]
    device: str = ""
    created: str = ""
    command: str = ""
    threads: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One defense against one victim: a line of the results table.

    Attributes:
        defense: Its name.
        before: Rates of the victim.
        after: Rates of the purified model.
        seconds: Wall-clock time of the defense.
        victim: Name of the victim, where a table has several.
        baseline: Name of the row of the same victim that this one has to beat.
        violated: Whether the utility guard was violated.
        undecided: Where the hold-out part was too small for the guard to decide, that in words.
        instead: What the guard returned in place of the final state at the full learning rate;
            empty where that was returned.
        settings: The defense's settings.
        note: What a reader must know besides, such as why nothing was measured.
        retuned_twin: ASR of a clean model after the retuning attack of ``after.retuned``; none
            where there is none.
    """

    defense: str
    before: Rates
    after: Rates
    seconds: float
    victim: str = ""
    baseline: str = ""
    violated: bool = False
    undecided: str = ""
    instead: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    retuned_twin: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", plain(self.settings))


@dataclass(frozen=True, kw_only=True)
class PurificationRecord(JsonRecord):
    """One model, one defense: what ``purification.json`` holds and its page shows.

    Attributes:
        title: Heading of the page.
        task: Name of the task, for example ``"image-classification"``.
        model: The model.
        data: The clean data.
        defense: The defense and its settings.
        guard: The utility guard's judgement.
        seconds: Wall-clock time of the defense, of all parts where the run went on after a cut.
        provenance: Seed, versions and so on.
        attack: Rates on the attack, where it is known.
        triggers: Outcome of a trigger search, where there was one.
        choice: Which defense was taken and why, where several were tried.
        layers: How far each layer moved, input side first.
        history: What the run reported: mappings of ``stage``, ``step`` and values by name.
        measured: What else was measured, by name, for example ``"lambda_max_before"``.
        spectra: The spectrum of the Hessian of the clean loss ``"before"`` and ``"after"``.
        scan: What was found in the files and weights of the given model, before anything was done.
        evaluations: What was measured afterwards (``mmdefense evaluate --record``), in order.
        evidence: How much of layers, curvature and spectra was measured.
        unchanged: Why the returned weights are those that were given; empty where they are not.
        low_utility: The low utility that the user accepted; empty where there was none.
        accepted_findings: What spoke strongly against the files of the given model and was accepted
            by the user; empty where nothing did.
    """

    kind: ClassVar[str] = "purification"

    title: str
    task: str
    model: ModelInfo
    data: DataInfo
    defense: DefenseInfo
    guard: GuardInfo
    seconds: float
    provenance: Provenance
    attack: AttackInfo | None = None
    triggers: TriggerSearch | None = None
    choice: Choice | None = None
    layers: tuple[LayerChange, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    spectra: Mapping[str, SpectrumInfo] = field(default_factory=dict)
    scan: ScanRecord | None = None
    evidence: EvidenceInfo | None = None
    evaluations: tuple[Evaluation, ...] = ()
    unchanged: str = ""
    low_utility: str = ""
    accepted_findings: str = ""

    @property
    def metric(self) -> str:
        """What is measured where other tables have ACC."""
        return self.guard.metric if self.attack is None else self.attack.metric

    @property
    def rows(self) -> tuple[Row, ...]:
        """The results table: measured on the attack if it is known, else by the guard."""
        if self.attack is not None:
            before, after = self.attack.before, self.attack.after
        else:
            before, after = Rates(acc=self.guard.before), Rates(acc=self.guard.after)
        row = Row(
            defense=self.defense.name,
            before=before,
            after=after,
            seconds=self.seconds,
            violated=self.guard.violated,
            undecided=self.guard.undecided,
        )
        return (row,)

    def table(self) -> Table:
        """Return the results as a table of one row; rates are fractions."""
        return _table(self.title, self.rows)

    def __repr__(self) -> str:
        guard = self.guard
        words = f"{guard.metric} {guard.before:.3f} to {guard.after:.3f}, {guard.verdict}"
        return f"PurificationRecord of {self.title} by {self.defense.name}: {words}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord(JsonRecord):
    """Several defenses side by side: what ``make demo`` and an evaluation show.

    Attributes:
        title: Heading of the page.
        task: Name of the task.
        model: The victim; of several, the first.
        data: The clean data.
        attack: The attack in words.
        rows: One per victim and defense.
        provenance: Seed, versions and so on.
        acc_bound: Largest loss of ACC that counts as kept.
        metric: What the task calls what stands as ACC, for example ``"accuracy"`` or ``"BLEU"``.
    """

    kind: ClassVar[str] = "comparison"

    title: str
    task: str
    model: ModelInfo
    data: DataInfo
    attack: str
    rows: tuple[Row, ...]
    provenance: Provenance
    acc_bound: float = 0.02
    metric: str = "accuracy"

    def table(self) -> Table:
        """Return the results, a row for each victim and defense; rates are fractions."""
        return _table(self.title, self.rows)

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


Record = PurificationRecord | ComparisonRecord


def _table(title: str, rows: Sequence[Row]) -> Table:
    """Return rows of results as a table: rates as fractions, before and after."""
    rates = ("acc", "asr", "ra")
    return Table(
        [
            {
                "victim": row.victim,
                "defense": row.defense,
                **{f"{name}_before": getattr(row.before, name) for name in rates},
                **{f"{name}_after": getattr(row.after, name) for name in rates},
                "der": row.after.der,
                "asr_retuned": row.after.retuned,
                "asr_retuned_twin": row.retuned_twin,
                "seconds": row.seconds,
                "baseline": row.baseline,
                "guard_violated": row.violated,
                "note": row.note,
            }
            for row in rows
        ],
        title,
    )


def write_record(record: Record, path: Path) -> None:
    """Write ``record`` as JSON, atomically."""
    write_atomically(path, lambda file: file.write(record.to_json().encode()))


def read_record(path: Path) -> Record:
    """Return the record in a JSON file, of either kind.

    Raises:
        BadInputError: If the file is missing, or is no record of this schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
        kind = parse_record(text).get("kind")
        for record in (PurificationRecord, ComparisonRecord):
            if record.kind == kind:
                return record.from_json(text)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadInputError(f"record {path} cannot be read: {one_line(error)}") from error
    raise BadInputError(f"record {path} is of unknown kind {kind!r}")
