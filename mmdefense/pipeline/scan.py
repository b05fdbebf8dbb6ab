"""Scan a model of unknown origin before use: its files, weights and behaviour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmdefense.checkpoints.huggingface import download, local_folder
from mmdefense.checkpoints.models import load_model
from mmdefense.checkpoints.seals import hash_all, unchanged
from mmdefense.checkpoints.weights import read_state
from mmdefense.data.batch import Samples
from mmdefense.errors import BadInputError, MMDefenseError, one_line
from mmdefense.findings import LEVELS, Finding, Rule, ScanRecord, worst_level
from mmdefense.metrics.utility import check_utility
from mmdefense.notes import note
from mmdefense.pipeline.identity import scan_identity
from mmdefense.pipeline.sources import AUTO, Source, usable_device
from mmdefense.prepared import Prepared, prepare
from mmdefense.protocol import TaskAdapter
from mmdefense.report.encoding import build, plain
from mmdefense.report.terminal import shown
from mmdefense.runtime.run import Event, Progress
from mmdefense.sandbox import (
    BeyondBoundsError,
    Channel,
    Network,
    differentiates_in_child,
    in_child,
    total_size,
)
from mmdefense.scanning.behaviour import NOT_LOOKED, scan_behaviour
from mmdefense.scanning.files import BEYOND, scan_files
from mmdefense.scanning.weights import scan_weights
from mmdefense.settings import check_seed
from mmdefense.store import Store

UNREAD = Rule(
    id="weights-unread",
    level="medium",
    measured="whether the weights can be read as tensors",
    reference="safetensors, and state dicts written by torch.save",
    meaning="Nothing is known about them, and `purify` and `evaluate` refuse such a model.",
    blind_spot="all of the weights.",
)

__all__ = ["scan", "scan_behaviour", "scan_files", "scan_loaded", "scan_weights"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_Step = tuple[str, list[Finding]]
"""A scanned part (empty if it could not be scanned) and its findings."""

_Inputs = tuple[TaskAdapter[Any], Samples[Any]]


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
    store: Store | None = None,
) -> ScanRecord:
    """Scan a model for signs of tampering, without running code that comes with it.

    Without data, its files and weights are scanned. With a little clean data the model is loaded
    and its behaviour is scanned too, unless a file has high-level findings.

    Args:
        model: A folder, a file or a hub id; or a module, or an adapter around one, which has no
            files to scan.
        data: Clean data: its location, as for ``mmdefense purify --data``; or samples, as for
            :func:`mmdefense.purify`.
        task: The name of a task; by default that of the model.
        arch: ``module:callable`` that builds the model for a state dict.
        weights: Key of the weights within a checkpoint; see
            :func:`mmdefense.checkpoints.models.load_model`.
        reading: Reading options by name; see :class:`mmdefense.pipeline.sources.Source`.
        device: For example ``"cpu"`` or ``"cuda"``; a module is not moved.
        seed: Random seed; the same seed gives the same findings.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`; by default progress is
            shown on a terminal and in a notebook; None or False disables it.
        accept_low_utility: Whether to continue if the model's score on the data is near chance.
        store: A store of results: a scan of the same files is read from it, and a new scan is added
            to it.

    Raises:
        LowUtilityError: If the model performs too poorly on the data as read.
        BadInputError: If there is no model, its files change during the scan, or the data cannot
            be read.
        UnsupportedError: If a required library is not installed, or no adapter accepts the model.

    Example:
        >>> import mmdefense as mmd
        >>> record = mmd.scan("model.safetensors", "images", arch="my_models:SignNet")
        >>> print(record.verdict.text)
        Nothing was found by what was looked at, ...
    """
    check_seed(seed)
    name, files, findings = _named(model), {}, []
    source: dict[str, Any] = {"task": task, "arch": arch, "weights": weights, "device": device}
    source |= {"reading": dict(reading or {}), "accept_low_utility": accept_low_utility}
    if isinstance(model, str | Path):
        model = _local_path(model)
    elif store is not None:
        raise BadInputError(
            "a store keeps scans of files only, and this model is in memory; leave store out"
        )
    with unchanged(name, model), shown(progress) as display:
        if isinstance(model, Path):
            files = hash_all(model)
        identity = None if store is None else scan_identity(name, files, data, source, seed)
        if store is not None and identity is not None and (entry := store.find(identity)):
            note(f"nothing to compute: the scan of {entry.created[:19]} is in {store.folder}")
            found: ScanRecord = build(ScanRecord, store.content(entry), f"scan {entry.name}")
            return replace(found, model=name)
        if isinstance(model, Path):
            findings = scan_files(model)
        steps = _ModelScan(model, data, source, seed, display or (lambda _: None), findings)
        parts = [*(["files"] if files else []), *steps.run()]
    record = ScanRecord(
        model=name, findings=findings, parts=parts, files=files, version=version("mmdefense")
    )
    if store is not None and identity is not None:
        store.put(identity, plain(record))
    return record


@dataclass
class _ModelScan:
    """A scan of the weights and the behaviour of a model.

    A model from files is built and scanned in a child process, because the files are not trusted.
    Limits on time and memory apply until it is built; see :mod:`mmdefense.sandbox`. The exception
    is a CUDA device that this process already uses, since a forked child cannot use it: the child
    builds the model and scans its weights, and the behaviour is scanned in this process.

    Attributes:
        model: See :func:`scan`.
        data: See :func:`scan`; without data the behaviour is not scanned.
        source: Further arguments of a :class:`~mmdefense.pipeline.sources.Source`.
        seed: Random seed.
        progress: Called with each event.
        findings: Findings in the files; those of this scan are added.
        channel: In the child process, the channel to the parent.
        built: In the child process, the model built from the files, once available.
    """

    model: Path | nn.Module | TaskAdapter[Any]
    data: Any
    source: dict[str, Any]
    seed: int
    progress: Progress
    findings: list[Finding]
    channel: Channel | None = None
    built: nn.Module | None = None

    def run(self) -> list[str]:
        """Scan, and return the parts that were scanned.

        Raises:
            LowUtilityError: If the model performs too poorly on the data as read.
            BadInputError: If the data cannot be read, or if there is data and the model cannot be
                read.
            UnsupportedError: If a library is not installed, or no adapter accepts the model.
        """
        parts: list[str] = []
        is_file = isinstance(self.model, Path)
        if is_file and worst_level(self.findings) != "high":
            all_in_child = self.data is None or (
                not self._uses_cuda() and differentiates_in_child()
            )
            self._run_in_child(parts, self._steps() if all_in_child else self._weights())
            if all_in_child:
                return parts
        for part, found in self._behaviour() if is_file else self._steps():
            self.findings += found
            parts += [part] if part else []
        return parts

    def _uses_cuda(self) -> bool:
        used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return used and self.source["device"].startswith("cuda")

    def _run_in_child(self, parts: list[str], steps: Iterator[_Step]) -> None:
        """Run steps in a child process; one that exceeds its limits is a finding."""
        assert isinstance(self.model, Path)

        def work(channel: Channel) -> None:
            self.channel = channel
            self.progress = lambda event: channel.send(["event", asdict(event)])
            for part, found in steps:
                self.findings += found
                sent = [{**plain(finding), "value": finding.value} for finding in found]
                channel.send([part, sent])

        def receive(message: Any) -> None:
            part, content = message
            if part == "event":
                self.progress(Event(**content))
            else:
                self.findings += [Finding(**finding) for finding in content]
                parts.extend([part] if part else [])

        network: Network = "never" if Path(str(self.data)).exists() else "later"
        if self.source["arch"] is not None:
            network = "always"  # the user's own code may use the network
        size = total_size(self.model)
        try:
            in_child(work, receive, what=f"loading {self.model.name}", size=size, network=network)
        except BeyondBoundsError as error:
            self.findings.append(BEYOND.found(self.model.name, str(error)))
            if self.data is not None:
                self.findings.append(NOT_LOOKED.found("behaviour", str(error), level="low"))

    def _steps(self) -> Iterator[_Step]:
        yield from self._weights()
        yield from self._behaviour()

    def _weights(self) -> Iterator[_Step]:
        """Yield the findings in the weights, as far as they can be read."""
        subject: nn.Module | Mapping[str, Tensor] | MMDefenseError
        if isinstance(self.model, Path):
            subject = self._loaded(self.model)
            if isinstance(subject, MMDefenseError):
                if LEVELS.index(worst_level(self.findings) or "info") < LEVELS.index("medium"):
                    yield "", [UNREAD.found(self.model.name, one_line(subject))]
                return
        else:
            subject = self.model if isinstance(self.model, nn.Module) else self.model.model
        if subject:
            ordered = isinstance(subject, nn.Module) or not _is_sorted(subject)
            yield "weights", scan_weights(subject, ordered=ordered)

    def _loaded(self, where: Path) -> nn.Module | Mapping[str, Tensor] | MMDefenseError:
        """Return the model; or the tensors of its files if it cannot be built; or the error."""
        task = None if self.source["task"] == AUTO else self.source["task"]
        arch, weights = self.source["arch"], self.source["weights"]
        try:
            self.built = load_model(where, arch=arch, task=task, weights=weights)
            return self.built
        except MMDefenseError:
            return _tensors(where, weights)

    def _behaviour(self) -> Iterator[_Step]:
        if self.data is None:
            return
        if self.channel is not None:
            self.channel.lift()
        model = self.model
        if self.built is not None:  # do not build it again: limits no longer apply
            model = self.built.to(usable_device(self.source["device"]))
        opened = _opened(model, self.data, self.findings, self.source)
        if isinstance(opened, Finding):
            yield "", [opened]
        else:
            yield "behaviour", scan_behaviour(*opened, seed=self.seed, progress=self.progress)


def scan_loaded(
    where: str | Path,
    model: nn.Module,
    files: Mapping[str, str] | None = None,
    findings: Sequence[Finding] | None = None,
) -> ScanRecord:
    """Scan a loaded model's weights and the files it was loaded from.

    This needs no data and reads each file once. For a hub id, the files are those that were
    downloaded to load it.

    Args:
        where: A folder, a file or a hub id.
        model: The loaded model.
        files: SHA-256 of each file by name, if they have been hashed already.
        findings: Findings in the files, if they have been scanned already.
    """
    path = Path(where) if Path(where).is_file() else local_folder(where)
    return ScanRecord(
        model=str(where),
        findings=[*(scan_files(path) if findings is None else findings), *scan_weights(model)],
        parts=["files", "weights"],
        files=hash_all(path) if files is None else files,
        version=version("mmdefense"),
    )


def _named(model: str | Path | nn.Module | TaskAdapter[Any]) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return type(model if isinstance(model, nn.Module) else model.model).__name__


def _local_path(where: str | Path) -> Path:
    """Return a model's folder or file; for a hub id, download all of its files."""
    return Path(where) if Path(where).exists() else download(where)


def _tensors(model: Path, weights: str | None) -> Mapping[str, Tensor] | MMDefenseError:
    files = sorted(model.glob("*")) if model.is_dir() else [model]
    stored = [path for path in files if path.suffix in _WEIGHTS and path.is_file()]
    chosen = [path for path in stored if path.suffix == ".safetensors"] or stored
    try:
        return {name: value for path in chosen for name, value in read_state(path, weights).items()}
    except MMDefenseError as error:
        return error


def _is_sorted(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are sorted, as in safetensors, instead of in registration order."""
    return list(state) == sorted(state)


def _opened(
    model: Path | nn.Module | TaskAdapter[Any],
    data: Any,
    findings: list[Finding],
    source: dict[str, Any],
) -> _Inputs | Finding:
    """Return the model in its adapter and the samples, or a finding that says why not.

    A model whose files have high-level findings is not loaded. If they have medium-level findings
    and it cannot be loaded, that becomes a further finding, so that the others are reported.
    """
    level = worst_level(findings)
    if level == "high":
        why = "not loaded, since a file of the model has high-level findings"
        return NOT_LOOKED.found("behaviour", why, level="low")
    try:
        prepared = _read(model, data, source)
        check_utility(prepared, accept=source["accept_low_utility"])
        return prepared.adapter, prepared.samples
    except MMDefenseError as error:
        if level != "medium":
            raise
        return NOT_LOOKED.found("behaviour", one_line(error), level="low")


def _read(
    model: Path | nn.Module | TaskAdapter[Any], data: Any, source: dict[str, Any]
) -> Prepared[Any]:
    if isinstance(model, nn.Module | Path) or isinstance(data, str | Path):
        return Source(model=model, data=data, **source).open().prepare(to_learn=False)
    return prepare(model, data, to_learn=False)
