"""What classifiers share, whatever they read: one label per input, from logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.batches import LabelledBatch, Samples
from mmdefense.class_names import contradicted, few
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.kernels.hooks import mode
from mmdefense_adapters.module_adapter import ModuleAdapter

__all__ = ["Classifier"]


class Classifier(ModuleAdapter[LabelledBatch]):
    """Wraps a module that maps inputs ``(N, ...)`` to logits ``(N, K)``.

    A subclass says what the inputs are. Those with channels come in ``[0, 1]``; ``mean`` and
    ``std`` are applied inside, so that triggers live in the space of the data.
    """

    inputs: ClassVar[str] = "inputs"
    """What the inputs are called in messages."""

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        example: Tensor | None = None,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: The classifier; it is not copied.
            mean: Per-channel mean that inputs are shifted by; none where the model does it itself.
            std: Per-channel deviation that inputs are divided by.
            example: One input batch, shape ``(1, ...)``, to trace the model with; by default the
                first that the adapter sees.
        """
        if (mean is None) != (std is None):
            raise BadInputError("mean and std must be given together, got one of them")
        self.model = model
        self.mean, self.std = mean, std
        self.example = None if example is None else _unlabelled(example)
        self._scaling: Tensor | None = None

    @property
    def chance(self) -> float:
        """1 / K."""
        return 1 / self.classes

    @cached_property
    def classes(self) -> int:
        """Number of classes K, from the model's answer to the example."""
        with torch.no_grad(), mode(self.model, train=False):
            return int(self.answer(self._example()).shape[1])

    def _example(self) -> LabelledBatch:
        example = super()._example()
        return example.with_inputs(example.inputs.to(self.device))

    def samples(self, data: Any) -> Samples[LabelledBatch]:
        """Return ``data`` as labelled samples on the model's device, checked against the model."""
        samples = self._as_samples(data)
        _check_names(samples, self)
        if len(samples) == 0:
            raise BadInputError(f"data must hold at least one sample ({self.inputs}), got none")
        samples = samples.to(self.device)
        first = samples.take(torch.zeros(1, dtype=torch.int64)).inputs
        self._check(samples, first)
        if self.example is None:
            self.example = _unlabelled(first)
        return samples

    @abstractmethod
    def _as_samples(self, data: Any) -> Samples[LabelledBatch]:
        """Return what the user gave as samples, with the default augmentation of the domain."""

    def _check(self, samples: Samples[LabelledBatch], first: Tensor) -> None:
        shape = tuple(first.shape[1:])
        if self.mean is not None and len(self.mean) != shape[0]:
            raise BadInputError(
                f"{self.inputs} must have {len(self.mean)} channels, as mean and std have, got "
                f"{shape}"
            )
        try:
            with torch.no_grad(), mode(self.model, train=False):
                answer = self.logits(first)
        except Exception as error:  # the model is the user's own and may raise anything
            raise BadInputError(
                f"the model cannot read {self.inputs} of shape {shape}: {one_line(error)}; have "
                "them read as it takes them: --channels, --image-size or --read"
            ) from error
        if not isinstance(answer, Tensor) or answer.ndim != 2:
            found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise UnsupportedError(
                f"a classifier must answer with logits (N, K), got {found} for {self.inputs} of "
                f"shape {shape}"
            )
        _check_labels(samples, answer.shape[1])

    def answer(self, batch: LabelledBatch) -> Tensor:
        """Return the logits of a batch, shape ``(N, K)``."""
        return self.logits(batch.inputs)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits of inputs as they come in the data, shape ``(N, K)``."""
        if self.mean is not None:
            mean, std = self._scaling_like(inputs)
            inputs = (inputs - mean) / std
        return self._call(inputs)

    def _scaling_like(self, inputs: Tensor) -> Tensor:
        """Return mean and std on the device of ``inputs``; kept, so that no step waits for them."""
        kept = self._scaling
        if kept is None or kept.device != inputs.device or kept.dtype != inputs.dtype:
            kept = torch.tensor([self.mean, self.std], device=inputs.device, dtype=inputs.dtype)
            self._scaling = kept
        return kept.view(2, 1, -1, *(1,) * (inputs.ndim - 2))

    def _call(self, inputs: Tensor) -> Tensor:
        """Run the model on normalised inputs."""
        return self.model(inputs)  # type: ignore[no-any-return]

    def per_sample_loss(self, batch: LabelledBatch) -> Tensor:
        """Return the cross-entropy of each sample in nats, shape ``(N,)``."""
        return F.cross_entropy(self.logits(batch.inputs), batch.labels, reduction="none")

    def sampled_loss(
        self, batch: LabelledBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy and the Rademacher score from one forward pass.

        The score of a sample is ``2 sum_c xi_c sqrt(p_c)`` with random signs ``xi``. Its gradient,
        ``sum_c xi_c sqrt(p_c) grad log p_c``, has covariance F_n, needs no label draw, and can be
        differentiated again to the whole gradient of Tr(F), p's own share included.
        """
        log_p = self.logits(batch.inputs).log_softmax(1)
        loss = F.nll_loss(log_p, batch.labels, reduction="none")
        signs = torch.randint(0, 2, log_p.shape, generator=generator, device=log_p.device) * 2 - 1
        return loss, (signs * 2 * log_p.div(2).exp()).sum(1)

    def score(self, batch: LabelledBatch) -> Tensor:
        """Return 1 where the top class is the label, else 0, shape ``(N,)``."""
        with torch.no_grad():
            return self.score_outputs(batch, self.logits(batch.inputs))

    def score_outputs(self, batch: LabelledBatch, outputs: Tensor) -> Tensor:
        """Return 1 where the largest of the logits ``(N, K)`` is the label's, else 0."""
        return (outputs.argmax(1) == batch.labels).float()

    def trigger_targets(self) -> int:
        """Return K."""
        return self.classes

    def target_log_probability(self, batch: LabelledBatch, targets: Tensor) -> Tensor:
        """Return the log of the softmax probability of each target, shape ``(N,)``."""
        return self.logits(batch.inputs).log_softmax(1).gather(1, targets[:, None]).squeeze(1)

    def not_target(self, batch: LabelledBatch, targets: Tensor) -> Tensor:
        """Return whether each label differs from its target."""
        return batch.labels != targets


def _unlabelled(inputs: Tensor) -> LabelledBatch:
    return LabelledBatch(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def _check_labels(samples: Samples[LabelledBatch], classes: int) -> None:
    _check_count(samples, classes)
    labels = samples.strata()
    assert labels is not None
    if len(labels) < classes:
        raise BadInputError(
            f"data must hold at least one sample per class ({classes}), got {len(labels)}"
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise BadInputError(
            f"labels must lie in 0..{classes - 1}, the model's classes, got "
            f"{least if least < 0 else most}"
        )


def _check_count(samples: Samples[LabelledBatch], outputs: int) -> None:
    """Refuse data that names fewer or more classes than the model has: which is which is open."""
    names = getattr(samples, "classes", ())
    if names and len(names) != outputs:
        raise BadInputError(
            f"data must name the model's {outputs} classes, got {len(names)} ({few(names)}), so "
            "which of them is which output is not known; name all of the model's in order: "
            "--classes FILE, in Python classes=[...] where the data is loaded"
        )


def _check_names(samples: Samples[LabelledBatch], adapter: Any) -> None:
    """Refuse data whose names have other labels than in the model."""
    said = adapter.reading() if hasattr(adapter, "reading") else {}
    names, model = getattr(samples, "classes", ()), said.get("classes", ())
    name = contradicted(names, model)
    if name is not None:
        raise BadInputError(
            f"labels of the data must be the model's, got {name!r} as {names.index(name)} of "
            f"{few(names)}, while the model's classes are {few(model)}; load the data with "
            "classes=[...], the model's in order"
        )
