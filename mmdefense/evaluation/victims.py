"""Victims, described by their data, network and attack: trained, restored and purified."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmdefense import registry
from mmdefense.attacks.base import Attack
from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.checkpoints.runs import RunStore
from mmdefense.data.batch import Samples, split
from mmdefense.data.shifts import shifted
from mmdefense.defenses.base import Defense
from mmdefense.errors import BadInputError, DivergenceError, UnsupportedError
from mmdefense.evaluation.cases import Change
from mmdefense.evaluation.identity import loaded
from mmdefense.evaluation.lineup import with_baselines
from mmdefense.evaluation.others import foreign_images, labelled_by_the_model
from mmdefense.kernels.loop import mean_score, train
from mmdefense.metrics.backdoor import Rates, defense_effectiveness_rating
from mmdefense.metrics.permanence import Retuning, retune
from mmdefense.pipeline.evaluating import retuning_of
from mmdefense.pipeline.purification import Purification, purify
from mmdefense.protocol import Case, Task, TaskAdapter
from mmdefense.report.encoding import plain
from mmdefense.report.record import Row
from mmdefense.runtime.run import Progress, Run
from mmdefense.shown import Shown

__all__ = [
    "Victim",
    "compared",
    "for_defenses",
    "kept_tensors",
    "purified_row",
    "restore_victim",
    "train_and_describe",
    "train_victim",
]


@dataclass(frozen=True, repr=False)
class Victim(Shown):
    """A trained victim, with the data of defenses and of their evaluation.

    Attributes:
        task: The task, whose metric is measured.
        adapter: The adapter around the model.
        attack: The attack; None for a clean model.
        clean: Clean samples that defenses get.
        test: Test samples, which no defense sees.
        known: The rates of the victim, if they were measured before.
        retune: Poisoned samples that purified models are retuned on; 0 leaves this out. See
            :mod:`mmdefense.metrics.permanence`.
        twin: A model of the same data, network and seed that never had the backdoor.
    """

    task: Task
    adapter: TaskAdapter[Any]
    attack: Attack[Any] | None
    clean: Samples[Any]
    test: Samples[Any]
    known: Rates | None = None
    retune: int = 0
    twin: TaskAdapter[Any] | None = None

    @cached_property
    def before(self) -> Rates:
        """Task metric, ASR and RA of the victim."""
        return self.known or _rates(self.task, self.adapter, self.attack, self.test)

    def after(self, adapter: TaskAdapter[Any]) -> Rates:
        """Return task metric, ASR, RA and DER of a purified model."""
        rates = _rates(self.task, adapter, self.attack, self.test)
        return replace(rates, der=defense_effectiveness_rating(self.before, rates))

    def retuned(self, adapter: TaskAdapter[Any]) -> Retuning | None:
        """Return the result of retuning on a few poisoned samples; None if it is not requested.

        The samples are the clean ones of the defense, some of them poisoned.

        Raises:
            BadInputError: If too few of them can be poisoned.
        """
        if self.attack is None or not self.retune:
            return None
        return retune(
            adapter,
            self.clean,
            self.test,
            self.attack,
            self.retune,
            twin=self.twin,
            training=retuning_of(adapter),
            run=Run(self.attack.seed),
        )


def train_victim(case: Case, run: Run, device: str = "cpu") -> Victim:
    """Train the victim of a case; an interrupted training resumes from the store of ``run``."""
    victim, planted = _untrained(case, run, device)
    adapter = victim.adapter
    if victim.attack is None:
        train(adapter, adapter.samples(planted), case.training, run, stage="victim")
        return victim
    return replace(victim, attack=victim.attack.plant(adapter, planted, case.training, run))


def train_and_describe(
    case: Case, seed: int, progress: Progress, device: str, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train a victim; return its rates as JSON values, and its tensors.

    Args:
        case: The victim to train.
        seed: Seed of the weights, the poisoned samples and the training.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
        device: The device to compute on.
        folder: Folder of states, from which an interrupted training resumes.
    """
    victim = train_victim(case, Run(seed, progress, RunStore(folder)), device)
    return {"case": plain(case), "before": plain(victim.before)}, kept_tensors(victim)


def kept_tensors(victim: Victim) -> dict[str, Tensor]:
    """Return the trained tensors of a victim: its weights, and what its attack has learnt."""
    state = {f"model.{name}": value for name, value in victim.adapter.model.state_dict().items()}
    learnt = victim.attack.fitted if victim.attack else {}
    return state | {f"attack.{name}": value for name, value in learnt.items()}


def restore_victim(
    case: Case, seed: int, tensors: Mapping[str, Tensor], before: Rates, device: str = "cpu"
) -> Victim:
    """Return a trained victim from its rates and the tensors of :func:`kept_tensors`."""
    victim, _ = _untrained(case, Run(seed), device)
    victim.adapter.model.load_state_dict(_within("model.", tensors))
    victim.adapter.model.eval()
    attack = victim.attack and replace(victim.attack, fitted=_within("attack.", tensors))
    return replace(victim, attack=attack, known=before)


def for_defenses(victim: Victim, case: Case, change: Change | None, seed: int) -> Victim:
    """Return a victim with the clean samples that the defenses of a grid get.

    Args:
        victim: The victim, with clean samples as the task loads them.
        case: Its case.
        change: How they differ from the victim's training data, if they do.
        seed: Seed of the noise, and of the choice of other images.

    Raises:
        UnsupportedError: If there are no samples of this kind.
    """
    clean = victim.clean
    generator = Run(seed).generator("shift")
    if change == "other":
        _, foreign = foreign_images(case.task, case.data)
        clean = labelled_by_the_model(victim.adapter, cast("Any", clean), foreign, generator)
    elif change is not None:
        clean = shifted(clean, change, generator)
    return replace(victim, clean=clean)


def _within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _untrained(case: Case, run: Run, device: str) -> tuple[Victim, Samples[Any]]:
    """Return the victim of a case before its training, and its training samples."""
    place = torch.device(device)
    task: Task = registry.load("tasks", case.task)()
    train_set, test = (loaded(case.task, case.data, part) for part in ("train", "test"))
    model = _fresh_model(case, task.describe(train_set), run).to(place)
    adapter = registry.adapt(model, **task.adapter_options(train_set))
    rest, clean = split(train_set, case.clean, run.seed)
    planted = task.for_training(train_set if case.seen else rest)
    adapter.samples(planted)
    attack: Attack[Any] | None = None
    if case.attack is not None:
        attack = registry.load("attacks", case.attack)(seed=run.seed, **case.settings)
    return Victim(task, adapter, attack, clean.to(place), test.to(place)), planted.to(place)


def _fresh_model(case: Case, filled: Mapping[str, Any], run: Run) -> nn.Module:
    """Return the network of a case with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.default_generator.manual_seed(run.seed_for("weights"))
        return build_architecture(case.model.format(**filled))


def _rates(
    task: Task, adapter: TaskAdapter[Any], attack: Attack[Any] | None, test: Samples[Any]
) -> Rates:
    acc = task.measure(adapter, adapter.samples(test))
    if attack is None:
        return Rates(acc=acc)
    triggered = attack.triggered(test, adapter)
    asr = float(attack.success(adapter, adapter.samples(triggered.samples)).mean())
    if triggered.truth is None:
        return Rates(acc=acc, asr=asr)
    return Rates(acc=acc, asr=asr, ra=mean_score(adapter, adapter.samples(triggered.truth)))


def purified_row(
    victim: Victim,
    name: str,
    defense: Defense,
    baseline: str = "",
    progress: Progress | None = None,
) -> tuple[Row, Purification | None]:
    """Purify a victim; return the row of a table, and the purification.

    If the model lacks what the defense needs, the row says so, and the purification is None.
    """
    kept: dict[str, Any] = {"defense": name, "before": victim.before}
    try:
        purified = purify(
            victim.adapter,
            victim.clean,
            defense,
            progress=progress,
            evidence="none",
            accept_low_utility=True,  # the victim was trained on data of this kind
        )
    except UnsupportedError as error:
        settings = dataclasses.asdict(defense)
        return Row(**kept, after=Rates(), seconds=0.0, settings=settings, note=str(error)), None
    adapter = purified.result.adapter
    notes = [f"nothing was changed: {purified.unchanged}"] if purified.unchanged else []
    retuned = None
    try:
        retuned = victim.retuned(adapter)
    except (BadInputError, DivergenceError) as error:  # the purification itself was measured
        notes.append(f"not retuned: {error}")
    row = Row(
        **kept,
        after=replace(victim.after(adapter), retuned=None if retuned is None else retuned.asr),
        retuned_twin=retuned.twin[-1].asr if retuned and retuned.twin else None,
        seconds=purified.result.seconds,
        baseline=baseline,
        violated=purified.guard.violated,
        undecided=purified.guard.undecided,
        instead=purified.guard.instead,
        settings=purified.result.settings,
        note="; ".join(notes),
    )
    return row, purified


def compared(
    victim: Victim, defenses: Mapping[str, Defense], progress: Progress | None = None
) -> Iterator[tuple[Row, Purification | None]]:
    """Yield the row and purification of each defense, and then of the baselines of its budget.

    Args:
        victim: The victim.
        defenses: Defenses by their name in the table.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
    """
    for row in with_baselines(defenses):
        yield purified_row(victim, row.label, row.defense, row.baseline, progress)
