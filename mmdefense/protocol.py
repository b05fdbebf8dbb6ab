"""What a defense may ask of a model.

A kernel sees a model through an adapter. It never opens a batch and never names an architecture.
Adapters need no base class: whatever has these members is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Batch, Samples, Views
from mmdefense.plots.base import Plot
from mmdefense.training import Training

__all__ = [
    "AdapterKind",
    "Case",
    "GeneratingAdapter",
    "HeadAdapter",
    "InputAdapter",
    "LogitsAdapter",
    "OutputAdapter",
    "ReadAt",
    "ReadingAdapter",
    "Task",
    "TaskAdapter",
    "Traits",
    "TriggerAdapter",
    "TriggerFamily",
    "UnitGroup",
    "ViewingAdapter",
    "WordedAdapter",
    "missing_members",
    "traits",
]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, slots=True)
class ReadAt:
    """Where a forward pass shows what the units of a group compute.

    Attributes:
        layer: Dotted name of a layer; none is the layer that owns the units.
        side: Whether the units are in its output or in its first input.
        axis: The axis of that tensor that indexes the units; ``width`` indices each.
    """

    layer: str | None = None
    side: Literal["output", "input"] = "output"
    axis: int = -1


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """``size`` (U) interchangeable units: filters, hidden neurons or attention heads.

    Zeroing unit ``u`` along ``axes[name]`` of every parameter ``name`` prunes it. A unit spans
    ``width`` consecutive indices: 1, or ``head_dim`` for an attention head.

    Attributes:
        layer: Dotted name of the layer that owns the units, as in ``model.named_modules()``.
        size: Number of units U.
        axes: For each parameter that carries the units, the axis that indexes them, in the order of
            the forward pass. A unit's output is proportional to its entries in the parameters of
            the last module (:attr:`outer`): of a filter with BatchNorm, the norm's weight and bias.
        width: Consecutive indices per unit.
        kind: ``"filter"``, ``"neuron"`` or ``"head"``.
        read_at: Where the activation of the units is read; by default the last axis of the output
            of ``layer``. Filters are on axis 1 of the output of their convolution or BatchNorm, and
            heads on the last axis of the input of their output projection.
    """

    layer: str
    size: int
    axes: Mapping[str, int]
    width: int = 1
    kind: str = "filter"
    read_at: ReadAt = ReadAt()

    @property
    def outer(self) -> dict[str, int]:
        """The axes of the last module's parameters.

        Multiplying a unit's entries of these by m multiplies the unit's output by m.
        """
        module = list(self.axes)[-1].rpartition(".")[0]
        return {n: axis for n, axis in self.axes.items() if n.rpartition(".")[0] == module}


@runtime_checkable
class TaskAdapter(Protocol[B]):
    """What every kernel may ask of a wrapped model. ``N`` is the batch size.

    What an adapter may state beside these members, such as the optimizer that suits its models, is
    in :class:`Traits`.
    """

    model: nn.Module

    @property
    def chance(self) -> float:
        """The task metric of a model that has learnt nothing, in ``[0, 1]``; 1/C for C classes."""
        ...

    def samples(self, data: Any) -> Samples[B]:
        """Return ``data`` as samples that fit this model, checked.

        Raises:
            BadInputError: If the data cannot be what this model was trained on.
        """
        ...

    def per_sample_loss(self, batch: B) -> Tensor:
        """Return the training loss of each sample in nats, shape ``(N,)``, with grad.

        Its mean is the training loss.
        """
        ...

    def sampled_loss(self, batch: B, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the loss and a random score from one forward pass, both ``(N,)``, with grad.

        The gradient of the n-th score has mean zero and, over the draws of ``generator``,
        covariance F_n, the true Fisher information of sample n (labels from the model itself).
        """
        ...

    def score(self, batch: B) -> Tensor:
        """Return each sample's share of the task metric in ``[0, 1]``, shape ``(N,)``, no grad."""
        ...

    def activations(self, batch: B, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return what the units of each layer compute, ``(N, L, U * width)``, with grad, one pass.

        It is the tensor at the group's ``read_at``, before any nonlinearity, with the units last
        and the L positions of a sample (pixels, frames, points, tokens) side by side. Of a layer
        that runs several times, the positions of all runs follow each other.

        Args:
            batch: N samples.
            layers: ``layer`` of some of the :meth:`unit_groups`.
        """
        ...

    def features(self, batch: B, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the activations pooled to one value per unit, ``(N, U)``, one pass, no grad.

        It is the mean over the positions that count, padding left out, of the rectified activation;
        for attention heads of the magnitude of what the head adds to its block's output. A layer
        that runs several times counts each run alike.
        """
        ...

    def embedding(self, batch: B) -> Tensor:
        """Return the penultimate representation, shape ``(N, D)``, no grad."""
        ...

    def unit_groups(self) -> Sequence[UnitGroup]:
        """Return the prunable units, input side first."""
        ...

    def fork(self) -> Self:
        """Return an adapter around a deep copy of the model."""
        ...


@runtime_checkable
class HeadAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter whose model ends in a linear layer."""

    def head_inputs(self, batch: B) -> Tensor:
        """Return what the output layer reads, shape ``(R, D)``, no grad.

        One row a sample, or several where a sample has several answers, such as tokens.
        """
        ...

    def head_group(self) -> UnitGroup:
        """Return the inputs of the output layer as units, D of them.

        They sit on axis 1 of its weight, or where that weight has another use, on the parameters of
        the layer before it.

        Raises:
            UnsupportedError: If the model does not end in a linear layer.
        """
        ...

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(K, D)`` and bias ``(K,)`` of the output layer."""
        ...

    def score_outputs(self, batch: B, outputs: Tensor) -> Tensor:
        """Return the score of ``outputs``, shape ``(R, K)``, as the model's, shape ``(N,)``."""
        ...


@runtime_checkable
class OutputAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter that knows which layers of its model are the classifier."""

    def class_layers(self) -> Sequence[str]:
        """Return the names of the layers that turn features into scores of classes or tokens.

        Each has a ``weight`` with its outputs on axis 0.

        Raises:
            UnsupportedError: If they cannot be found.
        """
        ...


@runtime_checkable
class InputAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter whose inputs are continuous, so that they can be perturbed by gradients.

    Images, clips and clouds as they come in the data; for text, the embeddings of its tokens.
    """

    def inputs(self, batch: B) -> Tensor:
        """Return what the model reads, shape ``(N, ...)``, detached."""
        ...

    def with_inputs(self, batch: B, inputs: Tensor) -> B:
        """Return ``batch`` with other inputs of the same shape; gradients flow back to them."""
        ...

    def input_bounds(self, batch: B) -> tuple[float, float] | None:
        """Return the least and the largest value of an input, ``(0, 1)`` for images, or none."""
        ...


@runtime_checkable
class LogitsAdapter(InputAdapter[B], Protocol[B]):
    """An adapter whose model scores each of K classes for a sample."""

    def class_logits(self, batch: B) -> Tensor:
        """Return the logits of a batch, shape ``(N, K)``, with grad."""
        ...


@runtime_checkable
class DistillingAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter whose model predicts distributions, over classes or over the tokens of an answer.

    A sample has T of them: one of a classifier, one for each token of a text's answer.
    """

    def predictions(self, batch: B) -> Tensor:
        """Return the logits of each sample's distributions, ``(N, T, K)``, no grad."""
        ...

    def distilled_loss(
        self, batch: B, predictions: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the distance to ``predictions`` from one forward pass, both ``(N,)``.

        Args:
            batch: N samples.
            predictions: What another model with the same outputs predicts for them.
            temperature: Divides the logits of both. The distance is the Kullback-Leibler divergence
                of this model's distributions from the others, times the squared temperature, so
                that its gradient has the size of the loss's (Hinton et al., arXiv:1503.02531).
        """
        ...


@runtime_checkable
class ReadingAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter whose model says in which form it reads data."""

    def reading(self) -> Mapping[str, Any]:
        """Return what the model says about its data, as options of its task's ``load``.

        For example ``classes`` (their names in order), ``channels``, ``frames``; what it does not
        say is left out.
        """
        ...


@runtime_checkable
class ViewingAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter that knows how samples of its domain are augmented."""

    def viewed(self, samples: Samples[B], views: Views) -> Samples[B]:
        """Return samples that are augmented in that way, see :data:`Views`."""
        ...


@runtime_checkable
class GeneratingAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter whose model writes text."""

    def generate(self, batch: B) -> list[str]:
        """Return what the model writes to each prompt of a batch, by greedy decoding."""
        ...


@dataclass(frozen=True, slots=True)
class TriggerFamily:
    """A kind of trigger that can be searched for.

    Attributes:
        name: For example ``"patch"`` or ``"additive"``.
        shape: Shape P of one raw trigger; the search varies raw triggers in ``[0, 1]``.
        budget: Largest share of an input that a trigger of this family alters, in ``[0, 1]``;
            what needs more is not taken for a backdoor.
        starts: Random raw triggers of which a search starts at the best; many where one that is
            far from working gives no slope to follow, as a wrong place or a wrong word.
        diagnostic: Whether one that works tells of a backdoor; false where models that nobody
            tampered with answer to such triggers as well.
    """

    name: str
    shape: tuple[int, ...]
    budget: float
    starts: int = 1
    diagnostic: bool = True


@runtime_checkable
class TriggerAdapter(TaskAdapter[B], Protocol[B]):
    """An adapter whose inputs can carry a differentiable trigger towards one of C targets."""

    def trigger_targets(self) -> int:
        """Return the number of targets C that an attacker may have chosen among."""
        ...

    def trigger_families(self) -> Sequence[TriggerFamily]:
        """Return the kinds of trigger that this model's inputs can carry."""
        ...

    def stamp(self, batch: B, family: TriggerFamily, triggers: Tensor) -> B:
        """Return ``batch`` with raw ``triggers``, shape ``(T, N, *P)``, applied: T x N samples."""
        ...

    def trigger_size(self, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return how much of an input each raw trigger ``(..., *P)`` alters, in ``[0, 1]``."""
        ...

    def trigger_picture(self, family: TriggerFamily, trigger: Tensor) -> Tensor:
        """Return one raw trigger, shape P, as a picture ``(C, H, W)`` in ``[0, 1]``."""
        ...

    def target_log_probability(self, batch: B, targets: Tensor) -> Tensor:
        """Return the log-probability of each sample's target, shape ``(N,)``, with grad."""
        ...

    def not_target(self, batch: B, targets: Tensor) -> Tensor:
        """Return whether each sample's own answer differs from its target, bool ``(N,)``."""
        ...


@runtime_checkable
class WordedAdapter(TriggerAdapter[B], Protocol[B]):
    """An adapter whose triggers and targets are words."""

    def trigger_words(self, trigger: Tensor) -> str:
        """Return the real words that a raw trigger, shape P, is nearest to."""
        ...

    def target_words(self, target: int) -> str:
        """Return the words of a target."""
        ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """A victim, described.

    Attributes:
        name: What tables call it.
        task: The name of a task.
        data: A name or folder that the task can load, with a train and a test part.
        model: ``module:callable(...)``; what stands in braces, such as ``{classes}``, is filled in
            by the task from the data.
        training: How the victim is trained.
        attack: The name of an attack; none trains a clean model, the control of a grid.
        settings: Of the attack.
        clean: Share of the training set that the defenses are given.
        seen: Whether the victim is trained on these samples too, as in BackdoorBench. A user's own
            clean data is apart from an attacker's training data; and a guard that judges by what a
            model has learnt by heart turns down what does little harm (docs/concepts.md).
        demo: Whether ``mmdefense demo`` trains it, in place of the first case of its task: one
            that two CPU cores train and purify by every defense in three minutes.
    """

    name: str
    task: str
    data: str
    model: str
    training: Training
    attack: str | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    clean: float = 0.05
    seen: bool = False
    demo: bool = False


class Task(Protocol):
    """What an evaluation may ask of a task: its data, its metric, its victims.

    Data sets and domains are named here and in adapters, nowhere else. ``samples`` are those that
    the task's own ``load`` returned.

    Attributes:
        name: As registered.
        metric: What its metric is called, for example ``"accuracy"``.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    def load(self, where: Any, *, split: str = "train", stated: Mapping[str, Any] = ...) -> Any:
        """Return the ``"train"`` or ``"test"`` part of the data of that name or place.

        A task takes more options by name: what a user may say about the form of the data
        (``--read`` of the command line). ``stated`` holds options of the same names that the model
        states (:meth:`ReadingAdapter.reading`): defaults, which a reader may have no use for. An
        option of the user's that the reader does not use is an error.

        Raises:
            BadInputError: If there is no such data, it is damaged, or an option is not used.
        """
        ...

    def data(self) -> Mapping[str, str]:
        """Return the names that :meth:`load` knows here, each with where it comes from."""
        ...

    def cases(self) -> Sequence[Case]:
        """Return the victims to evaluate on; the first is the demo's, on embedded data."""
        ...

    def describe(self, samples: Any) -> Mapping[str, Any]:
        """Return what a case's ``model`` may leave open, such as ``classes``, from the data."""
        ...

    def adapter_options(self, samples: Any) -> Mapping[str, Any]:
        """Return what the adapter of a victim needs to know about its data."""
        ...

    def for_training(self, samples: Any) -> Any:
        """Return a training set with the usual augmentation of those who train such models."""
        ...

    def measure(self, adapter: Any, samples: Any) -> float:
        """Return the task metric of a model over test samples, in ``[0, 1]``."""
        ...

    def show(self, clean: Any, triggered: Any) -> Plot:
        """Return a plot for the page: a few samples without and with the trigger."""
        ...


class AdapterKind(Protocol):
    """A class of adapters, as the registry asks it; see also :class:`Traits`."""

    __name__: str

    def accepts(self, model: nn.Module) -> bool:
        """Say whether the class can wrap ``model``; cheap, and imports nothing for it."""
        ...

    def __call__(self, model: nn.Module, **options: Any) -> TaskAdapter[Any]:
        """Return an adapter around ``model``, which is neither copied nor changed."""
        ...


@dataclass(frozen=True, slots=True)
class Traits:
    """What an adapter or its class may state beside its members, each by an attribute.

    The values here are those of an adapter that does not state them.

    Attributes:
        task: Name of the task that its data is of.
        priority: Among the classes that accept a model, the one with the highest is taken.
        generic: Whether this very class, not one that inherits from it, serves any module of its
            task where the task is named.
        auto_class: The ``AutoModelFor...`` of ``transformers`` that loads its models.
        score_name: What its score is called.
        misreadings: What to check where a model does not work on data of its task, as a phrase.
        optimizer: What defenses train such models with.
        mixable: Whether the weighted mean of two inputs is an input in its own right (MixUp): of
            images and clips it is, of texts and point clouds it is not.
        layer_norm: Whether LayerNorm or RMSNorm normalises the model, as in transformers, which
            takes larger steps of SGD and smaller ones of AdamW. A class cannot state it.
        mean: What inputs are shifted by, per channel, before the model reads them. A class cannot
            state it.
        std: What they are divided by, per channel. A class cannot state it.
    """

    task: str | None = None
    priority: int = 0
    generic: bool = False
    auto_class: str | None = None
    score_name: str = "accuracy"
    misreadings: str = "labels, preprocessing"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    mixable: bool = False
    layer_norm: bool = False
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def traits(adapter: object) -> Traits:
    """Return what an adapter, or a class of adapters, states about itself."""
    stated: dict[str, Any] = {}
    for entry in fields(Traits):
        value = getattr(adapter, entry.name, entry.default)
        if not isinstance(value, (property, cached_property)):  # a class knows no model yet
            stated[entry.name] = value
    kind = adapter if isinstance(adapter, type) else type(adapter)
    return Traits(**stated | {"generic": vars(kind).get("generic", False)})


def missing_members(adapter: object, protocol: type) -> list[str]:
    """Return the members of ``protocol`` that ``adapter`` has not, none of which is evaluated.

    ``isinstance`` of Python 3.11 evaluates properties, and some need data that is yet to be seen.
    """
    members = {
        name: None
        for kind in reversed(protocol.__mro__)
        if getattr(kind, "_is_protocol", False)
        for name in (*vars(kind), *inspect.get_annotations(kind))
        if not name.startswith("_")
    }
    absent = object()
    return [name for name in members if inspect.getattr_static(adapter, name, absent) is absent]
