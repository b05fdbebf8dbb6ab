"""The base class of classifier adapters, for any kind of input: logits and one label per input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.class_names import contradicted, few
from mmdefense.data.batch import Samples
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.kernels.hooks import mode
from mmdefense.notes import note
from mmdefense_adapters.divergence import divergence
from mmdefense_adapters.given import check_scaling, check_values
from mmdefense_adapters.module_adapter import ModuleAdapter, usable
from mmdefense_adapters.outputs import (
    Form,
    as_logits,
    assumed_logits,
    check_problem,
    found_form,
    main_output,
)

__all__ = ["Classifier"]

_TRIED = 8  # samples that are run to find out what the model returns; ours


class Classifier(ModuleAdapter[LabelledBatch]):
    """Wraps a module that maps inputs ``(N, ...)`` to logits ``(N, K)``.

    A subclass defines the inputs. Images and clips are in ``[0, 1]``; ``mean`` and ``std`` are
    applied inside, so that triggers are in the space of the data. A model may also return
    probabilities or sigmoid outputs, and auxiliary outputs; this is determined from the first data
    passed to :meth:`samples`, see :mod:`mmdefense_adapters.outputs`.
    """

    noun: ClassVar[str] = "inputs"
    """What the inputs are called in messages."""

    mixable: ClassVar[bool] = True

    bounded: ClassVar[bool] = False
    """Whether all values of images or clips lie in ``[0, 1]``; vectors may be any."""

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
            mean: Per-channel mean to subtract from inputs; None if the model normalises itself.
            std: Per-channel standard deviation to divide inputs by.
            example: One input batch, shape ``(1, ...)``, to trace the model with; by default the
                first that the adapter sees.
        """
        check_scaling(mean, std)
        check_problem(model)
        self.model = usable(model)
        self.mean, self.std = mean, std
        self.example = None if example is None else _unlabelled(example)
        self._scaling: Tensor | None = None
        self._forms: Mapping[bool, Form] = {}  # in eval mode and in train mode, once they are known

    @property
    def chance(self) -> float:
        """1 / K."""
        return 1 / self.classes

    @cached_property
    def classes(self) -> int:
        """Number of classes K, from the model's output for the example."""
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
            raise BadInputError(f"data must hold at least one sample ({self.noun}), got none")
        samples = samples.to(self.device)
        places = torch.linspace(0, len(samples) - 1, min(_TRIED, len(samples))).long()
        some = samples.take(places).inputs
        values = samples.inputs if isinstance(samples, LabelledSamples) else some
        check_values(values, self.noun, bounded=self.bounded and values.ndim >= 4)
        self.classes = self._check(samples, some)
        if not self._forms:
            self._forms = self._found_forms(some, self.classes)
        if self.example is None:
            self.example = _unlabelled(some[:1])
        return samples

    @abstractmethod
    def _as_samples(self, data: Any) -> Samples[LabelledBatch]:
        """Convert the user's data to samples."""

    def _check(self, samples: Samples[LabelledBatch], some: Tensor) -> int:
        """Reject samples that do not fit the model; return the number of classes K.

        Args:
            samples: All samples.
            some: A few of their inputs, ``(n, ...)``.
        """
        shape = tuple(some.shape[1:])
        if self.mean is not None and len(self.mean) != shape[0]:
            raise BadInputError(
                f"mean and std must have a value for each channel of the {self.noun}, got "
                f"{len(self.mean)} for shape {shape}"
            )
        try:
            with torch.no_grad(), mode(self.model, train=False):
                answer = self._run(some)
        except Exception as error:  # the user's model may raise anything
            raise BadInputError(
                f"the model cannot read {self.noun} of shape {shape}: {one_line(error)}; "
                f"adjust how they are read: --channels, --image-size or --read{_layout(shape)}"
            ) from error
        logits = main_output(answer, check=True)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise UnsupportedError(
                "a classifier must return logits (N, K) of at least 2 classes, got "
                f"{tuple(logits.shape)} for {self.noun} of shape {shape}"
            )
        _check_labels(samples, logits.shape[1])
        return logits.shape[1]

    def _found_forms(self, some: Tensor, classes: int) -> dict[bool, Form]:
        """Return what the model returns in eval and in train mode, from a few inputs ``(n, ...)``.

        A copy is run: in train mode a model updates statistics.

        Raises:
            UnsupportedError: If it fails in train mode, or returns rows of another width there.
        """
        twin = self.fork()
        if len(some) == 1:
            some = torch.cat([some, some])  # BatchNorm1d rejects single samples in train mode
        cuda = [self.device] if self.device.type == "cuda" else []
        forms = {}
        for train in (False, True):
            with mode(twin.model, train=train), torch.random.fork_rng(cuda), torch.enable_grad():
                forms[train] = found_form(twin.model, lambda: twin._tried(some), classes)
        if stated := next((form.stated for form in forms.values() if form.stated), ""):
            note(stated)
        return forms

    def _tried(self, inputs: Tensor) -> Any:
        try:
            return self._run(inputs)
        except Exception as error:  # the user's model may raise anything
            when = "train" if self.model.training else "eval"
            raise UnsupportedError(
                f"the model cannot be run on {len(inputs)} {self.noun} in {when} mode, as "
                f"defenses do: {one_line(error)}"
            ) from error

    def answer(self, batch: LabelledBatch) -> Tensor:
        """Return the logits of a batch, shape ``(N, K)``."""
        return self.logits(batch.inputs)

    def class_logits(self, batch: LabelledBatch) -> Tensor:
        """Return the logits of a batch, shape ``(N, K)``."""
        return self.logits(batch.inputs)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits for unnormalised inputs, shape ``(N, K)``."""
        form = self._forms.get(self.model.training)
        if form is None:  # no data seen yet
            return assumed_logits(main_output(self._run(inputs)))
        with form.passed_by(self.model):
            return as_logits(main_output(self._run(inputs)), form)

    def _run(self, inputs: Tensor) -> Any:
        """Return the model's raw output for unnormalised inputs."""
        inputs = inputs.to(next(self.model.parameters()).dtype)
        if self.mean is not None:
            mean, std = self._scaling_like(inputs)
            inputs = (inputs - mean) / std
        return self._call(inputs)

    def _scaling_like(self, inputs: Tensor) -> Tensor:
        """Return mean and std on the device of ``inputs``, cached to avoid repeated transfers."""
        kept = self._scaling
        if kept is None or kept.device != inputs.device or kept.dtype != inputs.dtype:
            kept = torch.tensor([self.mean, self.std], device=inputs.device, dtype=inputs.dtype)
            self._scaling = kept
        return kept.view(2, 1, -1, *(1,) * (inputs.ndim - 2))

    def _call(self, inputs: Tensor) -> Any:
        """Run the model on normalised inputs; return what it returns."""
        return self.model(inputs)

    @property
    def _each_class_alone(self) -> bool:
        """Whether the model ends in a sigmoid, with an independent binary output per class."""
        return any(form.kind == "sigmoid" for form in self._forms.values())

    def inputs(self, batch: LabelledBatch) -> Tensor:
        """Return the unnormalised inputs, shape ``(N, ...)``."""
        return batch.inputs.detach()

    def with_inputs(self, batch: LabelledBatch, inputs: Tensor) -> LabelledBatch:
        """Return the batch with other inputs and the same labels."""
        return batch.with_inputs(inputs)

    def input_bounds(self, batch: LabelledBatch) -> tuple[float, float] | None:
        """Return ``(0, 1)`` for images and clips, and none for vectors and clouds."""
        return (0.0, 1.0) if self.bounded and batch.inputs.ndim >= 4 else None

    def per_sample_loss(self, batch: LabelledBatch) -> Tensor:
        """Return the cross-entropy of each sample in nats, shape ``(N,)``.

        For a model that ends in a sigmoid it is the sum of the binary cross-entropies of all
        classes, so that its outputs keep their thresholds.
        """
        return self._loss(self.logits(batch.inputs), batch.labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self._each_class_alone:
            return F.cross_entropy(logits, labels, reduction="none")
        truth = F.one_hot(labels, logits.shape[1]).to(logits)
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1)

    def predictions(self, batch: LabelledBatch) -> Tensor:
        """Return the logits, shape ``(N, 1, K)``, no grad."""
        with torch.no_grad():
            return self.logits(batch.inputs)[:, None]

    def distilled_loss(
        self, batch: LabelledBatch, predictions: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and the divergence from other predictions ``(N, 1, K)``, both ``(N,)``.

        For a model that ends in a sigmoid the divergences of all classes are added.
        """
        logits = self.logits(batch.inputs)
        mine, others = logits, predictions[:, 0]
        if self._each_class_alone:  # a distribution over yes and no for each class, (N, K, 2)
            mine, others = (torch.stack([v, torch.zeros_like(v)], 2) for v in (mine, others))
        distance = divergence(mine, others, temperature)
        if self._each_class_alone:
            distance = distance.sum(1)
        return self._loss(logits, batch.labels), distance

    def sampled_loss(
        self, batch: LabelledBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy and the Rademacher score from one forward pass.

        The score of a sample is ``2 sum_c xi_c sqrt(p_c)`` with random signs ``xi``. Its gradient,
        ``sum_c xi_c sqrt(p_c) grad log p_c``, has covariance F_n, needs no label draw, and can be
        differentiated again to the full gradient of Tr(F), including the dependence on p. For
        independent binary outputs, the term of a class is ``xi_c sqrt(p_c (1 - p_c)) grad z_c``.
        """
        logits = self.logits(batch.inputs)
        if self._each_class_alone:  # the derivative of 2 atan(exp(z / 2)) is sqrt(p (1 - p))
            loss = self._loss(logits, batch.labels)
            parts = 2 * (logits.clamp(-60, 60) / 2).exp().atan()
        else:
            log_p = logits.log_softmax(1)
            loss = F.nll_loss(log_p, batch.labels, reduction="none")
            parts = 2 * log_p.div(2).exp()
        signs = torch.randint(0, 2, parts.shape, generator=generator, device=parts.device) * 2 - 1
        return loss, (signs * parts).sum(1)

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


def _layout(shape: Sequence[int]) -> str:
    """Return a hint if the inputs seem to have their channels last."""
    if len(shape) < 3 or shape[-1] not in {1, 3, 4} or shape[0] in {1, 3, 4}:
        return ""
    return "; the channels seem to come last, and must come first: (N, C, H, W)"


def _unlabelled(inputs: Tensor) -> LabelledBatch:
    return LabelledBatch(inputs, torch.zeros(len(inputs), dtype=torch.int64))


def _check_labels(samples: Samples[LabelledBatch], classes: int) -> None:
    _check_count(samples, classes)
    labels = samples.strata()
    assert labels is not None
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise BadInputError(
            f"labels must lie in 0..{classes - 1}, the model's classes, got "
            f"{least if least < 0 else most}"
        )


def _check_count(samples: Samples[LabelledBatch], outputs: int) -> None:
    """Reject data that names fewer or more classes than the model has: the mapping is ambiguous."""
    names = getattr(samples, "classes", ())
    if names and len(names) != outputs:
        raise BadInputError(
            f"data must name the model's {outputs} classes, got {len(names)} ({few(names)}), so "
            "their outputs are unknown; name all of the model's classes in order: "
            "--classes FILE, in Python classes=[...] where the data is loaded"
        )


def _check_names(samples: Samples[LabelledBatch], adapter: Any) -> None:
    """Reject data whose class names have other labels than in the model."""
    stated = adapter.reading() if hasattr(adapter, "reading") else {}
    names, model = getattr(samples, "classes", ()), stated.get("classes", ())
    name = contradicted(names, model)
    if name is not None:
        raise BadInputError(
            f"labels of the data must be the model's, got {name!r} as {names.index(name)} of "
            f"{few(names)}, while the model's classes are {few(model)}; load the data with "
            "classes=[...], the model's in order"
        )
