"""TSBD: two-stage defense by unlearning weight changes and activeness-aware fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor

from mmdefense.defenses.base import Defense, Purifying
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.errors import BadInputError
from mmdefense.kernels.coordinates import Weights, trainable
from mmdefense.kernels.curvature import gradient_norm_penalty
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.loop import Gradients, loss_gradients, mean_score, optimise
from mmdefense.kernels.perturbations import ASAM_ETA, sharpness_aware_gradient
from mmdefense.kernels.units import (
    Unit,
    gradient_norms,
    parameters_by_name,
    rank,
    restore,
    select_sub_weights,
    weight_change,
    zero,
)
from mmdefense.kernels.unlearning import chance_level, mean_gradient, unlearn
from mmdefense.plots.activeness import Activeness
from mmdefense.plots.weight_change import WeightChange
from mmdefense.protocol import TaskAdapter, UnitGroup
from mmdefense.runtime.run import Run
from mmdefense.settings import BatchSize, NotNegative, Share, Whole

__all__ = ["TSBD", "unlearning_change"]


def unlearning_change(
    adapter: TaskAdapter[Any],
    samples: Any,
    run: Run,
    *,
    stop: float | None = None,
    lr: NotNegative = 1e-3,
    batch_size: int = 256,
    max_epochs: int = 1000,
) -> dict[str, Tensor]:
    """Return the change of each parameter, ``|theta_ul - theta|``, when clean data is unlearnt.

    The ascent runs on a fork, so the model is unchanged. The settings are those of :class:`TSBD`.
    """

    def compute() -> dict[str, Any]:
        fork = adapter.fork()
        before = parameters_by_name(fork.model)
        unlearn(
            fork,
            samples,
            run,
            stop=chance_level(adapter, samples) if stop is None else stop,
            lr=lr,
            batch_size=batch_size,
            max_epochs=max_epochs,
        )
        after = parameters_by_name(fork.model)
        return {name: (after[name] - value).abs() for name, value in before.items()}

    device = next(adapter.model.parameters()).device
    change = run.once("change", compute, at_any_rate=True)
    return {name: value.to(device) for name, value in change.items()}


@dataclass(frozen=True, kw_only=True)
class TSBD(RateFindingDefense):
    """Zero the weights that change most when clean data is unlearnt, then fine-tune gently.

    Stage 1: ascend the clean loss until the model is at chance. A unit's *neuron weight change*
    (NWC) is the L1 norm of the change of its weights. In the fraction n of units with the largest
    NWC, over all layers together, zero the fraction m of weights that changed most. Stage 2:
    minimise ``CE + alpha r ||grad CE||`` with a forward difference (activeness-aware).

    Attributes:
        ratio: The paper's neuron ratio n. None chooses it on held-out samples: the smallest of
            ``candidates`` whose zeroing takes the score a quarter of the way down to chance, before
            any fine-tuning (ours; the released code logs the test accuracy of every n and does not
            choose).
        candidates: Neuron ratios to choose from, ascending: the released code's sweep, and smaller
            ones (ours), since a deep network may be at chance with 1 % of its units zeroed.
        sub_ratio: The paper's sub-weight ratio m.
        fine_tuning: ``"activeness-aware"``, ``"sharpness-aware"`` (at the worst weights within
            ``sam_radius``, as in FT-SAM; ours), ``"vanilla"`` (alpha 0) or ``"none"``.
        sam_radius: Radius of sharpness-aware fine-tuning.
        unlearn_lr: Learning rate of the ascent; ten times the code's, which needs hundreds of
            epochs for the same ranking on a small clean set (ours).
        unlearn_stop: Score at which the ascent ends. None means chance: 1/C, or the frequency of
            the most common class if that is more. The code uses 0.10 on every data set.
        unlearn_epochs: Largest number of epochs of the ascent.
        unlearn_batch_size: Samples per update of the ascent.
        radius: The paper's r.
        mix: The paper's alpha.
        norm: ``"global"`` as in the formula; ``"tensor"`` as in the released code, where every
            tensor moves by r.
        lr: As for every defense that trains; the code uses a constant 0.01.
        steps: Updates of stage 2.

    References:
        Lin, Liu, Wei, Li, Xiong. *Unveiling and Mitigating Backdoor Vulnerabilities based on
        Unlearning Weight Changes and Backdoor Activeness*. NeurIPS 2024. arXiv:2405.20291
    """

    ratio: Share | None = None
    candidates: tuple[Share, ...] = (
        0.001,
        0.002,
        0.005,
        0.01,
        0.02,
        0.05,
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.4,
        0.5,
        0.7,
        0.9,
    )
    sub_ratio: Annotated[float, Interval(gt=0, le=1)] = 0.7
    fine_tuning: Literal["activeness-aware", "sharpness-aware", "vanilla", "none"] = (
        "activeness-aware"
    )
    sam_radius: NotNegative = 2.0
    unlearn_lr: NotNegative = 1e-3
    unlearn_stop: NotNegative | None = None
    unlearn_epochs: Whole = 1000
    unlearn_batch_size: BatchSize = 256
    radius: NotNegative = 0.05
    mix: Share = 0.7
    norm: Literal["global", "tensor"] = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio is None and not self.candidates:
            raise BadInputError("candidates must hold at least one ratio, got none")

    def milder(self) -> Defense | None:
        """Return this defense at half its learning rate; None without fine-tuning."""
        return None if self.fine_tuning == "none" else super().milder()

    def _run(self, work: Purifying[Any]) -> None:
        adapter = work.adapter
        groups = list(adapter.unit_groups())
        change = unlearning_change(
            adapter,
            work.fit,
            work.run,
            stop=self.unlearn_stop,
            lr=self.unlearn_lr,
            batch_size=self.unlearn_batch_size,
            max_epochs=self.unlearn_epochs,
        )
        scores = weight_change(change, groups)
        order = rank(scores, descending=True)
        active = self._activeness(work, groups)
        ratio = self.ratio
        if ratio is None:
            chosen = work.run.once(
                "ratio",
                lambda: {"ratio": self._ratio(work, groups, change, order)},
                at_any_rate=True,
            )
            ratio = float(chosen["ratio"])
        student = self.student(adapter)
        self._reinitialise(adapter, groups, change, order[: int(ratio * len(order))])
        work.run.report("reinitialise", 1, 1, ratio=ratio)
        if self.fine_tuning != "none":
            optimise(
                adapter.model,
                work.fit,
                self.training(adapter),
                work.run,
                gradients=self._gradients(student),
                stage="fine-tune",
            )
        changes = torch.cat([score.cpu() for score in scores])
        work.plots += [
            WeightChange(changes, reset=int(ratio * len(order))),
            Activeness(active, self._activeness(work, groups)),
        ]

    def _ratio(
        self,
        work: Purifying[Any],
        groups: Sequence[UnitGroup],
        change: Mapping[str, Tensor],
        order: Sequence[Unit],
    ) -> float:
        """Return the fraction n of units to reinitialise; the model is not changed."""
        adapter = work.adapter
        before = mean_score(adapter, work.holdout)
        enough = before - (before - adapter.chance) / 4
        given = parameters_by_name(adapter.model)
        ratio, units = 0.0, 0
        try:
            for number, ratio in enumerate(self.candidates):
                work.run.report("choose a ratio", number, len(self.candidates))
                if units == (units := int(ratio * len(order))):
                    continue  # rounds to zero units, or to the previous count
                restore(adapter.model, given)
                self._reinitialise(adapter, groups, change, order[:units])
                if mean_score(adapter, work.holdout) <= enough:
                    break
        finally:
            restore(adapter.model, given)
        return ratio

    def _reinitialise(
        self,
        adapter: TaskAdapter[Any],
        groups: Sequence[UnitGroup],
        change: Mapping[str, Tensor],
        units: Sequence[Unit],
    ) -> None:
        """Zero the selected sub-weights of units."""
        if units:
            zero(adapter.model, select_sub_weights(change, groups, units, self.sub_ratio))

    def _gradients(self, adapter: TaskAdapter[Any]) -> Gradients:
        if self.fine_tuning == "vanilla":
            return loss_gradients(adapter)
        if self.fine_tuning == "sharpness-aware":
            return self._sharpness_aware(adapter)
        parameters = [p for p in adapter.model.parameters() if p.requires_grad]

        def compute(batch: Any, _: int) -> Tensor:
            return gradient_norm_penalty(
                adapter, batch, parameters, radius=self.radius, mix=self.mix, norm=self.norm
            )

        return compute

    def _sharpness_aware(self, adapter: TaskAdapter[Any]) -> Gradients:
        space = Weights(trainable(adapter.model))

        def compute(batch: Any, _: int) -> Tensor:
            loss, found = sharpness_aware_gradient(
                adapter, batch, space, radius=self.sam_radius, eta=ASAM_ETA
            )
            space.assign(found)
            return loss

        return compute

    def _activeness(self, work: Purifying[Any], groups: Sequence[UnitGroup]) -> Tensor:
        """Return the gradient norm of each unit on some clean samples, for the report."""
        batch = work.fit.take(torch.arange(min(256, len(work.fit))))
        with mode(work.adapter.model, train=False):
            norms = gradient_norms(mean_gradient(work.adapter, batch), groups)
        return torch.cat(norms).cpu()
