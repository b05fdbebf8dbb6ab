"""BAERASER: recover triggers, then unlearn them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Interval, MinLen
from torch import Tensor

from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.defenses.outcome import TriggerSearch
from mmdefense.kernels.fisher import fisher_diagonal
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.inversion import Recovered, Search, recover_once, some_of, success_of
from mmdefense.kernels.loop import Gradients, optimise
from mmdefense.plots.inverted_samples import InvertedSamples
from mmdefense.plots.recovered_triggers import RecoveredTriggers
from mmdefense.protocol import (
    TaskAdapter,
    TriggerAdapter,
    TriggerFamily,
    WordedAdapter,
    missing_members,
)
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import NotNegative, OpenShare, Whole
from mmdefense.training import Training

__all__ = ["BaEraser", "recovered_triggers"]


@dataclass(frozen=True, kw_only=True)
class BaEraser(TrainingDefense):
    """Recover trigger distributions for every target class, and unlearn them.

    Step A is the max-entropy staircase approximator. It trains a generator for every class and
    level in parallel, and keeps those whose triggers succeed on at least ``tau`` of the clean
    samples within their family's budget; a target whose trigger is more than twice as large as
    another target's, each relative to the budget of its family, is not accepted (ours). Step B
    minimises, over clean samples x and recovered triggers t for target y_t, ``CE(f(x), y) +
    ascent_weight log p(y_t | x + t) + repair_weight CE(f(x + t), y) + drift_weight sum_i w_i
    |theta_i - theta_0i|``: gradient ascent on the triggers, constrained by the clean loss and by a
    penalty on weight drift, whose weights w follow the Fisher information of the current model (the
    dynamic part). The third term is ours: ascent alone sends triggered samples to any other class
    than the target, and the true label brings them back, as Neural Cleanse does (Wang et al., S&P
    2019, section VI.C). Ascent on a sample ends when its target is no likelier than chance, and
    ascent on a trigger pauses while it succeeds on at most ``stop`` of the samples; training
    continues until the rate has decayed to zero. With more ``rounds`` the search is then repeated
    until it finds nothing. Triggers are judged and unlearnt in eval mode, as at inference: the
    statistics of a batch in which every sample carries the trigger would hide it.

    The released code is given the target, trains one generator of one level, has constant weights
    and uses the true trigger to decide when to stop; none of that is done here. Additive triggers
    are searched for as well as patches; the position and size of a patch are part of the search.

    Attributes:
        tau: Minimum success rate, in ``[0, 1]``, for a generator to be kept.
        levels: Staircase levels of MESA.
        search_steps: Updates of the generators.
        screening: Updates of a cheaper first search with one level, which is run for two fifths of
            them as well; only targets that stand out in one are searched in full. 0 searches all
            targets, as the paper does (ours: some networks respond to natural triggers, and
            unlearning those costs accuracy).
        entropy: Weight of the mutual information; the code's alpha.
        rounds: Largest number of searches (ours: one; a second search, in the cleaned model, found
            only natural triggers).
        ascent_weight: Weight of the ascent relative to the clean loss (ours; the code's is 1/100):
            at 1 a natural trigger cost clean networks three points of accuracy.
        repair_weight: Weight of the loss of triggered samples with their true labels; 0 leaves it
            out, as the paper does.
        drift_weight: The paper's beta (ours; the code has a plain L1 penalty with 1e-6).
        stop: Ascent on a recovered trigger pauses while its success rate is at most this.
        steps: Unlearning updates per round; each uses as many triggered samples as clean ones.
        restarts: As for every defense that trains; they do not repeat the first search for
            triggers.

    References:
        Liu, Fan, Chen, Liu, Ma, Wang, Ma. *Backdoor Defense with Machine Unlearning*. INFOCOM
        2022. arXiv:2201.09538
        Qiao, Yang, Li. *Defending Neural Backdoors via Generative Distribution Modeling*.
        NeurIPS 2019. arXiv:1910.04749
    """

    requires: ClassVar[type] = TriggerAdapter

    tau: Annotated[float, Interval(gt=0, le=1)] = 0.9
    levels: Annotated[tuple[OpenShare, ...], MinLen(1)] = (0.5, 0.8, 0.9)
    search_steps: Whole = 100
    screening: Whole = 100
    entropy: NotNegative = 0.1
    rounds: Whole = 1
    ascent_weight: NotNegative = 0.5
    repair_weight: NotNegative = 1.0
    drift_weight: NotNegative = 1e-3
    stop: float = 0.02
    lr: NotNegative = 0.04
    steps: Whole = 300
    restarts: Whole = 4

    def training(self, adapter: TaskAdapter[Any]) -> Training:
        """Return the settings of the training loop for one round."""
        # A run resumes at a step that computes the penalty's weights and the triggers' success.
        training = super().training(adapter)
        return dataclasses.replace(training, check_every=_PERIOD, resume_every=_PERIOD)

    def _run(self, work: Purifying[Any]) -> None:
        search = Search(
            levels=self.levels,
            steps=self.search_steps,
            entropy=self.entropy,
            threshold=self.tau,
            screening=self.screening,
        )
        for turn in range(self.rounds):
            found = recover_once(
                _trigger_adapter(work),
                work.fit,
                search,
                work.run,
                stage=f"recover {turn}",
                at_any_rate=turn == 0,  # later rounds search a model that depends on the rate
            )
            pools = [
                (record.family, target, record.pool[index])
                for record in found
                for index, target in enumerate(record.targets.tolist())
                if bool(record.accepted[index])
            ]
            work.run.report(f"recover {turn}", 1, 1, accepted=float(len(pools)))
            if turn == 0:
                shown = recovered_triggers(work.adapter, found, self.tau)
                work.search = TriggerSearch(
                    targets=len(shown.accepted),
                    found=sum(shown.accepted),
                    working=sum(
                        works and not took
                        for works, took in zip(shown.works, shown.accepted, strict=True)
                    ),
                )
                samples = _samples(work, found)
                work.plots += [shown] if samples is None else [shown, samples]
            if not pools and turn == 0:
                work.why_unchanged = _none_accepted(found, self.tau)
            if not pools:
                return
            work.run.snapshot(f"before round {turn}", work.adapter.model) if turn else None
            self._unlearn(work, pools, turn)

    def _unlearn(self, work: Purifying[Any], pools: Sequence[_Pool], turn: int) -> None:
        """Unlearn the recovered triggers."""
        adapter = _trigger_adapter(work)
        parameters = [p for p in adapter.model.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in parameters]

        optimise(
            adapter.model,
            work.fit,
            self.training(adapter),
            work.run,
            stage=f"unlearn {turn}",
            gradients=self._gradients(work, pools, parameters, start, turn),
        )
        self._still_working(work, pools, turn, self.steps)

    def _still_working(
        self, work: Purifying[Any], pools: Sequence[_Pool], turn: int, step: int
    ) -> list[_Pool]:
        """Return the pools whose triggers still succeed on the current model."""
        success = [success_of(_trigger_adapter(work), work.fit, *pool) for pool in pools]
        work.run.report(f"unlearn {turn}", step, self.steps, recovered_success=max(success))
        return [pool for pool, share in zip(pools, success, strict=True) if share > self.stop]

    def _importance(
        self, work: Purifying[Any], parameters: Sequence[Tensor], turn: int, step: int
    ) -> list[Tensor]:
        """Return the Fisher information of each weight on clean data now, scaled to mean one."""
        some = work.fit.subset(some_of(len(work.fit), 512))
        generator = work.run.generator(f"importance {turn}/{step}", parameters[0].device)
        diagonal = fisher_diagonal(work.adapter, some, parameters, generator)
        count = sum(value.numel() for value in diagonal)
        mean = torch.stack([value.sum() for value in diagonal]).sum() / count
        return list(torch._foreach_div(diagonal, mean.clamp(min=1e-30)))

    def _gradients(
        self,
        work: Purifying[Any],
        pools: Sequence[_Pool],
        parameters: Sequence[Tensor],
        start: Sequence[Tensor],
        turn: int,
    ) -> Gradients:
        adapter = _trigger_adapter(work)
        weights: list[Tensor] = []
        working: list[_Pool] = []

        def compute(batch: Any, step: int) -> Tensor:
            if step % _PERIOD == 0:  # here, so that a resumed run also starts with it
                weights[:] = self._importance(work, parameters, turn, step)
                working[:] = self._still_working(work, pools, turn, step)
            pool = working[step % len(working)] if working else None

            def value(rows: slice) -> tuple[Tensor, Tensor]:
                some = batch.rows(rows)
                ascent = 0 if pool is None else self._ascent(adapter, some, pool, rows)
                repair = self._repair(adapter, some, pools[step % len(pools)], rows)
                loss = adapter.per_sample_loss(some).mean()
                return loss, loss + self.ascent_weight * ascent + self.repair_weight * repair

            loss, gradients = gradient_in_parts(
                value, len(batch), parameters, "training", adapter.model
            )
            with torch.no_grad():
                drift = torch._foreach_sign(torch._foreach_sub(list(parameters), list(start)))
                torch._foreach_mul_(drift, weights)
                torch._foreach_mul_(drift, self.drift_weight)
                torch._foreach_add_(drift, gradients)
            for parameter, gradient in zip(parameters, drift, strict=True):
                parameter.grad = gradient
            return loss

        return compute

    @staticmethod
    def _ascent(adapter: TriggerAdapter[Any], batch: Any, pool: _Pool, rows: slice) -> Tensor:
        """Return the mean of ``log p(y_t | x + t)``, for the ``rows`` of a batch."""
        stamped = _stamped(adapter, batch, pool, rows)
        device = next(adapter.model.parameters()).device
        targets = torch.full((len(batch),), pool[1], device=device)
        floor = -math.log(adapter.trigger_targets())
        with mode(adapter.model, train=False):
            log_p = adapter.target_log_probability(stamped, targets).clamp(min=floor)
        return (log_p * adapter.not_target(batch, targets)).mean()

    def _repair(
        self, adapter: TriggerAdapter[Any], batch: Any, pool: _Pool, rows: slice
    ) -> Tensor | float:
        """Return the mean loss of ``x + t`` by its true label, for the ``rows`` of a batch."""
        if not self.repair_weight:
            return 0.0
        stamped = _stamped(adapter, batch, pool, rows)
        with mode(adapter.model, train=False):
            return adapter.per_sample_loss(stamped).mean()


def _stamped(adapter: TriggerAdapter[Any], batch: Any, pool: _Pool, rows: slice) -> Any:
    """Return the ``rows`` of a batch with the triggers of a pool in turn."""
    family, _, triggers = pool
    device = next(adapter.model.parameters()).device
    chosen = triggers[torch.arange(rows.start, rows.stop) % len(triggers)]
    return adapter.stamp(batch, family, chosen[None].to(device))


def _trigger_adapter(work: Purifying[Any]) -> TriggerAdapter[Any]:
    """Return the adapter, cast to the type that ``purify`` has checked."""
    return cast("TriggerAdapter[Any]", work.adapter)


_PERIOD = 20
"""Steps between two evaluations of the recovered triggers and of the drift penalty's weights."""

_Pool = tuple[TriggerFamily, int, Tensor]
"""A trigger family, a target, and triggers ``(M, *P)`` for that target."""


def _none_accepted(found: Sequence[Recovered], tau: float) -> str:
    """Say that no trigger was accepted, and how close the best one came."""
    success = max((float(record.success.max()) for record in found), default=0.0)
    if success < tau:
        best = f"the best one works on {success:.0%} of the samples, and tau is {tau:.0%}"
    else:
        best = f"the best one works on {success:.0%} of the samples, but is too large for a trigger"
    return f"no trigger was accepted; {best}"


def recovered_triggers(adapter: Any, found: Sequence[Recovered], tau: float) -> RecoveredTriggers:
    """Return the best trigger of each target and family, for the report.

    A trigger that works within its family's budget is the best even if it was not accepted.
    """
    images, names, success, accepted, works = [], [], [], [], []
    for record in found:
        for target in sorted(set(record.targets.tolist())):
            mine = (record.targets == target).nonzero().flatten()
            within = (record.success >= tau) & (record.size <= record.family.budget)
            best = mine[(record.success + within)[mine].argmax()]
            images.append(adapter.trigger_picture(record.family, record.pool[best, 0]))
            names.append(_named(adapter, record, int(best)))
            success.append(float(record.success[best]))
            accepted.append(bool(record.accepted[mine].any()))
            works.append(bool(within[mine].any()))
    return RecoveredTriggers(images, names, success, accepted, works)


def _samples(work: Purifying[Any], found: Sequence[Recovered]) -> InvertedSamples | None:
    """Return a few samples without and with the best accepted trigger, for the report."""
    accepted = [
        (float(record.success[index]), record, index)
        for record in found
        for index in record.accepted.nonzero().flatten().tolist()
    ]
    if not accepted:
        return None
    success, record, index = max(accepted, key=lambda entry: entry[0])
    part = work.fit.subset(some_of(len(work.fit), _SHOWN))
    batch = part.take(torch.arange(len(part)))
    trigger = record.pool[index, :1].to(next(work.adapter.model.parameters()).device)
    stamped = _trigger_adapter(work).stamp(
        batch, record.family, trigger[None].expand(-1, len(part), *trigger.shape[1:])
    )
    name = _named(work.adapter, record, index)
    return InvertedSamples.of_batches(batch, stamped, name, success)


def _named(adapter: Any, record: Recovered, index: int) -> str:
    """Describe a trigger by its family and target; for text, by its words and its target's."""
    target = int(record.targets[index])
    if missing_members(adapter, WordedAdapter):
        return f"{record.family.name} to {target}"
    worded = cast("WordedAdapter[Any]", adapter)
    words = worded.trigger_words(record.pool[index, 0])
    return f"{words!r} to {worded.target_words(target)!r}"


_SHOWN = 10
"""Number of samples that the report shows with a recovered trigger."""
