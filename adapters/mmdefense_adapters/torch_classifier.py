"""Any PyTorch image classifier: torchvision, timm, or a class of one's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.batches import LabelledBatch, Samples
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.kernels.hooks import capture, mode, watch_modules
from mmdefense.protocol import TriggerFamily, UnitGroup
from mmdefense_adapters.images import ImageTriggers, as_image_samples
from mmdefense_adapters.units import capture_heads, find_units

__all__ = ["TorchClassifier"]


class TorchClassifier(ImageTriggers):
    """Wraps a module that maps images ``(N, C, H, W)`` to logits ``(N, K)``.

    Images come in ``[0, 1]``; ``mean`` and ``std`` are applied inside, so that triggers live in
    pixel space.
    """

    priority: ClassVar[int] = 0
    task: ClassVar[str] = "image-classification"

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
            example: One input batch, shape ``(1, C, H, W)``, to trace the model with; by default
                the first batch that the adapter sees.
        """
        if (mean is None) != (std is None):
            raise BadInputError("mean and std must be given together, got one of them")
        self.model = model
        self.mean, self.std = mean, std
        self.example = example
        self._scaling: Tensor | None = None

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Say whether the adapter can try this model: any module."""
        return isinstance(model, nn.Module)

    @property
    def chance(self) -> float:
        """1 / K."""
        return 1 / self.classes

    @cached_property
    def classes(self) -> int:
        """Number of classes K, from the model's answer to the example."""
        return int(self._trace_answer.shape[1])

    @cached_property
    def _trace_answer(self) -> Tensor:
        with torch.no_grad(), mode(self.model, train=False):
            return self.logits(self._example())

    def _example(self) -> Tensor:
        if self.example is None:
            raise BadInputError(
                "the adapter has seen no input yet; pass example=images[:1] or call samples() first"
            )
        return self.example.to(next(self.model.parameters()).device)

    def samples(self, data: Any) -> Samples[LabelledBatch]:
        """Return ``data`` as labelled images on the model's device, checked against the model."""
        samples = as_image_samples(data)
        if len(samples) == 0:
            raise BadInputError("data must hold at least one image, got none")
        samples = samples.to(next(self.model.parameters()).device)
        first = samples.take(torch.zeros(1, dtype=torch.int64)).inputs
        self._check(samples, first)
        if self.example is None:
            self.example = first
        return samples

    def _check(self, samples: Samples[LabelledBatch], first: Tensor) -> None:
        shape = tuple(first.shape[1:])
        if self.mean is not None and len(self.mean) != shape[0]:
            raise BadInputError(
                f"images must have {len(self.mean)} channels, as mean and std have, got {shape}"
            )
        try:
            with torch.no_grad(), mode(self.model, train=False):
                answer = self.logits(first)
        except Exception as error:  # the model is the user's own and may raise anything
            raise BadInputError(
                f"the model cannot read images of shape {shape}: {one_line(error)}"
            ) from error
        if answer.ndim != 2:
            raise UnsupportedError(
                f"an image classifier must answer with logits (N, K), got shape "
                f"{tuple(answer.shape)} for images of {shape}"
            )
        _check_labels(samples, answer.shape[1])

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits of images in ``[0, 1]``, shape ``(N, K)``."""
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
        """Run the model on normalised images."""
        return self.model(inputs)  # type: ignore[no-any-return]

    def per_sample_loss(self, batch: LabelledBatch) -> Tensor:
        """Return the cross-entropy of each image in nats, shape ``(N,)``."""
        return F.cross_entropy(self.logits(batch.inputs), batch.labels, reduction="none")

    def sampled_loss(
        self, batch: LabelledBatch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy and the Rademacher score from one forward pass.

        The score of an image is ``2 sum_c xi_c sqrt(p_c)`` with random signs ``xi``. Its gradient,
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

    def head_group(self) -> UnitGroup:
        """Return the penultimate features as units on the input axis of the output layer."""
        weight, _ = self.head_weights()
        return UnitGroup(
            self.head or "", weight.shape[1], {f"{self.head}.weight": 1}, kind="neuron"
        )

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return weight ``(K, D)`` and bias ``(K,)`` of the output layer.

        Raises:
            UnsupportedError: If the model does not end in a linear layer.
        """
        layer = self.model.get_submodule(self.head) if self.head is not None else None
        if not isinstance(layer, nn.Linear):
            raise UnsupportedError(
                "the model does not end in a linear layer, so its features cannot be pruned from "
                "one pass; prune every unit group instead: --set layers=all"
            )
        return layer.weight, layer.bias

    @torch.no_grad()
    def features(self, batch: LabelledBatch, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return pooled activations: after BatchNorm and ReLU for rows, magnitude for heads."""
        groups = {group.layer: group for group in self.unit_groups()}
        heads = [name for name in layers if groups[name].kind == "head"]
        rows = {
            self.model.get_submodule(self._read_at(groups[name])): groups[name]
            for name in layers
            if name not in heads
        }
        pooled: dict[str, Tensor] = {}

        def pool(module: nn.Module, _: Any, output: Tensor) -> None:
            # At once: the model may go on to add a shortcut to this very tensor in place.
            pooled[rows[module].layer] = _pool(output, rows[module], len(batch))

        with (
            watch_modules(list(rows), pool),
            capture_heads(self.model, heads) as mixed,
        ):
            self.logits(batch.inputs)
        for name in heads:
            weight = self.model.get_parameter(f"{name}.weight")
            pooled[name] = _pool_heads(mixed[name], weight, groups[name], len(batch))
        return pooled

    def _read_at(self, group: UnitGroup) -> str:
        """Return the layer whose output speaks for a group: its BatchNorm, where it has one."""
        return list(group.axes)[-1].rpartition(".")[0]

    def embedding(self, batch: LabelledBatch) -> Tensor:
        """Return the input of the output layer, shape ``(N, D)``."""
        if self.head is None:
            raise UnsupportedError("the output layer could not be found, so there is no embedding")
        with torch.no_grad(), capture(self.model, [self.head], inputs=True) as inputs:
            self.logits(batch.inputs)
        return inputs[self.head].flatten(1)

    def unit_groups(self) -> Sequence[UnitGroup]:
        """Return filters, linear rows and attention heads, input side first; not the classes."""
        return self._units[0]

    @property
    def head(self) -> str | None:
        """Name of the output layer, where it can be found."""
        return self._units[1]

    @cached_property
    def _units(self) -> tuple[list[UnitGroup], str | None]:
        return find_units(self.model, lambda: self.logits(self._example()))

    def fork(self) -> Self:
        """Return an adapter around a deep copy of the model."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        return twin

    def trigger_targets(self) -> int:
        """Return K."""
        return self.classes

    def trigger_families(self) -> Sequence[TriggerFamily]:
        """Return patches at any place and additive patterns, for images of this size."""
        return self.image_families(tuple(self._example().shape[1:]))

    def target_log_probability(self, batch: LabelledBatch, targets: Tensor) -> Tensor:
        """Return the log of the softmax probability of each target, shape ``(N,)``."""
        return self.logits(batch.inputs).log_softmax(1).gather(1, targets[:, None]).squeeze(1)

    def not_target(self, batch: LabelledBatch, targets: Tensor) -> Tensor:
        """Return whether each label differs from its target."""
        return batch.labels != targets


def _check_labels(samples: Samples[LabelledBatch], classes: int) -> None:
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


def _pool(output: Tensor, group: UnitGroup, count: int) -> Tensor:
    """Rectify and average over positions, ``(N, U)``.

    Channels are axis 1 of a convolution's output, and the last axis of a linear layer's.
    """
    if group.kind == "filter":
        output = output.movedim(1, -1)
    return F.relu(output).reshape(count, -1, group.size).mean(1)


def _pool_heads(mixed: Tensor, weight: Tensor, group: UnitGroup, count: int) -> Tensor:
    """Return the size of what each head adds to its block's output, ``(N, heads)``.

    It is the root mean square over the D outputs of ``W_h z_h``, averaged over positions (windows
    of one image lie side by side); by the Gram matrix of ``W_h`` no product is held in memory.
    """
    split = mixed.reshape(count, -1, group.size, group.width)
    columns = weight.reshape(-1, group.size, group.width)
    gram = torch.einsum("ohi,ohj->hij", columns, columns) / len(weight)
    square = torch.einsum("nlhi,hij,nlhj->nlh", split, gram, split)
    return square.clamp(min=0).sqrt().mean(1)
