"""A scan of a model's files before loading; models with high-level findings are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmdefense.checkpoints.huggingface import local_folder
from mmdefense.errors import BadInputError, printable
from mmdefense.findings import Finding
from mmdefense.notes import note
from mmdefense.pipeline.sources import Opened, Source
from mmdefense.scanning.files import HEADER, scan_files

__all__ = ["Vetted", "open_vetted"]

_MOST = 3


@dataclass(frozen=True)
class Vetted:
    """A model and its data, opened after a scan of the model's files.

    Attributes:
        opened: The model and its data.
        findings: Findings in the files; empty if the model is in memory.
        accepted: The accepted high-level findings, as text; empty if there are none.
    """

    opened: Opened
    findings: tuple[Finding, ...] = ()
    accepted: str = ""


def open_vetted(source: Source) -> Vetted:
    """Return a model and its data, unless a file of the model has high-level findings.

    Args:
        source: The model and its data.

    Raises:
        BadInputError: If there are such findings, and the source does not accept them; also see
            :meth:`mmdefense.pipeline.sources.Source.open`.
        UnsupportedError: See :meth:`mmdefense.pipeline.sources.Source.open`.
    """
    if not isinstance(source.model, str | Path):
        return Vetted(source.open())
    findings = tuple(scan_files(_local_path(source)))
    # Every loader refuses a damaged header, whatever is accepted.
    strong = [found for found in findings if found.level == "high" and found.id != HEADER.id]
    if not strong:
        return Vetted(source.open(), findings)
    summary = "; ".join(printable(f"{f.subject}: {f.value} ({f.id})")[:200] for f in strong[:_MOST])
    if len(strong) > _MOST:
        summary += f"; and {len(strong) - _MOST} more"
    if not source.accept_findings:
        raise BadInputError(
            f"model {source.model} was refused and nothing in it executed: its files have findings "
            f"of high level: {summary}; look at them with mmdefense scan, and add "
            "--accept-findings if you trust the model"
        )
    note(f"findings of high level were accepted: {summary}")
    return Vetted(source.open(), findings, summary)


def _local_path(source: Source) -> Path:
    """Return the location of a model's files; for a hub id, download those needed to load it."""
    given = Path(source.model)
    try:
        return given if given.exists() else local_folder(source.model)
    except BadInputError:
        source.open()  # its error explains what is missing
        raise
