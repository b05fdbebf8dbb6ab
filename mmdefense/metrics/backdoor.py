"""How well a model serves its owner, and how well it serves its attacker.

All figures are shares in ``[0, 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from mmdefense.data.batch import Batch, Samples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import mean_score
from mmdefense.protocol import TaskAdapter

__all__ = [
    "BackdoorMetrics",
    "TriggeredSamples",
    "accuracy",
    "attack_success_rate",
    "defense_effectiveness_rating",
    "measure",
    "robust_accuracy",
]

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


@dataclass(frozen=True)
class BackdoorMetrics:
    """What a model does with clean and with triggered inputs, each a share in ``[0, 1]``.

    Attributes:
        acc: Clean accuracy, or the task's metric in its place.
        asr: Attack success rate: triggered inputs that are answered as the attacker wants.
        ra: Robust accuracy: triggered inputs that are answered rightly all the same, where such an
            answer exists.
    """

    acc: float
    asr: float
    ra: float | None = None


def measure(
    adapter: TaskAdapter[B],
    clean_test: Samples[B],
    triggered: TriggeredSamples[B],
    batch_size: int = 256,
) -> BackdoorMetrics:
    """Return ACC, ASR and RA of a model in eval mode, by its adapter's own score.

    Args:
        adapter: The model to measure; it is not changed.
        clean_test: Test samples without a trigger, all classes.
        triggered: What :meth:`mmdefense.attacks.base.Attack.triggered` makes of them.
        batch_size: Samples per forward pass.
    """
    return BackdoorMetrics(
        acc=mean_score(adapter, clean_test, batch_size),
        asr=mean_score(adapter, triggered.samples, batch_size),
        ra=None if triggered.truth is None else mean_score(adapter, triggered.truth, batch_size),
    )


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of predicted classes, shape ``(N,)``, that equal ``labels``.

    Raises:
        BadInputError: If the shapes differ or there is no sample.
    """
    if predicted.shape != labels.shape or not len(labels):
        raise BadInputError(
            "predicted and labels must have one shape (N,) with N >= 1, got "
            f"{tuple(predicted.shape)} and {tuple(labels.shape)}"
        )
    return float((predicted == labels).double().mean())


def attack_success_rate(predicted: Tensor, labels: Tensor, targets: Tensor) -> float:
    """Return the share of triggered samples that are predicted as their target.

    Samples whose true label is the target say nothing about the trigger, and do not count.

    Args:
        predicted: Classes that the model gives to triggered inputs, shape ``(N,)``.
        labels: True classes, shape ``(N,)``.
        targets: Classes that the attacker wants, shape ``(N,)``.

    Raises:
        BadInputError: If no sample has a target other than its label.
    """
    attacked = _attacked(labels, targets)
    return accuracy(predicted[attacked], targets[attacked])


def robust_accuracy(predicted: Tensor, labels: Tensor, targets: Tensor) -> float:
    """Return the share of triggered samples that are predicted as their true class.

    It counts the samples of :func:`attack_success_rate`, so that the two never sum to more than 1.

    Args:
        predicted: Classes that the model gives to triggered inputs, shape ``(N,)``.
        labels: True classes, shape ``(N,)``.
        targets: Classes that the attacker wants, shape ``(N,)``.

    Raises:
        BadInputError: If no sample has a target other than its label.
    """
    attacked = _attacked(labels, targets)
    return accuracy(predicted[attacked], labels[attacked])


def _attacked(labels: Tensor, targets: Tensor) -> Tensor:
    attacked = labels != targets
    if not attacked.any():
        raise BadInputError("every sample is of its target class, so there is nothing to measure")
    return attacked


def defense_effectiveness_rating(before: BackdoorMetrics, after: BackdoorMetrics) -> float:
    """Return the DER, ``(max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2``, in ``[0, 1]``.

    1 is a backdoor that always worked and never does, at no cost; 0.5 is no change.

    References:
        Zhu, Wei, Shen, Fan, Wu. *Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
        Minimization* (FT-SAM), Eq. 7. ICCV 2023. arXiv:2304.11823
    """
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2
