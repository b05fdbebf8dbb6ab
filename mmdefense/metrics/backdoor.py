"""How well a model serves its owner, and how well it serves its attacker.

All rates are shares in ``[0, 1]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmdefense.data.batch import Batch, Samples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import mean_score
from mmdefense.protocol import TaskAdapter

__all__ = ["Rates", "TriggeredSamples", "defense_effectiveness_rating", "measure"]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class TriggeredSamples(Generic[B]):
    """One test set, seen three ways, in one order; samples that are of the target are left out.

    Attributes:
        samples: With the trigger, labelled as the attacker wants them; their score is the ASR.
        truth: The same inputs, labelled as they are; their score is the RA. None where the attack
            leaves no right answer to give.
        clean: Their twins without the trigger, labelled as they are.
    """

    samples: Samples[B]
    truth: Samples[B] | None
    clean: Samples[B]

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How a model behaves, each rate in ``[0, 1]``; none where it was not measured.

    Attributes:
        acc: Accuracy on clean samples, or another task metric where the record says so.
        asr: Attack success rate: share of triggered samples that get the attacker's target.
        ra: Robust accuracy: share of triggered samples that get their true label.
        der: Defense effectiveness rating (FT-SAM, arXiv:2304.11823, Eq. 7); of a purified model.
        retuned: ASR after a retuning attack; see :func:`mmdefense.metrics.permanence.retune`.
    """

    acc: float | None = None
    asr: float | None = None
    ra: float | None = None
    der: float | None = None
    retuned: float | None = None

    def __post_init__(self) -> None:
        for name in ("acc", "asr", "ra", "der", "retuned"):
            rate = getattr(self, name)
            if rate is None or math.isnan(rate):
                object.__setattr__(self, name, None)
            elif not 0 <= rate <= 1:
                raise BadInputError(f"{name} must be a fraction in [0, 1], got {rate}")


def measure(
    adapter: TaskAdapter[B],
    clean_test: Samples[B],
    triggered: TriggeredSamples[B],
    batch_size: int = 256,
) -> Rates:
    """Return ACC, ASR and RA of a model in eval mode, by its adapter's own score.

    Args:
        adapter: The model to measure; it is not changed.
        clean_test: Test samples without a trigger, all classes.
        triggered: What :meth:`mmdefense.attacks.base.Attack.triggered` makes of them.
        batch_size: Samples per forward pass.

    Example:
        >>> from mmdefense.attacks.badnets import BadNets
        >>> measure(adapter, samples, BadNets(target=0).triggered(samples, adapter)).acc
        1.0
    """
    return Rates(
        acc=mean_score(adapter, clean_test, batch_size),
        asr=mean_score(adapter, triggered.samples, batch_size),
        ra=None if triggered.truth is None else mean_score(adapter, triggered.truth, batch_size),
    )


def defense_effectiveness_rating(before: Rates, after: Rates) -> float | None:
    """Return the DER, ``(max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2``, in ``[0, 1]``.

    1 is a backdoor that always worked and never does, at no cost; 0.5 is no change. It is none
    where an ASR or an ACC was not measured.

    References:
        Zhu, Wei, Shen, Fan, Wu. *Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
        Minimization* (FT-SAM), Eq. 7. ICCV 2023. arXiv:2304.11823
    """
    if before.asr is None or after.asr is None or before.acc is None or after.acc is None:
        return None
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2
