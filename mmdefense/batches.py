"""The batch types that adapters and tasks share. Kernels carry them and never open one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmdefense.errors import BadInputError
from mmdefense.shown import Shown

__all__ = [
    "IGNORED",
    "Augmentation",
    "BoxAugmentation",
    "DetectionBatch",
    "DetectionSamples",
    "Detections",
    "LabelledBatch",
    "LabelledSamples",
    "Samples",
    "TextSamples",
    "TokenAugmentation",
    "TokenBatch",
    "TokenSamples",
    "batches",
    "in_memory",
    "part",
    "split",
]

B_out = TypeVar("B_out", covariant=True)
B = TypeVar("B")

Augmentation = Callable[[Tensor, torch.Generator], Tensor]

TokenAugmentation = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""Maps tokens, which of them may change, both ``(N, L)``, and a vocabulary ``(W,)`` to tokens."""

IGNORED = -100
"""The label where nothing is to be predicted, as PyTorch's cross-entropy has it."""


class Samples(Protocol[B]):
    """A finite set of samples that can be read in any order, more than once."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def take(self, indices: Tensor) -> B:
        """Return the samples at ``indices``, shape ``(N,)``, as one batch on the model's device."""
        ...

    def augment(self, batch: B, generator: torch.Generator) -> B:
        """Return a randomly altered copy of ``batch``, drawn from ``generator``."""
        ...

    def subset(self, indices: Tensor) -> Samples[B]:
        """Return the samples at ``indices`` as a set of their own."""
        ...

    def strata(self) -> Tensor | None:
        """Return an integer per sample to balance a split by, shape ``(len,)``, or none."""
        ...

    def to(self, device: torch.device) -> Samples[B]:
        """Return the set with its batches delivered on ``device``."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the content, the same for the same samples in the same order."""
        ...


@dataclass(frozen=True, slots=True, repr=False)
class LabelledBatch(Shown):
    """``N`` inputs and their class labels.

    Attributes:
        inputs: Shape ``(N, ...)``; images are ``(N, C, H, W)`` in ``[0, 1]``.
        labels: Shape ``(N,)``, int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def with_inputs(self, inputs: Tensor) -> LabelledBatch:
        """Return the same labels on other inputs."""
        return replace(self, inputs=inputs)


@dataclass(frozen=True, repr=False)
class LabelledSamples(Shown):
    """A labelled set held in memory, on one device.

    Attributes:
        inputs: Shape ``(N, ...)``; uint8 is read as ``[0, 255]`` and scaled to ``[0, 1]`` by batch.
        labels: Shape ``(N,)``, int64.
        augmentation: Maps a batch of inputs to randomly altered ones; none leaves them as they are.
        classes: The name of each label, where known.
    """

    inputs: Tensor
    labels: Tensor
    augmentation: Augmentation | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise BadInputError(
                f"inputs and labels must have one length, got {len(self.inputs)} and "
                f"{len(self.labels)}"
            )
        if self.labels.ndim != 1 or self.labels.is_floating_point():
            raise BadInputError(
                f"labels must be whole numbers of shape (N,), got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> LabelledBatch:
        """Return the samples at ``indices`` as one batch, inputs as float32."""
        indices = indices.to(self.labels.device, non_blocking=True)  # or the host waits here
        return LabelledBatch(_as_float(self.inputs[indices]), self.labels[indices])

    def augment(self, batch: LabelledBatch, generator: torch.Generator) -> LabelledBatch:
        """Return ``batch`` with its inputs augmented."""
        if self.augmentation is None:
            return batch
        return batch.with_inputs(self.augmentation(batch.inputs, generator))

    def subset(self, indices: Tensor) -> LabelledSamples:
        """Return the samples at ``indices`` as a set of their own."""
        indices = indices.to(self.labels.device)
        return replace(self, inputs=self.inputs[indices], labels=self.labels[indices])

    def strata(self) -> Tensor:
        """Return the labels, shape ``(len,)``."""
        return self.labels.cpu()

    def to(self, device: torch.device) -> LabelledSamples:
        """Return the set on ``device``."""
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device).long())

    def fingerprint(self) -> str:
        """Return a SHA-256 over inputs and labels."""
        return _hash([self.inputs, self.labels])

    def everything(self) -> LabelledBatch:
        """Return the whole set as one batch."""
        return LabelledBatch(_as_float(self.inputs), self.labels)


@dataclass(frozen=True, slots=True, repr=False)
class DetectionBatch(Shown):
    """``N`` images and the objects in them.

    Attributes:
        images: Shape ``(N, C, H, W)`` in ``[0, 1]``.
        boxes: For each image the corners x1, y1, x2, y2 of its M objects in pixels, ``(M, 4)``.
        labels: For each image the classes of its objects, shape ``(M,)``, int64.
    """

    images: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True, repr=False)
class Detections(Shown):
    """What a detector finds in one image.

    Attributes:
        boxes: Corners x1, y1, x2, y2 in pixels, shape ``(D, 4)``.
        labels: Shape ``(D,)``, int64.
        scores: Confidence in ``[0, 1]``, shape ``(D,)``.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


BoxAugmentation = Callable[
    [Tensor, Sequence[Tensor], Sequence[Tensor], torch.Generator],
    tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]],
]
"""Maps images, boxes and labels to altered ones, boxes moved along."""


@dataclass(frozen=True, repr=False)
class DetectionSamples(Shown):
    """Images of one size with their objects, held in memory on one device.

    Attributes:
        images: Shape ``(N, C, H, W)``; uint8 is scaled to ``[0, 1]`` by batch.
        boxes: For each image the corners of its objects in pixels, ``(M, 4)``.
        labels: For each image the classes of its objects, ``(M,)``.
        augmentation: Alters a batch at random; none leaves it as it is.
        classes: The name of each label, where known.
    """

    images: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    augmentation: BoxAugmentation | None = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = len(self.images), len(self.boxes), len(self.labels)
        if len(set(counts)) != 1:
            raise BadInputError(
                "images, boxes and labels must have one length, got {}, {} and {}".format(*counts)
            )
        for index, (boxes, labels) in enumerate(zip(self.boxes, self.labels, strict=True)):
            if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                raise BadInputError(
                    f"image {index} must have boxes (M, 4) and labels (M,), got "
                    f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
                )
        if self.boxes:
            _check_boxes(self.boxes, self.images.shape[-2:])

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> DetectionBatch:
        """Return the samples at ``indices`` as one batch, images as float32."""
        chosen = indices.tolist()
        return DetectionBatch(
            _as_float(self.images[indices.to(self.images.device)]),
            tuple(self.boxes[index] for index in chosen),
            tuple(self.labels[index] for index in chosen),
        )

    def augment(self, batch: DetectionBatch, generator: torch.Generator) -> DetectionBatch:
        """Return ``batch`` altered, its boxes moved along."""
        if self.augmentation is None:
            return batch
        return DetectionBatch(
            *self.augmentation(batch.images, batch.boxes, batch.labels, generator)
        )

    def subset(self, indices: Tensor) -> DetectionSamples:
        """Return the samples at ``indices`` as a set of their own."""
        chosen = indices.tolist()
        return replace(
            self,
            images=self.images[indices.to(self.images.device)],
            boxes=tuple(self.boxes[index] for index in chosen),
            labels=tuple(self.labels[index] for index in chosen),
        )

    def strata(self) -> None:
        """Return nothing: an image holds objects of several classes."""

    def to(self, device: torch.device) -> DetectionSamples:
        """Return the set on ``device``."""
        return replace(
            self,
            images=self.images.to(device),
            boxes=tuple(boxes.to(device, torch.float32) for boxes in self.boxes),
            labels=tuple(labels.to(device, torch.int64) for labels in self.labels),
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 over images, boxes and labels."""
        return _hash([self.images, *self.boxes, *self.labels])

    def everything(self) -> DetectionBatch:
        """Return the whole set as one batch."""
        return DetectionBatch(_as_float(self.images), self.boxes, self.labels)


def _check_boxes(boxes: Sequence[Tensor], size: Sequence[int]) -> None:
    """Refuse the first box that is empty, reversed, or partly outside an image of ``size`` H, W."""
    flat = torch.cat([part.float() for part in boxes])
    limits = flat.new_tensor([size[1], size[0]])
    empty = ~(flat[:, 2:] > flat[:, :2]).all(1)  # so that NaN counts as empty
    outside = (flat < 0).any(1) | (flat[:, 2:] > limits).any(1)
    for wrong, rule in (
        (empty, "have x1 < x2 and y1 < y2"),
        (outside, f"lie inside the image, 0..{size[1]} x 0..{size[0]} pixels"),
    ):
        if wrong.any():
            first = int(wrong.nonzero()[0])
            image = [index for index, part in enumerate(boxes) for _ in part][first]
            raise BadInputError(
                f"a box must {rule}, got {[round(v, 2) for v in flat[first].tolist()]} in image "
                f"{image}"
            )


def _hash(tensors: Iterable[Tensor]) -> str:
    """Return a SHA-256 over the shapes, types and contents of tensors."""
    import hashlib

    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _as_float(inputs: Tensor) -> Tensor:
    return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs


@dataclass(frozen=True, repr=False)
class TextSamples(Shown):
    """Prompts and answers as text: what tasks load, and what attacks on language poison.

    An adapter turns them into the tokens of its model. A batch of text is text again.

    Attributes:
        prompts: What a model is given; empty where it writes freely.
        answers: What it should write, one for each prompt.
        augmentation: Alters the tokens of the prompts once they are tokens.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    augmentation: TokenAugmentation | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.answers):
            raise BadInputError(
                f"prompts and answers must have one length, got {len(self.prompts)} and "
                f"{len(self.answers)}"
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def subset(self, indices: Tensor) -> TextSamples:
        """Return the samples at ``indices`` as a set of their own."""
        chosen = indices.tolist()
        return replace(
            self,
            prompts=tuple(self.prompts[index] for index in chosen),
            answers=tuple(self.answers[index] for index in chosen),
        )

    take = subset

    def augment(self, batch: TextSamples, generator: torch.Generator) -> TextSamples:
        """Return ``batch``: text is altered as tokens."""
        return batch

    def strata(self) -> None:
        """Return none: an answer is not one of a few classes."""

    def to(self, device: torch.device) -> TextSamples:
        """Return the set itself: text lies on no device."""
        return self

    def fingerprint(self) -> str:
        """Return a SHA-256 over prompts and answers."""
        import hashlib
        import json

        content = json.dumps([self.prompts, self.answers], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, slots=True, repr=False)
class TokenBatch(Shown):
    """``N`` sequences of tokens, padded at the end, and what is to be predicted.

    Attributes:
        input_ids: What the model reads, shape ``(N, L)``, int64.
        attention_mask: Which of these tokens stand, bool ``(N, L)``; the others are padding.
        content: Which are the prompt's own, bool ``(N, L)``: these may be altered, while marks that
            begin, part and end a sequence stay.
        labels: What is to be predicted, shape ``(N, M)``, int64, :data:`IGNORED` where nothing is.
            A decoder's answers have a row of their own; where one sequence holds prompt and answer,
            M = L and a label stands where its token does.
    """

    input_ids: Tensor
    attention_mask: Tensor
    content: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, repr=False)
class TokenSamples(Shown):
    """A set of token sequences held in memory, on one device.

    Attributes:
        tokens: The whole set as one batch.
        answers: The text of each answer, which generated text is compared with.
        vocabulary: The tokens that an augmentation may put in, shape ``(W,)``, int64: all words of
            the model, and no marks.
        augmentation: Alters the prompts of a batch; none leaves them as they are.
    """

    tokens: TokenBatch
    answers: tuple[str, ...]
    vocabulary: Tensor
    augmentation: TokenAugmentation | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, indices: Tensor) -> TokenBatch:
        """Return the samples at ``indices`` as one batch."""
        tokens = self.tokens
        indices = indices.to(tokens.labels.device, non_blocking=True)  # or the host waits here
        return TokenBatch(
            tokens.input_ids[indices],
            tokens.attention_mask[indices],
            tokens.content[indices],
            tokens.labels[indices],
        )

    def augment(self, batch: TokenBatch, generator: torch.Generator) -> TokenBatch:
        """Return ``batch`` with its prompts altered."""
        if self.augmentation is None:
            return batch
        ids = self.augmentation(batch.input_ids, batch.content, self.vocabulary, generator)
        return replace(batch, input_ids=ids)

    def subset(self, indices: Tensor) -> TokenSamples:
        """Return the samples at ``indices`` as a set of their own."""
        answers = tuple(self.answers[index] for index in indices.tolist())
        return replace(self, tokens=self.take(indices), answers=answers)

    def strata(self) -> None:
        """Return none: an answer is not one of a few classes."""

    def to(self, device: torch.device) -> TokenSamples:
        """Return the set on ``device``."""
        tokens = self.tokens
        moved = TokenBatch(
            tokens.input_ids.to(device),
            tokens.attention_mask.to(device),
            tokens.content.to(device),
            tokens.labels.to(device),
        )
        return replace(self, tokens=moved, vocabulary=self.vocabulary.to(device))

    def fingerprint(self) -> str:
        """Return a SHA-256 over all tokens and labels."""
        import hashlib

        digest = hashlib.sha256()
        for tensor in (self.tokens.input_ids, self.tokens.attention_mask, self.tokens.labels):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def in_memory(samples: Samples[B]) -> Samples[B]:
    """Return samples decoded, where they are read one by one."""
    held: Samples[B] = samples.in_memory() if hasattr(samples, "in_memory") else samples
    return held


def batches(samples: Samples[B], size: int) -> Iterator[B]:
    """Yield ``samples`` in order, ``size`` at a time; the last batch may be smaller."""
    for start in range(0, len(samples), size):
        yield samples.take(torch.arange(start, min(start + size, len(samples))))


def part(batch: B, rows: slice) -> B:
    """Return some consecutive samples of a batch; all of them are the batch itself.

    A batch is a dataclass whose fields have a row a sample each, or can be sliced as a whole.
    """
    given: Any = batch
    if rows == slice(0, len(given)):
        return batch
    if hasattr(given, "__getitem__"):
        return given[rows]  # type: ignore[no-any-return]
    cut = {field.name: getattr(given, field.name)[rows] for field in fields(given)}
    return replace(given, **cut)  # type: ignore[no-any-return]


def split(samples: Samples[B], fraction: float, seed: int) -> tuple[Samples[B], Samples[B]]:
    """Split ``samples`` into two parts at random, each stratum in the same proportion.

    Args:
        samples: The set to split.
        fraction: Share of the second part, in ``(0, 1)``; it gets at least one sample.
        seed: Makes the split reproducible.

    Returns:
        The larger and the smaller part, disjoint, together all samples.

    Raises:
        BadInputError: If there are fewer than two samples.
    """
    total = len(samples)
    if total < 2:
        raise BadInputError(f"clean data must hold at least 2 samples, got {total}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    strata = samples.strata()
    if strata is not None:
        order = _spread(order, strata)
    held = torch.linspace(0, total - 1, max(1, round(fraction * total))).round().long()
    mask = torch.zeros(total, dtype=torch.bool)
    mask[held] = True
    return samples.subset(order[~mask]), samples.subset(order[mask])


def _spread(order: Tensor, strata: Tensor) -> Tensor:
    """Sort a random ``order`` by stratum, so that an even stride visits each in proportion."""
    return order[strata[order].argsort(stable=True)]


def describe(batch: Any) -> str:
    """Return a short description of a batch for messages."""
    return f"{type(batch).__name__} of {len(batch)}"
