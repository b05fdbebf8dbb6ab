"""A look at a model's files before it is loaded; what speaks strongly against it is refused."""

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
    """A model and its data, opened after a look at the model's files.

    Attributes:
        opened: What was opened.
        findings: Of the files; none where the model is in memory.
        accepted: What speaks strongly against the files and was accepted; empty where nothing does.
    """

    opened: Opened
    findings: tuple[Finding, ...] = ()
    accepted: str = ""


def open_vetted(source: Source) -> Vetted:
    """Return a model and its data, where no file of the model speaks strongly against it.

    Args:
        source: Where they are.

    Raises:
        BadInputError: If a file does, and the source does not accept that; or as
            :meth:`mmdefense.pipeline.sources.Source.open` does.
        UnsupportedError: As :meth:`mmdefense.pipeline.sources.Source.open` does.
    """
    if not isinstance(source.model, str | Path):
        return Vetted(source.open())
    findings = tuple(scan_files(_at_hand(source)))
    # Every loader refuses a damaged header by itself, whatever is accepted.
    strong = [found for found in findings if found.level == "high" and found.id != HEADER.id]
    if not strong:
        return Vetted(source.open(), findings)
    said = "; ".join(printable(f"{f.subject}: {f.value} ({f.id})")[:200] for f in strong[:_MOST])
    if len(strong) > _MOST:
        said += f"; and {len(strong) - _MOST} more"
    if not source.accept_findings:
        raise BadInputError(
            f"model {source.model} was refused and nothing in it executed: its files have findings "
            f"of high level: {said}; look at them with mmdefense scan, and add --accept-findings "
            "if you trust the model"
        )
    note(f"findings of high level were accepted: {said}")
    return Vetted(source.open(), findings, said)


def _at_hand(source: Source) -> Path:
    """Return where the files of a model are; of a hub id, those that loading it downloads."""
    given = Path(source.model)
    try:
        return given if given.exists() else local_folder(source.model)
    except BadInputError:
        source.open()  # it says better what is missing
        raise
