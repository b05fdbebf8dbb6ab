"""The base class of the defenses that find their learning rate, and what they train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from mmdefense.data.batch import Batch
from mmdefense.defenses.base import Defense, Purifying, TrainingDefense
from mmdefense.defenses.guard import at_rate
from mmdefense.errors import DivergenceError, UnsupportedError
from mmdefense.kernels.distillation import distilled
from mmdefense.kernels.loop import mean_score
from mmdefense.protocol import DistillingAdapter, TaskAdapter, missing_members
from mmdefense.runtime.run import copy_state
from mmdefense.settings import NotNegative, Positive, Share, Whole

__all__ = ["RateFindingDefense"]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class RateFindingDefense(TrainingDefense):
    """A defense that trains at the largest learning rate that the model tolerates.

    Higher rates remove more of the backdoor. The rate starts too high for any model and is halved
    until a short training run keeps three quarters of the score above chance (ours; a range test
    after Smith 2017, arXiv:1506.01186), and then until the utility guard passes. If no rate keeps
    that much, the largest rate is used that keeps three quarters of what the best rate keeps.

    A model at such a rate forgets more than its backdoor. With ``distillation`` it also trains on
    what the given model predicts for the clean samples: ``(1 - distillation) CE(f(x), y) +
    distillation T^2 KL(g(x) / T || f(x) / T)``, g the given model and T the temperature (Hinton et
    al., arXiv:1503.02531).

    Attributes:
        lr: Where the search starts with SGD.
        adamw_lr: Where it starts with AdamW.
        distillation: Weight of the given model's predictions, in ``[0, 1]``; 0 trains on labels
            alone. It needs a model that predicts distributions, so no detector.
        temperature: T; the logits of both models are divided by it.
    """

    lr: NotNegative = 1.28
    adamw_lr: NotNegative = 0.04
    distillation: Share = 0.0
    temperature: Positive = 2.0
    steps: Whole = 300
    restarts: Whole = 8

    def student(self, adapter: TaskAdapter[B]) -> TaskAdapter[B]:
        """Return the adapter with the loss to train on; to be called on the given model.

        Raises:
            UnsupportedError: If the model predicts no distributions and ``distillation`` is set.
        """
        if not self.distillation:
            return adapter
        if missing := missing_members(adapter, DistillingAdapter):
            raise UnsupportedError(
                f"distillation={self.distillation:g} needs a DistillingAdapter; "
                f"{type(adapter).__name__} lacks {', '.join(missing)}; set distillation=0"
            )
        able = cast("DistillingAdapter[B]", adapter)
        return distilled(able, able.fork(), self.distillation, self.temperature)

    def begins(self, work: Purifying[Any]) -> tuple[Defense, float]:
        """Return this defense at the largest rate that passes the range test, and its fraction."""
        if self.milder() is None:
            return self, 1.0
        found = work.run.once("range test", lambda: self._tested(work))
        work.run.shared.update(found["shared"])
        halvings, defense = int(found["halvings"]), cast("Defense", self)
        for _ in range(halvings):
            defense = defense.milder() or defense
        return defense, 0.5**halvings

    def _tested(self, work: Purifying[Any]) -> dict[str, Any]:
        """Return the number of halvings, and what the short runs computed for every rate."""
        halvings = self._halvings(work)
        return {"halvings": halvings, "shared": dict(work.run.shared)}

    def _halvings(self, work: Purifying[Any]) -> int:
        """Return how often the rate is halved until a short training run keeps most of the score.

        If no rate does, as after a layer was reinitialised, most of the best rate's score counts.
        """
        chance = work.adapter.chance
        enough = _KEPT_SHARE * (mean_score(work.adapter, work.holdout) - chance)
        kept: list[float] = []
        defense: Defense | None = self
        while defense is not None:
            kept.append(self._kept(defense, work, 0.5 ** len(kept)) - chance)
            if kept[-1] >= enough:
                return len(kept) - 1
            defense = defense.milder()
        most = max(kept)
        enough = min(most, _KEPT_SHARE * most)
        return next(count for count, score in enumerate(kept) if score >= enough)

    def _kept(self, defense: Defense, work: Purifying[Any], rate: float) -> float:
        """Return the mean score after a short run at a fraction of the rate; 0 if it diverges."""
        model, name = work.adapter.model, f"range test {at_rate(rate)}"
        given, run = copy_state(model), work.run.milder(name)
        short = replace(defense, steps=max(1, min(_RANGE_STEPS, self.steps // 3)))  # type: ignore[call-arg]
        try:
            short._run(work.on(work.fit, work.holdout, run))
            return mean_score(work.adapter, work.holdout)
        except DivergenceError:
            return 0.0
        finally:
            model.load_state_dict(given)
            work.run.adopt(name, run)


_RANGE_STEPS = 30
"""Updates of the range test, or a third of all updates if that is fewer."""
_KEPT_SHARE = 0.75
"""Fraction of the score above chance that must survive the range test. Both values are ours."""
