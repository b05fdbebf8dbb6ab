"""The base class of attacks: poisoning, planting and measuring success."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Self, TypeVar, final

import torch
from torch import Tensor

from mmdefense.attacks.flat import flat_gradients
from mmdefense.data.batch import Batch, Samples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.loop import loss_gradients, optimise, scores
from mmdefense.metrics.backdoor import TriggeredSamples
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import NotNegative, Seed, Share, check_settings
from mmdefense.training import Training

__all__ = ["Attack", "like", "on_device_of", "replaced"]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC, Generic[B]):
    """A backdoor: a trigger, the output that it forces, and how it gets into a model.

    Its fields are its complete configuration, and ``fitted`` is what :meth:`plant` has learnt, so
    that ``replace(attack, fitted=kept)`` restores a planted attack.

    Attributes:
        ratio: Fraction of the training set that is poisoned, in ``[0, 1]``.
        seed: Determines the trigger and the choice of the samples.
        sam_radius: Above 0, the victim is trained with adaptive SAM of this radius, so that it ends
            in a flat minimum: an adaptive attack against FIP (its authors try radii from 2).
        trace_weight: Above 0, the victim is trained with FIP's own penalty, Tr(F), at this weight
            (its authors try 0.01). At most one of the two may be above 0.
        fitted: Tensors that :meth:`plant` has learnt, by name; empty for a fixed trigger.
    """

    tasks: ClassVar[tuple[str, ...]] = ("image-classification",)
    """Names of the tasks whose samples can be poisoned."""

    poisons: ClassVar[type]
    """The class of these tasks' samples."""

    own_loss: ClassVar[bool] = False
    """Whether it trains the victim with a loss of its own, without SAM or Tr(F)."""

    ratio: Share = 0.1
    seed: Seed = 0
    sam_radius: NotNegative = 0.0
    trace_weight: NotNegative = 0.0
    fitted: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_settings(self)
        flat = {"sam_radius": self.sam_radius, "trace_weight": self.trace_weight}
        if all(flat.values()):
            raise BadInputError(f"sam_radius or trace_weight must be 0, got {flat}")
        if self.own_loss and any(flat.values()):
            raise BadInputError(
                f"sam_radius and trace_weight must be 0 for {type(self).__name__}, which trains "
                f"its victim with its own loss, got {flat}"
            )

    @abstractmethod
    def poison(self, samples: Any, adapter: TaskAdapter[B]) -> Any:
        """Return the training set with some samples poisoned, in the same order.

        Args:
            samples: The clean training set, as the task's ``load`` returns it.
            adapter: The model that will be trained on it, used for example for its classes.

        Raises:
            BadInputError: If there are too few samples to poison, or they are of another task.
        """

    def with_count(self, count: int, samples: Any) -> Self:
        """Return the attack with the ``ratio`` that poisons ``count`` of these samples.

        Args:
            count: Number of poisoned samples.
            samples: The clean training set that it will poison.
        """
        return replace(self, ratio=min(1.0, count / len(samples)))

    @abstractmethod
    def triggered(self, samples: Any, adapter: TaskAdapter[B]) -> TriggeredSamples[B]:
        """Return the attack's test set, from the clean test samples that it can attack.

        Raises:
            BadInputError: If there is no such sample, or they are of another task.
        """

    def success(self, adapter: TaskAdapter[B], samples: Samples[B]) -> Tensor:
        """Return the attack's success on each triggered sample.

        The mean is the ASR. By default it is the score with the attacker's labels.

        Args:
            adapter: The model to evaluate.
            samples: The ``samples`` attribute of the result of :meth:`triggered`.

        Returns:
            Shape ``(N,)`` in ``[0, 1]``, on the CPU.
        """
        return scores(adapter, samples)

    @final
    def plant(self, adapter: TaskAdapter[B], samples: Any, training: Training, run: Run) -> Self:
        """Train ``adapter.model`` in place so that it learns its task and the backdoor.

        Args:
            adapter: The model to become a victim.
            samples: The clean training set.
            training: Number of steps, learning rates and modes.
            run: Seed, progress and store.

        Returns:
            The attack to apply: this one, or a fitted copy if planting learns the trigger.

        Raises:
            BadInputError: If the samples are of another task, or too few can be poisoned.
        """
        samples = on_device_of(adapter, self._checked(samples))
        attack, samples = self._learn(adapter, samples, training, run)
        return attack._train(adapter, samples, training, run)

    def _learn(
        self, adapter: TaskAdapter[B], samples: Any, training: Training, run: Run
    ) -> tuple[Self, Any]:
        """Learn what is needed before the victim is trained; by default nothing.

        Args:
            adapter: The untrained victim. To train a surrogate, use ``adapter.fork()``.
            samples: The clean training set, on the device of the model.
            training: The victim's training settings.
            run: Seed, progress and store; give each training loop a unique stage name.

        Returns:
            The attack with what it has learnt, ``replace(self, fitted={...})``, and the samples to
            poison, which a clean-label attack may make harder to classify.
        """
        return self, samples

    def _train(self, adapter: TaskAdapter[B], samples: Any, training: Training, run: Run) -> Self:
        """Poison the samples and train the victim; override it to train the trigger jointly."""
        self._fit(adapter, self.poison(samples, adapter), training, run)
        return self

    def _fit(
        self,
        adapter: TaskAdapter[B],
        poisoned: Any,
        training: Training,
        run: Run,
        after_step: Callable[[int], bool | None] | None = None,
    ) -> None:
        """Train the victim on poisoned samples, with SAM or Tr(F) if the settings say so."""
        if self.sam_radius or self.trace_weight:
            gradients = flat_gradients(
                adapter, run, sam_radius=self.sam_radius, trace_weight=self.trace_weight
            )
        else:
            gradients = loss_gradients(adapter)
        optimise(
            adapter.model,
            adapter.samples(poisoned),
            training,
            run,
            gradients=gradients,
            stage="victim",
            after_step=after_step,
        )

    def in_words(self) -> str:
        """Describe the attack in a few words, for a table or a page."""
        return f"{type(self).__name__}, {100 * self.ratio:g} % of the training set"

    def _checked(self, samples: Any) -> Any:
        """Return the samples.

        Raises:
            BadInputError: If they are of another task.
        """
        if isinstance(samples, self.poisons):
            return samples
        raise BadInputError(
            f"{type(self).__name__} is an attack on {' and '.join(self.tasks)}: give "
            f"{self.poisons.__name__}, got {type(samples).__name__}"
        )

    def _learnt(self, name: str) -> Tensor:
        """Return a tensor that :meth:`plant` has learnt.

        Raises:
            UnsupportedError: If nothing has been learnt yet.
        """
        if name not in self.fitted:
            raise UnsupportedError(
                f"{type(self).__name__} learns its trigger while it is planted and has none yet; "
                "use the attack that plant() returns, or load the learned trigger: --trigger "
                "FILE.safetensors (its fitted tensors)"
            )
        return self.fitted[name]

    def _generator(self, name: str) -> torch.Generator:
        """Return a fresh generator on the CPU, so that each device draws the same numbers."""
        return Run(self.seed).generator(name)


def on_device_of(adapter: TaskAdapter[Any], samples: Any) -> Any:
    """Return the samples on the model's device, checked by the adapter."""
    adapter.samples(samples)
    return samples.to(next(adapter.model.parameters()).device)


def replaced(inputs: Tensor, indices: Tensor, images: Tensor) -> Tensor:
    """Return a copy of ``inputs`` with ``images`` at ``indices``, in the dtype of ``inputs``."""
    copy = inputs.clone()
    copy[indices] = like(inputs, images)
    return copy


def like(inputs: Tensor, images: Tensor) -> Tensor:
    """Convert images in ``[0, 1]`` to the dtype and range of ``inputs``: 8 bits stay 8 bits."""
    if inputs.dtype == torch.uint8:
        return (images * 255).round().to(torch.uint8)
    return images.to(inputs.dtype)
