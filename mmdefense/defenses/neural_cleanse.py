"""Neural Cleanse with unlearning: recover the trigger of an outlying class, then unlearn it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Interval
from torch import Tensor

from mmdefense.defenses.baeraser import recovered_triggers
from mmdefense.defenses.base import Purifying, TrainingDefense
from mmdefense.defenses.outcome import TriggerSearch
from mmdefense.kernels.coordinates import Weights, trainable
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.inversion import Recovered, Search, recover_once
from mmdefense.kernels.loop import Gradients, optimise
from mmdefense.kernels.outliers import CROWD, cheapest_triggers
from mmdefense.protocol import TriggerAdapter, TriggerFamily
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import NotNegative, Share, Whole

__all__ = ["NeuralCleanse", "outlying"]


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(TrainingDefense):
    """Search for a trigger for every class, and unlearn those that are abnormally small.

    If a class has an anomaly index above ``anomaly``, the model is fine-tuned on clean data, a
    fraction ``share`` of which carries the recovered trigger with its true label. If no class has,
    the model is left unchanged, and the record says why.

    Ours: the search is that of :mod:`mmdefense.kernels.inversion`, at one level, for each trigger
    family that the inputs can carry; the index is computed from costs, see
    :mod:`mmdefense.kernels.outliers`; triggered samples run in eval mode, since the statistics of
    a batch in which every sample carries the trigger would hide it; the schedule is that of plain
    fine-tuning here.

    Attributes:
        tau: Minimum success rate, in ``(0, 1]``, for a trigger to count as working.
        search_steps: Updates of the generators.
        anomaly: Anomaly index above which a class is an outlier; it needs at least 5 classes.
        share: Fraction of the clean samples that carry the trigger.

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao. *Neural Cleanse: Identifying and Mitigating
        Backdoor Attacks in Neural Networks*. IEEE S&P 2019
    """

    requires: ClassVar[type] = TriggerAdapter

    tau: Annotated[float, Interval(gt=0, le=1)] = 0.9
    search_steps: Whole = 80
    anomaly: float = 2.0
    share: Share = 0.2
    lr: NotNegative = 0.02
    steps: Whole = 150

    def _run(self, work: Purifying[Any]) -> None:
        adapter = cast("TriggerAdapter[Any]", work.adapter)
        search = Search(levels=(0.9,), steps=self.search_steps, threshold=self.tau)
        recovered = recover_once(adapter, work.fit, search, work.run, stage="invert")
        found = [outlying(record, self.anomaly) for record in recovered]
        shown = recovered_triggers(adapter, found, self.tau)
        work.plots.append(shown)
        work.search = TriggerSearch(
            targets=len(shown.accepted),
            found=sum(shown.accepted),
            working=sum(shown.works) - sum(shown.accepted),
        )
        pools = [
            (record.family, record.pool[row])
            for record in found
            for row in record.accepted.nonzero().flatten().tolist()
        ]
        work.run.report("invert", 1, 1, outlying=float(len(pools)))
        if not pools:
            work.why_unchanged = _none_outlying(recovered, self.anomaly)
            return
        optimise(
            adapter.model,
            work.fit,
            self.training(adapter),
            work.run,
            gradients=self._gradients(adapter, pools),
            stage="unlearn",
        )

    def _gradients(
        self, adapter: TriggerAdapter[Any], pools: Sequence[tuple[TriggerFamily, Tensor]]
    ) -> Gradients:
        space = Weights(trainable(adapter.model))

        def gradients(batch: Any, step: int) -> Tensor:
            family, triggers = pools[step % len(pools)]
            count = round(self.share * len(batch))
            chosen = triggers[torch.arange(count) % len(triggers)].to(space.weights[0].device)

            def value(rows: slice) -> tuple[Tensor, Tensor]:
                split = min(max(rows.start, count), rows.stop)
                losses = []
                if rows.start < split:
                    carrying = slice(rows.start, split)
                    stamped = adapter.stamp(batch.rows(carrying), family, chosen[None, carrying])
                    with mode(adapter.model, train=False):
                        losses.append(adapter.per_sample_loss(stamped))
                if split < rows.stop:
                    losses.append(adapter.per_sample_loss(batch.rows(slice(split, rows.stop))))
                loss = torch.cat(losses).mean()
                return loss, loss

            loss, found = gradient_in_parts(
                value, len(batch), space.weights, "unlearning", adapter.model
            )
            space.assign(found)
            return loss

        return gradients


def outlying(record: Recovered, anomaly: float) -> Recovered:
    """Return a record that accepts only the cheapest trigger of each outlying target."""
    accepted = torch.zeros_like(record.accepted)
    for answer in cheapest_triggers(record):
        accepted[answer.row] = answer.works and answer.index > anomaly
    return replace(record, accepted=accepted)


def _none_outlying(recovered: Sequence[Recovered], anomaly: float) -> str:
    """Say why no target stands out."""
    every = [answer for record in recovered for answer in cheapest_triggers(record)]
    targets = len({answer.target for answer in every})
    if targets < CROWD:
        return f"{targets} targets are too few for an anomaly index; it needs at least {CROWD}"
    working = [answer.index for answer in every if answer.works]
    if not working:
        return f"none of the {targets} targets has a trigger that works"
    return (
        f"no target stands out; the largest anomaly index is {max(working):.1f}, and the threshold "
        f"is {anomaly:g}"
    )
