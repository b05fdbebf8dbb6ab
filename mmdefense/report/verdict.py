"""What may be claimed from a record, in words that claim no more than was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmdefense.metrics.definitions import heading
from mmdefense.report.evaluation import ASR_GOAL
from mmdefense.report.formats import percent, points
from mmdefense.report.record import ComparisonRecord, GuardInfo, PurificationRecord, Record, Row

__all__ = [
    "ASR_GOAL",
    "MARKS",
    "Verdict",
    "beats_baseline",
    "limits",
    "remarks",
    "row_name",
    "verdict",
]

Level = Literal["pass", "open", "fail"]

MARKS = {"pass": "✓", "open": "○", "fail": "✕"}
"""Signs of the levels, so that colour is never the only difference."""


@dataclass(frozen=True)
class Verdict:
    """The top of a page.

    Attributes:
        level: ``"pass"`` and ``"fail"`` are measured; ``"open"`` is everything else.
        label: The level in a few words.
        headline: What was found.
        lines: What it rests on and what it does not say.
    """

    level: Level
    label: str
    headline: str
    lines: tuple[str, ...]


def verdict(record: Record) -> Verdict:
    """Return the verdict on ``record``."""
    if isinstance(record, ComparisonRecord):
        return _of_comparison(record)
    level, label, headline = _backdoor(record)
    lines = (*_guard_lines(record.guard), *remarks(record)[1:])
    guard = record.guard
    if record.unchanged:
        headline = f"Nothing was changed: {record.unchanged}. {headline}"
        return Verdict("fail", "Nothing changed", headline, lines)
    headline = f"Utility bound {guard.undecided or guard.verdict}. {headline}"
    if guard.violated:
        return Verdict("fail", "Too much utility lost", headline, lines)
    if record.low_utility:
        return Verdict("open", "Low utility accepted", headline, lines)
    if guard.undecided and level == "pass":
        return Verdict("open", f"{label}, utility bound not decidable", headline, lines)
    return Verdict(level, label, headline, lines)


def remarks(record: PurificationRecord) -> list[str]:
    """Return what is known beside the guard's figures: the first sentence is of the backdoor."""
    *_, headline = _backdoor(record)
    return [headline, *_choice_lines(record), *_scan_lines(record), *limits(record)]


def _backdoor(record: PurificationRecord) -> tuple[Level, str, str]:
    before, after = _measured_asr(record)
    if before is None or after is None:
        return "open", "Removal not measured", "Whether a backdoor was removed was not measured."
    fell = f"ASR {percent(before)} before, {percent(after)} after (lower is better)"
    if after > ASR_GOAL:
        return "fail", "Backdoor measured", f"The known trigger still works: {fell}."
    if before <= ASR_GOAL:
        headline = f"The known trigger did not work on the given model: {fell}."
        return "open", "No working backdoor to remove", headline
    return "pass", "Removal measured", f"The known backdoor was removed: {fell}."


def _measured_asr(record: PurificationRecord) -> tuple[float | None, float | None]:
    attack = record.attack
    return (None, None) if attack is None else (attack.before.asr, attack.after.asr)


def _guard_lines(guard: GuardInfo) -> list[str]:
    level, folds = f"{100 * guard.confidence:.0f}%", f" of {guard.folds} folds" * (guard.folds > 1)
    smallest = ", which has the smallest drop" * (guard.drop > guard.bound + 1e-6)
    return [
        f"Hold-out {guard.metric} on {guard.samples} samples{folds}: {percent(guard.before)} "
        f"before, {percent(guard.after)} after. The drop is {points(guard.drop)} points ({level} "
        f"confidence interval {points(guard.drop_low)} to {points(guard.drop_high)}); the bound "
        f"is {points(guard.bound)}.",
        f"State that was returned: {guard.state}{smallest}.",
        *([f"{guard.caution[0].upper()}{guard.caution[1:]}."] if guard.caution else []),
    ]


def _choice_lines(record: PurificationRecord) -> list[str]:
    choice = record.choice
    if choice is None:
        return []
    lines = [f"Of the defenses that were tried, {choice.defense} was taken."]
    if choice.success_before is not None and choice.success_after is not None:
        lines.append(
            "Triggers that a search found, and random ones, succeeded on up to "
            f"{percent(choice.success_before)} of the held-out samples before, and on up to "
            f"{percent(choice.success_after)} after (lower is better)."
        )
    return lines


def _scan_lines(record: PurificationRecord) -> list[str]:
    if record.scan is None:
        return []
    return [f"The given model, scanned before: {record.scan.verdict.text}"]


def limits(record: PurificationRecord) -> list[str]:
    """Return, in sentences, what a purification does not say."""
    lines = []
    if record.accepted_findings:
        lines.append(
            "Findings of high level in the files of the given model were accepted: "
            f"{record.accepted_findings}. Files other than the weights are as they were given."
        )
    if record.low_utility:
        lines.append(
            f"Low utility was accepted: {record.low_utility}. If the data was not read as in "
            "training, nothing on this page holds."
        )
    search = record.triggers
    if search is not None and search.found:
        lines.append(f"A search of {search.targets} targets found {search.found} triggers.")
    if search is not None and search.working:
        lines.append(
            f"Of {search.targets} targets, {search.working} have a trigger that works and was left "
            "alone: it was not told apart from those that models have that nobody tampered with."
        )
    if search is not None and not search.found and not search.working:
        lines.append(
            f"A search of {search.targets} targets found no trigger. No trigger found is not proof "
            "that there is none."
        )
    before, after = _measured_asr(record)
    if record.attack is not None and (before, after) != (None, None):
        name = record.attack.attack
        lines.append(f"The ASR speaks of the known trigger alone ({name}). Others may remain.")
        if before is None or after is None:
            one = "purified" if before is None else "given"
            lines.append(f"It was measured of the {one} model alone, so not how far it fell.")
    else:
        lines.append(
            "No attack success rate (ASR) was measured. So nothing here says that there was a "
            "backdoor, or that there is none now."
        )
    return lines


def _of_comparison(record: ComparisonRecord) -> Verdict:
    baselines = {(row.victim, row.baseline) for row in record.rows}
    judged = [row for row in record.rows if (row.victim, row.defense) not in baselines]
    judged = [row for row in judged if not _is_clean(row)]
    measured = [row for row in judged if _rates_known(row)]
    good = [row for row in measured if _removed(row, record)]
    kept = f"{heading(record.metric)} within {points(record.acc_bound)} points"
    aim = f"ASR at most {percent(ASR_GOAL)} and {kept}"
    level, label = _comparison_level(len(good), len(judged), bool(measured))
    runs = "run" if len(judged) == 1 else "runs"
    headline = f"{len(good)} of {len(judged)} purification {runs} reached the aim: {aim}."
    return Verdict(level, label, headline, (*_row_lines(record, measured, good), _SCOPE))


def _comparison_level(good: int, judged: int, measured: bool) -> tuple[Level, str]:
    if not measured:
        return "open", "Not measured"
    if good == judged:
        return "pass", "Aim reached, as measured"
    return ("open", "Aim reached in part") if good else ("fail", "Aim not reached")


_SCOPE = (
    "ASR, RA and DER were measured with the true trigger, which no defense saw. They speak of the "
    "attacks tried here, not of others."
)


def _rates_known(row: Row) -> bool:
    return None not in {row.before.asr, row.after.asr, row.before.acc, row.after.acc}


def _is_clean(row: Row) -> bool:
    return row.before.asr is not None and row.before.asr <= ASR_GOAL


def _removed(row: Row, record: ComparisonRecord) -> bool:
    assert row.before.acc is not None
    assert row.after.acc is not None
    assert row.after.asr is not None
    kept = row.before.acc - row.after.acc <= record.acc_bound + 1e-9  # 0.97 - 0.95 > 0.02
    return kept and row.after.asr <= ASR_GOAL and not row.violated


def _row_lines(record: ComparisonRecord, measured: list[Row], good: list[Row]) -> list[str]:
    missed = [row for row in measured if row not in good]
    behind = [row for row in record.rows if beats_baseline(row, record.rows) is False]
    violated = [row for row in record.rows if row.violated]
    undecided = [row for row in record.rows if row.undecided]
    clean = [row for row in record.rows if _is_clean(row)]
    said = (
        ("Aim not reached: {}.", missed),
        ("Utility bound violated: {}.", violated),
        ("Not decidable for the guard with its hold-out part: {}.", undecided),
        ("Not better than its baseline of the same budget, by DER: {}.", behind),
        ("Not counted, since the trigger did not work before: {}.", clean),
    )
    return [text.format(", ".join(map(row_name, rows))) for text, rows in said if rows]


def row_name(row: Row) -> str:
    """Return the name of a row that is unique in its table."""
    return f"{row.defense} on {row.victim}" if row.victim else row.defense


def beats_baseline(row: Row, rows: tuple[Row, ...]) -> bool | None:
    """Return whether a row's DER is above that of its baseline; none where that is not known."""
    found = (r for r in rows if r.victim == row.victim and r.defense == row.baseline)
    baseline = next(found, None)
    if baseline is None or baseline.after.der is None or row.after.der is None:
        return None
    return row.after.der > baseline.after.der
