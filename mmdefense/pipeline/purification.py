"""The main entry point: a model and a little clean data in, a purified model and evidence out."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from mmdefense import registry
from mmdefense.analysis.gather import Evidence, Level, check_level, gather
from mmdefense.checkpoints.folders import new_folder
from mmdefense.checkpoints.models import weight_names, write_model
from mmdefense.checkpoints.outputs import CARD, PLOTS
from mmdefense.checkpoints.runs import RunStore
from mmdefense.checkpoints.seals import Seal, hash_all, read_once
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.defenses.base import Defense, Result
from mmdefense.defenses.guard import Guard
from mmdefense.defenses.outcome import Choice
from mmdefense.errors import BadInputError
from mmdefense.findings import ScanRecord
from mmdefense.metrics.utility import check_raise, check_utility
from mmdefense.pipeline.sources import AUTO, Source
from mmdefense.pipeline.vetting import Vetted, open_vetted
from mmdefense.plots.base import Plot
from mmdefense.prepared import Prepared, prepare
from mmdefense.protocol import TaskAdapter
from mmdefense.report import record as records
from mmdefense.report.archive import write_plots
from mmdefense.report.card import clear_card, write_card
from mmdefense.report.compare import rebuild
from mmdefense.report.encoding import plain
from mmdefense.report.formats import duration
from mmdefense.report.record import PurificationRecord
from mmdefense.report.statement import write_statement
from mmdefense.report.terminal import shown
from mmdefense.runtime.callbacks import Callback, told
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.processes import Processes
from mmdefense.runtime.run import Progress
from mmdefense.settings import checked_settings, fields_of
from mmdefense.shown import as_html
from mmdefense.tabular import Table, Value

__all__ = ["Purification", "configured", "purify", "purify_prepared"]


def purify(
    model: str | Path | nn.Module | TaskAdapter[Any],
    clean: Any,
    defense: str | Defense = "fip",
    *,
    adapter: str | None = None,
    task: str = AUTO,
    arch: str | None = None,
    weights: str | None = None,
    reading: Mapping[str, Any] | None = None,
    device: str = "cpu",
    seed: int | None = None,
    progress: Progress | Literal["auto", False] | None = "auto",
    store: RunStore | None = None,
    max_seconds: float | Deadline | None = None,
    evidence: Level = "fast",
    accept_low_utility: bool = False,
    accept_findings: bool = False,
    processes: Processes | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Purification:
    """Remove a possible backdoor from a copy of ``model``; the given model is not modified.

    Args:
        model: The model; or an adapter around it if it needs options, such as the mean and standard
            deviation that normalise its images; or its location: a folder, a file, a hub id.
        clean: Clean samples: for images a pair ``(images (N, C, H, W), labels (N,))``, a data set
            or loader of such pairs, or what a task's ``load`` returns; or their location, as for
            ``mmdefense purify --data``.
        defense: A name from ``mmdefense list defenses``, or a defense object.
        adapter: The name of an adapter, to override the automatic choice.
        task: The name of a task, if paths are given; by default that of the model.
        arch: ``module:callable`` that builds the model for a state dict.
        weights: Key of the weights within a checkpoint; see
            :func:`mmdefense.checkpoints.models.load_model`.
        reading: Reading options for data at a path, by name; see
            :class:`mmdefense.pipeline.sources.Source`.
        device: Device to load a model at a path onto; a module is not moved.
        seed: Random seed; by default the defense's own.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`; by default progress is
            shown on a terminal and in a notebook; None or False disables it.
        store: Where to save checkpoints, so that repeating the call resumes an interrupted run.
        max_seconds: Time limit in seconds, or a deadline; the best state reached by then is
            returned.
        evidence: What is measured beyond the verdict: ``"fast"`` takes at most 15 % of the
            purification's time, ``"full"`` measures everything, ``"none"`` nothing; never more than
            fits into ``max_seconds``. A note lists what was left out.
        accept_low_utility: Whether to continue if the model's score on ``clean`` is near chance, or
            if the purification raises the score: signs that the data is read incorrectly.
        accept_findings: Whether to continue if the scan of a model's files, before it is loaded,
            has high-level findings.
        processes: The processes that compute the result together; see :meth:`Defense.purify`.
        callbacks: Called at start, stages, steps, result and end; trackers such as TensorBoard are
            in ``mmdefense_adapters.tracking``.
        **settings: Override fields of the defense, for example ``steps=100``.

    Raises:
        BadInputError: If the name, a setting, the data or the model is not usable.
        LowUtilityError: If the model performs too poorly on the data as read.
        UnsupportedError: If no adapter accepts the model, or it lacks what the defense needs.
        DivergenceError: If a loss became non-finite.

    Example:
        >>> import mmdefense as mmd
        >>> purified = mmd.purify(model, (images, labels), "fine-tuning", steps=5)
        >>> purified.save("purified")
        >>> again = mmd.purify("model.safetensors", "images", arch="my_models:SignNet", steps=5)
        >>> again.save("purified-too")
    """
    deadline, level = Deadline.after(max_seconds), check_level(evidence)
    chosen = configured(defense, settings if seed is None else {**settings, "seed": seed})
    seal: Seal | None = None
    vetted: Vetted | None = None
    paths = {"model": model, "data": clean}
    names = {name: str(given) for name, given in paths.items() if isinstance(given, str | Path)}
    if isinstance(model, nn.Module) and (adapter is not None or not names):
        model = registry.adapt(model, adapter, task=None if task == AUTO else task)
    elif adapter is not None:
        raise BadInputError(
            f"adapter {adapter!r} is for a module, got {model!r}; set task= instead"
        )
    if names:
        source = Source(
            model=model,
            data=clean,
            task=task,
            arch=arch,
            weights=weights,
            reading=reading or {},
            device=device,
            accept_findings=accept_findings,
        )
        with read_once(model) as seal:
            vetted = open_vetted(source)
            prepared = vetted.opened.prepare()
        names |= {"weights": weights} if weights is not None else {}
    elif arch is not None or weights is not None or reading:
        raise BadInputError(
            "arch, weights and reading apply to a model or data at a path; leave them out"
        )
    else:
        prepared = prepare(cast("TaskAdapter[Any]", model), clean)
    name = registry.name_of("defenses", type(chosen))
    told_of = {"defense": name, **dataclasses.asdict(chosen)}
    with shown(progress) as display, told(callbacks, display, told_of) as listener:
        purified = purify_prepared(
            prepared,
            chosen,
            progress=listener,
            store=store,
            deadline=deadline,
            evidence=level,
            accept_low_utility=accept_low_utility,
            processes=processes,
        )
        for callback in callbacks:
            callback.on_evaluate(purified.values())
    accepted = "" if vetted is None else vetted.accepted
    return dataclasses.replace(purified, names=names, seal=seal, accepted_findings=accepted)


def purify_prepared(
    prepared: Prepared[Any],
    defense: Defense,
    *,
    progress: Progress | None = None,
    store: RunStore | None = None,
    deadline: Deadline,
    evidence: Level = "fast",
    accept_low_utility: bool = False,
    processes: Processes | None = None,
) -> Purification:
    """Purify a model that was validated with its data; see :func:`purify` for the arguments.

    Raises:
        LowUtilityError: If the model performs too poorly on the data as read.
        UnsupportedError: If it lacks what the defense needs.
        DivergenceError: If a loss became non-finite.
    """
    near_chance = check_utility(prepared, accept=accept_low_utility)
    computed = time.process_time()
    result = defense.purify(
        prepared, progress=progress, store=store, max_seconds=deadline, processes=processes
    )
    guard, adapter = result.guard, prepared.adapter
    raised = check_raise(
        adapter, guard.before, guard.after, guard.margin, accept=accept_low_utility
    )
    found = gather(
        adapter,
        result.adapter,
        prepared.samples,
        evidence,
        seconds=result.seconds,
        slowness=max(1.0, result.seconds / max(1e-3, time.process_time() - computed)),
        seed=defense.seed,
        deadline=deadline,
        progress=progress,
    )
    accepted = "; ".join(text for text in (near_chance, raised) if text)
    return Purification(prepared, result, defense, evidence=found, low_utility=accepted)


def configured(defense: str | Defense, settings: Mapping[str, Any]) -> Defense:
    """Return a defense, given as an object or by name, with ``settings`` overridden.

    Raises:
        BadInputError: If the name or a setting is unknown, or a value is of the wrong kind.
    """
    if isinstance(defense, Defense):
        kind, kept = type(defense), {f.name: getattr(defense, f.name) for f in fields_of(defense)}
    else:
        kind, kept = registry.load("defenses", defense), {}
    return kind(**{**kept, **checked_settings(kind, settings)})


@dataclass(frozen=True, repr=False)
class Purification:
    """A purified model with its evidence.

    Attributes:
        prepared: The given model, which is unchanged, and the clean samples.
        result: The defense's result.
        defense: The defense with all its settings.
        names: The user's names for ``model`` and ``data``, and the ``command``, for the record.
        scan: The scan of the given model, for the record.
        evidence: What was measured beyond the verdict.
        low_utility: The low utility that was accepted, as a sentence; empty if none was.
        seal: The hashes of the model's files when they were read, if it came from files.
        accepted_findings: The high-level findings in the model's files that were accepted.

    Example:
        >>> purified = purify(model, (images, labels), "fine-tuning", steps=5)
        >>> purified.guard.violated
        False
        >>> purified.model.state_dict().keys() == model.state_dict().keys()
        True
    """

    prepared: Prepared[Any]
    result: Result
    defense: Defense
    names: Mapping[str, str] = field(default_factory=dict)
    scan: ScanRecord | None = None
    evidence: Evidence = field(default_factory=Evidence, repr=False)
    low_utility: str = ""
    seal: Seal | None = field(default=None, repr=False)
    accepted_findings: str = ""

    def __repr__(self) -> str:
        of = self.names.get("model", type(self.model).__name__)
        lines = [
            f"Purification of {of} by {self.result.defense}, {duration(self.result.seconds)}",
            f"nothing was changed: {self.unchanged}" if self.unchanged else self.guard.message,
            *(self.choice.why if self.choice is not None else ()),
        ]
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    @property
    def model(self) -> nn.Module:
        """The purified model, of the given model's class."""
        return self.result.model

    @property
    def guard(self) -> Guard:
        """The utility lost on held-out clean data, and whether that is too much."""
        return self.result.guard

    @property
    def unchanged(self) -> str:
        """Why no weight changed; empty if at least one did."""
        return self.result.unchanged

    @property
    def choice(self) -> Choice | None:
        """Which defense was chosen, and why; None if there was no choice."""
        return self.result.choice

    def values(self) -> dict[str, float]:
        """Return the measurements by name: rates in ``[0, 1]``, seconds, and the curvature."""
        guard = self.guard
        return {
            "utility_before": guard.before,
            "utility_after": guard.after,
            "utility_drop": guard.drop,
            "utility_drop_low": guard.low,
            "utility_drop_high": guard.high,
            "seconds": self.result.seconds,
            **self._measured,
        }

    def table(self) -> Table:
        """Return the result as a table with one row, to write as CSV or JSON or use in pandas."""
        of = self.names.get("model", type(self.model).__name__)
        verdict: dict[str, Value] = {"verdict": self.guard.verdict, "state": self.guard.state}
        row = {"model": of, "defense": self.result.defense, **self.values(), **verdict}
        return Table([row], f"Purification of {of}")

    def record(self) -> PurificationRecord:
        """Return the record of the purification, as in ``purification.json``."""
        title = self.names.get("model", type(self.prepared.model).__name__)
        choice = self.choice
        if choice is not None:
            choice = dataclasses.replace(choice, settings=plain(choice.settings))
        return PurificationRecord(
            title=title,
            task=getattr(self.prepared.adapter, "task", ""),
            model=self._model_info(title),
            data=records.DataInfo(name=self.names.get("data", "clean samples"), **self.result.data),
            defense=records.DefenseInfo(
                name=registry.name_of("defenses", type(self.defense)),
                settings=self.result.settings,
                reference=_reference(type(self.defense)),
            ),
            guard=_recorded(self.guard),
            seconds=self.result.seconds,
            provenance=self._provenance(),
            triggers=self.result.search,
            choice=choice,
            layers=self.evidence.layers,
            history=tuple(self.result.history),
            measured=self._measured,
            spectra=self._spectra,
            scan=self.scan,
            unchanged=self.unchanged,
            low_utility=self.low_utility,
            accepted_findings=self.accepted_findings,
            evidence=records.EvidenceInfo(
                level=self.evidence.level,
                seconds=self.evidence.seconds,
                skipped=self.evidence.skipped,
            ),
        )

    def plots(self) -> list[Plot]:
        """Return the plots of the page: the defense's own, the curvature, the embedding."""
        return [*self.result.plots, *self.evidence.plots()]

    def save(
        self,
        out: str | Path,
        source: str | Path | None = None,
        *,
        weights: str | None = None,
        force: bool = False,
    ) -> None:
        """Write the model to a new folder, with its evidence.

        The evidence is ``purification.json``, ``report.html`` with ``report.npz``, from which its
        plots can be redrawn, and a section in ``README.md``, unless nothing was changed. The output
        is written atomically: all files appear together, or none.

        Args:
            out: The folder to create.
            source: Where the model was loaded from, by default the path given to :func:`purify`;
                the written weights have its keys, shapes and dtypes, and for a Hugging Face model
                its other files are copied.
            weights: Key of the weights within a checkpoint; see
                :func:`mmdefense.checkpoints.models.load_model`.
            force: Whether to replace an earlier output at ``out``.

        Raises:
            BadInputError: If the folder exists, overlaps with what was read, or cannot be written;
                or if the files of the model have changed since they were read.
        """
        given = [self.names.get(name) for name in ("model", "data")]
        inputs = [one for one in (source, *given) if one is not None]
        with new_folder(out, force=force, inputs=inputs) as folder:
            self.write(folder, source, weights=weights)

    def write(
        self, folder: Path, source: str | Path | None = None, *, weights: str | None = None
    ) -> None:
        """Write the model with its evidence into an existing empty folder.

        Args:
            folder: The folder.
            source: See :meth:`save`.
            weights: See :meth:`save`.

        Raises:
            BadInputError: If the files of the model have changed since they were read.
            OSError: If a file cannot be written.
        """
        source = self.names.get("model") if source is None else source
        weights = self.names.get("weights") if weights is None else weights
        with read_once(source, earlier=self.seal) as seal:
            write_model(self.model, folder, source, weights=weights)
        record, read = self.record(), {} if seal is None else seal.files
        if self.unchanged:
            clear_card(folder / CARD)
        else:
            of_hub = source is not None and not Path(source).exists()
            write_card(record, folder / CARD, base_model=str(source) if of_hub else "")
        write_plots(self.plots(), folder / PLOTS)
        written = hash_all(folder)
        of_weights = [] if source is None else weight_names(source)
        for name in read.keys() & written.keys() - {CARD, *of_weights}:
            # The library writes its own shard index if it repartitions the weights.
            if written[name] != read[name] and not name.endswith(".index.json"):
                raise BadInputError(
                    f"{name} of {source} has changed since it was read; start again"
                )
        hashed = dataclasses.replace(
            record.model,
            files_before={name: read[name] for name in of_weights},
            files_after={n: value for n, value in written.items() if n.endswith(".safetensors")},
        )
        record = dataclasses.replace(record, model=hashed)
        write_statement(record, folder, read, known=written)
        rebuild(folder)

    @property
    def _measured(self) -> dict[str, float]:
        curved = self.evidence.curvature
        if curved is None:
            return {}
        names = (("lambda_max", "lambda_max"), ("trace", "hessian_trace"))
        measured = {
            f"{name}_{when}": getattr(value, part)
            for when, value in (("before", curved.before), ("after", curved.after))
            for part, name in names
            if part in curved.parts
        }
        errors = {
            f"hessian_trace_error_{when}": value.spread
            for when, value in (("before", curved.before), ("after", curved.after))
            if math.isfinite(value.spread)
        }
        return {**measured, **errors, "curvature_samples": float(curved.samples)}

    @property
    def _spectra(self) -> dict[str, records.SpectrumInfo]:
        curved = self.evidence.curvature
        if curved is None or "spectrum" not in curved.parts:
            return {}
        return {
            when: records.SpectrumInfo(
                nodes=tuple(found.spectrum.nodes.tolist()),
                weights=tuple(found.spectrum.weights.tolist()),
            )
            for when, found in (("before", curved.before), ("after", curved.after))
        }

    def _model_info(self, name: str) -> records.ModelInfo:
        return records.ModelInfo(
            name=name,
            architecture=type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            sha256_before=self.prepared.sha256,
            sha256_after=hash_weights(self.model),
        )

    def _provenance(self) -> records.Provenance:
        return records.Provenance(
            seed=self.defense.seed,
            versions=self.result.versions,
            device=str(next(self.model.parameters()).device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.names.get("command", ""),
            threads=self.result.threads,
        )


def _recorded(guard: Guard) -> records.GuardInfo:
    return records.GuardInfo(
        before=guard.before,
        after=guard.after,
        drop=guard.drop,
        drop_low=guard.low,
        drop_high=guard.high,
        bound=guard.bound,
        state=guard.instead or guard.state,
        violated=guard.violated,
        samples=guard.samples,
        message=guard.message,
        metric=guard.metric,
        confidence=0.9,  # each end is a one-sided 95 % bound
        verdict=guard.verdict,
        needed=guard.needed,
        folds=guard.folds,
        caution=guard.caution,
    )


def _reference(kind: type) -> str:
    """Return the reference in a defense's docstring as one line."""
    _, _, after = (inspect.getdoc(kind) or "").partition("References:\n")
    paragraph = after.split("\n\n")[0]
    return " ".join(paragraph.replace("*", "").split())
