"""The front door: a model and a little clean data in, a purified model and its evidence out."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from mmdefense import registry
from mmdefense.batches import Samples
from mmdefense.checkpoints.folders import new_folder
from mmdefense.checkpoints.models import hash_files, hash_inputs, write_model
from mmdefense.checkpoints.runs import RunStore
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.defenses.base import Defense, Result
from mmdefense.defenses.guard import Guard
from mmdefense.errors import BadInputError
from mmdefense.kernels.deadline import Deadline
from mmdefense.kernels.precision import in_float32, typed_like
from mmdefense.kernels.run import Progress
from mmdefense.protocol import TaskAdapter
from mmdefense.report import record as records
from mmdefense.report.archive import write_figures
from mmdefense.report.card import write_card
from mmdefense.report.compare import rebuild
from mmdefense.report.evidence import (
    defense_figures,
    embedding_figure,
    layer_changes,
    sharpness,
    smoothness_figure,
)
from mmdefense.report.figures import Figure
from mmdefense.report.findings import ScanSummary
from mmdefense.report.record import PurificationRecord
from mmdefense.report.statement import CARD, FIGURES, write_statement

__all__ = [
    "Purification",
    "checked_settings",
    "checked_value",
    "configured",
    "described_type",
    "purify",
]


def purify(
    model: nn.Module | TaskAdapter[Any],
    clean: Any,
    defense: str | Defense = "fip",
    *,
    adapter: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    store: RunStore | None = None,
    max_seconds: float | Deadline | None = None,
    **settings: Any,
) -> Purification:
    """Remove what may be hidden in a copy of ``model``; the given model stays as it is.

    Args:
        model: The model, or an adapter around it where it needs options, such as a mean and a
            deviation that its images are normalised by.
        clean: Clean samples: for images a pair ``(images (N, C, H, W), labels (N,))``, a data set
            or loader of such pairs, or what a task's ``load`` returns.
        defense: A name of ``mmdefense list defenses``, or a defense.
        adapter: The name of an adapter, where the choice is not to be left to the model.
        seed: Makes the result reproducible; by default the defense's own.
        progress: Called with each :class:`~mmdefense.kernels.run.Event`.
        store: Where to keep states, so that the same call goes on after a kill.
        max_seconds: Within how many seconds to be done, or by what deadline; what was reached by
            then is judged and returned.
        **settings: Override fields of the defense, for example ``steps=100``.

    Raises:
        BadInputError: If the name, a setting, the data or the model cannot be used.
        UnsupportedError: If no adapter accepts the model, or it lacks what the defense needs.
        DivergenceError: If a loss stopped being finite.

    Example:
        >>> import mmdefense as mmd
        >>> purified = mmd.purify(model, (images, labels), "tsbd")  # doctest: +SKIP
        >>> purified.save("out")  # doctest: +SKIP
    """
    deadline = Deadline.after(max_seconds)
    chosen = configured(defense, settings if seed is None else {**settings, "seed": seed})
    victim = registry.adapt(model, adapter) if isinstance(model, nn.Module) else model
    wide = in_float32(victim)  # what the report measures; images in float32 need it
    samples = wide.samples(clean)
    result = chosen.purify(victim, samples, progress=progress, store=store, max_seconds=deadline)
    return Purification(wide, result, samples, chosen)


def configured(defense: str | Defense, settings: Mapping[str, Any]) -> Defense:
    """Return a defense, by name or as it is, with ``settings`` in place of its own.

    Raises:
        BadInputError: If the name or a setting is unknown, or a value is of the wrong kind.
    """
    if isinstance(defense, Defense):
        kind, kept = type(defense), {f.name: getattr(defense, f.name) for f in _fields(defense)}
    else:
        kind, kept = registry.load("defenses", defense), {}
    return kind(**{**kept, **checked_settings(kind, settings)})


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    return [entry for entry in dataclasses.fields(kind) if entry.init]


def checked_settings(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a dataclass as its fields have them; see :func:`checked_value`.

    Raises:
        BadInputError: Naming the setting, and what is known or needed.
    """
    known = [entry.name for entry in _fields(kind)]
    hints = get_type_hints(kind)
    checked = {}
    for name, value in settings.items():
        if name not in known:
            raise BadInputError(
                f"{kind.__name__} has no setting {name!r}; known are {', '.join(sorted(known))}"
            )
        checked[name] = checked_value(name, value, hints[name], kind.__name__)
    return checked


def checked_value(name: str, value: Any, hint: Any, owner: str) -> Any:
    """Return a value as the type that is asked for has it.

    Where that is a tuple, one value is a tuple of one, and text with commas is a tuple of its
    parts: ``words=cf`` and ``words=cf,mn``.

    Raises:
        BadInputError: Naming the setting, whose it is, and what is needed.
    """
    if _fits(value, hint):
        return value
    parts = tuple(value.split(",")) if isinstance(value, str) else (value,)
    if _fits(parts, hint):
        return parts
    raise BadInputError(f"{name} of {owner} must be {described_type(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value is of a field's type; types that are no plain values are not checked."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin in {tuple, Sequence}:
        return isinstance(value, (tuple, list)) and _all_fit(value, inner)
    if hint in {int, float}:
        number = isinstance(value, int) or (hint is float and isinstance(value, float))
        return number and not isinstance(value, bool)
    if hint in {bool, str, types.NoneType}:
        return isinstance(value, hint)
    return True


def _all_fit(values: Sequence[Any], hints: tuple[Any, ...]) -> bool:
    """Say whether values are of the types of a tuple, or all of the one type of a sequence."""
    if len(hints) > 1 and hints[1] is not ...:
        return len(values) == len(hints) and all(map(_fits, values, hints))
    return all(_fits(value, hints[0]) for value in values)


def described_type(hint: Any) -> str:
    """Return what a value of a type is, in words."""
    if get_origin(hint) in {Union, types.UnionType}:
        return " or ".join(described_type(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    if get_origin(hint) in {tuple, Sequence}:
        kinds = [described_type(inner) for inner in get_args(hint) if inner is not ...]
        return f"a row ({', '.join(kinds)}{', ...' if len(kinds) == 1 else ''})"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return words.get(hint, "None" if hint is types.NoneType else str(hint))


@dataclass(frozen=True)
class Purification:
    """A purified model with its evidence.

    Attributes:
        victim: The adapter around the given model, which is as it was; where that is in half
            precision, around a copy in float32.
        result: What the defense returned.
        samples: The clean samples.
        defense: The defense with all its settings.
        names: What the user called ``model`` and ``data``, and the ``command``, for the record.
        scan: What a look at the given model found before, for the record.
    """

    victim: TaskAdapter[Any]
    result: Result
    samples: Samples[Any] = field(repr=False)
    defense: Defense
    names: Mapping[str, str] = field(default_factory=dict)
    scan: ScanSummary | None = None

    @property
    def model(self) -> nn.Module:
        """The purified model, of the class that was given."""
        return self.result.model

    @property
    def guard(self) -> Guard:
        """How much utility was lost on held-out clean data, and whether that is too much."""
        return self.result.guard

    @property
    def choice(self) -> records.Choice | None:
        """Which defense was taken, and why; none where there was nothing to choose."""
        choice = self.result.figures.get("choice")
        return None if choice is None else records.Choice(**choice)

    def record(self) -> PurificationRecord:
        """Return what is known about the purification, as ``purification.json`` has it."""
        title = self.names.get("model", type(self.victim.model).__name__)
        return PurificationRecord(
            title=title,
            task=getattr(self.victim, "task", ""),
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
            triggers=_search(self.result),
            choice=self.choice,
            layers=self._layers,
            history=tuple(self.result.history),
            figures=self._measured,
            spectra=self._spectra,
            scan=self.scan,
        )

    def figures(self) -> list[Figure]:
        """Return the figures of the page: the defense's own, the curvature, the embedding."""
        own = [
            smoothness_figure(*self._sharpness),
            embedding_figure(self.victim, self.result.adapter, self.samples),
        ]
        return [*defense_figures(self.result), *(figure for figure in own if figure is not None)]

    def save(
        self,
        out: str | Path,
        source: str | Path | None = None,
        *,
        weights: str | None = None,
        force: bool = False,
    ) -> None:
        """Write the model to a new folder, with its evidence.

        That is ``purification.json``, ``report.html`` with ``report.npz``, from which its figures
        can be drawn again, and a section in ``README.md``. All appear together, or none does.

        Args:
            out: The folder to make.
            source: Where the model was loaded from; the written weights have its keys, shapes and
                dtypes, and for a Hugging Face model its other files stand beside them.
            weights: Where in a checkpoint they were; see
                :func:`mmdefense.checkpoints.models.load_model`.
            force: Whether an earlier output at ``out`` is replaced.

        Raises:
            BadInputError: If the folder exists or cannot be written.
        """
        with new_folder(out, force=force) as folder:
            write_model(self.model, folder, source, weights=weights)
            record = self.record()
            written = [hash_files(path) for path in sorted(folder.glob("*.safetensors"))]
            files = dataclasses.replace(
                record.model,
                files_before=hash_files(source) if source is not None else {},
                files_after={name: value for part in written for name, value in part.items()},
            )
            record = dataclasses.replace(record, model=files)
            write_card(record, folder / CARD)
            write_figures(self.figures(), folder / FIGURES)
            write_statement(record, folder, hash_inputs(source) if source is not None else None)
            rebuild(folder)

    @cached_property
    def _sharpness(self) -> Any:
        """Curvature before and after."""
        seed = self.defense.seed
        adapters = (self.victim, self.result.adapter)
        return tuple(sharpness(adapter, self.samples, seed) for adapter in adapters)

    @cached_property
    def _layers(self) -> tuple[records.LayerChange, ...]:
        return layer_changes(self.victim, self.result.adapter)

    @property
    def _measured(self) -> dict[str, float]:
        pairs = zip(("before", "after"), self._sharpness, strict=True)
        return {
            f"{name}_{when}": getattr(value, field)
            for when, value in pairs
            if value is not None
            for name, field in (("lambda_max", "lambda_max"), ("hessian_trace", "trace"))
        }

    @property
    def _spectra(self) -> dict[str, records.SpectrumFigures]:
        pairs = zip(("before", "after"), self._sharpness, strict=True)
        spectra = {when: found.spectrum for when, found in pairs if found is not None}
        return {
            when: records.SpectrumFigures(
                nodes=tuple(found.nodes.tolist()), weights=tuple(found.weights.tolist())
            )
            for when, found in spectra.items()
        }

    def _model_info(self, name: str) -> records.ModelInfo:
        return records.ModelInfo(
            name=name,
            architecture=type(self.model).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            sha256_before=hash_weights(typed_like(self.victim.model, self.model)),
            sha256_after=hash_weights(self.model),
        )

    def _provenance(self) -> records.Provenance:
        return records.Provenance(
            seed=self.defense.seed,
            versions=self.result.versions,
            device=str(next(self.model.parameters()).device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=self.names.get("command", ""),
        )


def _recorded(guard: Guard) -> records.Guard:
    return records.Guard(
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
        confidence=0.9,  # each end is a one-sided 95 % bound
        verdict=guard.verdict,
        needed=guard.needed,
    )


def _search(result: Result) -> records.TriggerSearch | None:
    found = result.figures.get("triggers")
    if found is None:
        return None
    return records.TriggerSearch(targets=len(found["accepted"]), found=sum(found["accepted"]))


def _reference(kind: type) -> str:
    """Return the paper that a defense's docstring names, as one line."""
    _, _, after = (inspect.getdoc(kind) or "").partition("References:\n")
    paragraph = after.split("\n\n")[0]
    return " ".join(paragraph.replace("*", "").split())
