"""Look at a model of unknown origin before it is used: its files, its weights, its behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mmdefense.batches import Samples
from mmdefense.checkpoints.huggingface import download, local_folder
from mmdefense.checkpoints.models import load_model
from mmdefense.checkpoints.weights import read_state
from mmdefense.errors import MMDefenseError, one_line
from mmdefense.kernels.precision import in_float32
from mmdefense.kernels.run import Progress
from mmdefense.metrics.utility import check_utility
from mmdefense.protocol import TaskAdapter
from mmdefense.report.terminal import shown
from mmdefense.scanning.behaviour import NOT_LOOKED, scan_behaviour
from mmdefense.scanning.files import hash_all, scan_files
from mmdefense.scanning.findings import Finding, ScanRecord, worst_level
from mmdefense.scanning.weights import scan_weights
from mmdefense.sources import AUTO, Source

__all__ = ["scan", "scan_behaviour", "scan_files", "scan_loaded", "scan_weights"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_Seen = tuple[TaskAdapter[Any], Samples[Any]]


def scan(
    model: str | Path | nn.Module | TaskAdapter[Any],
    data: Any = None,
    *,
    task: str = AUTO,
    arch: str | None = None,
    weights: str | None = None,
    reading: Mapping[str, Any] | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | Literal["auto", False] | None = "auto",
    accept_low_utility: bool = False,
) -> ScanRecord:
    """Return what speaks against a model; no code that comes with it is run.

    Files and weights are looked at without data. With a little clean data the model is loaded and
    its behaviour is looked at too, unless a file speaks strongly against it.

    Args:
        model: A folder, a file or a hub id; or a module, or an adapter around one, of which there
            are no files to look at.
        data: Clean data: where it is, as ``mmdefense purify --data`` has it; or samples, as
            :func:`mmdefense.purify` takes them.
        task: The name of a task; by default that of the model.
        arch: ``module:callable`` that builds the model of a state dict.
        weights: Where in a checkpoint the weights are; see
            :func:`mmdefense.checkpoints.models.load_model`.
        reading: How data is read, by name; see :class:`mmdefense.sources.Source`.
        device: For example ``"cpu"`` or ``"cuda"``; a module stays where it is.
        seed: Makes the findings reproducible.
        progress: Called with each :class:`~mmdefense.kernels.run.Event`; by default it is shown on
            a terminal and in a notebook, and not at all with None or False.
        accept_low_utility: Whether to go on where the model is near chance on the data.

    Raises:
        LowUtilityError: If the model does not work on the data as it was read.
        BadInputError: If there is no model, or the data cannot be read.
        UnsupportedError: If a library that it takes is not installed, or no adapter accepts the
            model.

    Example:
        >>> import mmdefense as mmd
        >>> print(mmd.scan("a-folder", data="images").verdict.text)  # doctest: +SKIP
    """
    name, files, findings = _named(model), {}, []
    if isinstance(model, str | Path):
        model = _at_hand(model)
        files, findings = hash_all(model), scan_files(model)
    parts = ["files"] if files else []
    looked_at = _weights(model, arch, weights, findings)
    if looked_at:
        ordered = isinstance(looked_at, nn.Module) or not _is_sorted(looked_at)
        findings = [*findings, *scan_weights(looked_at, ordered=ordered)]
        parts.append("weights")
    if data is not None:
        source: dict[str, Any] = {"task": task, "arch": arch, "weights": weights, "device": device}
        source |= {"reading": dict(reading or {}), "accept_low_utility": accept_low_utility}
        opened = _opened(model, data, findings, source)
        if isinstance(opened, Finding):
            findings = [*findings, opened]
        else:
            with shown(progress) as display:
                findings = [*findings, *scan_behaviour(*opened, seed=seed, progress=display)]
            parts.append("behaviour")
    return ScanRecord(
        model=name, findings=findings, parts=parts, files=files, version=version("mmdefense")
    )


def scan_loaded(where: str | Path, model: nn.Module) -> ScanRecord:
    """Return what speaks against the files and weights of a model that was loaded from them.

    It needs no data, and reads each file once. Of a hub id, the files are those that were
    downloaded to load it.

    Args:
        where: A folder, a file or a hub id.
        model: What was loaded.
    """
    path = Path(where) if Path(where).is_file() else local_folder(where)
    return ScanRecord(
        model=str(where),
        findings=[*scan_files(path), *scan_weights(model)],
        parts=["files", "weights"],
        files=hash_all(path),
        version=version("mmdefense"),
    )


def _named(model: str | Path | nn.Module | TaskAdapter[Any]) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return type(model if isinstance(model, nn.Module) else model.model).__name__


def _at_hand(where: str | Path) -> Path:
    """Return a model's folder or file, with all of its files downloaded if it is a hub id."""
    return Path(where) if Path(where).exists() else download(where)


def _weights(
    model: Path | nn.Module | TaskAdapter[Any],
    arch: str | None,
    weights: str | None,
    findings: list[Finding],
) -> nn.Module | Mapping[str, Tensor] | None:
    """Return a model, or the tensors of files that do not tell which one they belong to.

    None where they are not safe or not there.
    """
    if not isinstance(model, Path):
        return model if isinstance(model, nn.Module) else model.model
    if worst_level(findings) == "high":
        return None
    try:
        return load_model(model, arch=arch, weights=weights)
    except MMDefenseError:
        return _tensors(model, weights)  # what speaks against the file is among the findings


def _tensors(model: Path, weights: str | None) -> Mapping[str, Tensor] | None:
    files = sorted(model.glob("*")) if model.is_dir() else [model]
    stored = [path for path in files if path.suffix in _WEIGHTS]
    chosen = [path for path in stored if path.suffix == ".safetensors"] or stored
    try:
        return {name: value for path in chosen for name, value in read_state(path, weights).items()}
    except MMDefenseError:
        return None


def _is_sorted(state: Mapping[str, Tensor]) -> bool:
    """Whether the names have lost the order of registration, as those of safetensors have."""
    return list(state) == sorted(state)


def _opened(
    model: Path | nn.Module | TaskAdapter[Any],
    data: Any,
    findings: list[Finding],
    source: dict[str, Any],
) -> _Seen | Finding:
    """Return the model in its adapter and the data as it reads them, or why they are not there.

    A model that its files speak against is not loaded where they do so strongly; where they speak
    less strongly, and it cannot be loaded, that is a remark, so that the findings are told.
    """
    level = worst_level(findings)
    if level == "high":
        why = "a file speaks strongly against it: not loaded"
        return NOT_LOOKED.found("behaviour", why, level="low")
    try:
        seen = _read(model, data, source)
        check_utility(*seen, accept=source["accept_low_utility"])
        return seen
    except MMDefenseError as error:
        if level != "medium":
            raise
        return NOT_LOOKED.found("behaviour", one_line(error), level="low")


def _read(model: Path | nn.Module | TaskAdapter[Any], data: Any, source: dict[str, Any]) -> _Seen:
    if isinstance(model, nn.Module | Path) or isinstance(data, str | Path):
        opened = Source(model=model, data=data, **source).open()
        return in_float32(opened.adapter), opened.samples
    wide = in_float32(model)
    return wide, wide.samples(data)
