"""Look at a model of unknown origin before it is used: its files, its weights, its behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmdefense.checkpoints.huggingface import download
from mmdefense.checkpoints.weights import read_state
from mmdefense.errors import BadInputError
from mmdefense.scanning.files import hash_all, scan_files
from mmdefense.scanning.findings import Finding, ScanRecord, worst_level
from mmdefense.scanning.weights import scan_weights

__all__ = ["scan", "scan_files", "scan_weights"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def scan(model: str | Path | nn.Module, data: Any = None) -> ScanRecord:
    """Return what speaks against a model; nothing that comes with it is run.

    Args:
        model: A folder, a file or a hub id, whose weights are read as tensors if no file speaks
            strongly against it; or a module, of which there are no files to look at.
        data: Clean data for a look at the behaviour, which is not there yet.

    Raises:
        BadInputError: If there is no model.
        UnsupportedError: If a library that it takes to download one is not installed.
    """
    if isinstance(model, nn.Module):
        name, files, findings = type(model).__name__, {}, []
    else:
        name, model = str(model), _at_hand(model)
        files, findings = hash_all(model), scan_files(model)
    parts = ["files"] if files else []
    weights = _weights(model, findings)
    if weights:
        findings = [*findings, *scan_weights(weights)]
        parts.append("weights")
    return ScanRecord(
        model=name, findings=findings, parts=parts, files=files, version=version("mmdefense")
    )


def _at_hand(where: str | Path) -> Path:
    """Return a model's folder or file, with all of its files downloaded if it is a hub id."""
    return Path(where) if Path(where).exists() else download(where)


def _weights(
    model: str | Path | nn.Module, findings: list[Finding]
) -> nn.Module | Mapping[str, Tensor] | None:
    """Return a model or the tensors of its files; none where they are not safe or not there."""
    if isinstance(model, nn.Module):
        return model
    if worst_level(findings) == "high":
        return None
    root = Path(model)
    files = sorted(root.glob("*")) if root.is_dir() else [root]
    stored = [path for path in files if path.suffix in _WEIGHTS]
    chosen = [path for path in stored if path.suffix == ".safetensors"] or stored
    try:
        return {name: value for path in chosen for name, value in read_state(path).items()}
    except BadInputError:
        return None  # what speaks against the file is among the findings
