"""Text: prompts and answers, and the tokens that a model reads of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmdefense.data.batch import HeldSamples, TensorBatch
from mmdefense.errors import BadInputError

__all__ = [
    "IGNORED",
    "TextSamples",
    "TokenAugmentation",
    "TokenBatch",
    "TokenSamples",
    "random_words",
]

TokenAugmentation = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""Maps tokens, which of them may change, both ``(N, L)``, and a vocabulary ``(W,)`` to tokens."""

IGNORED = -100
"""The label where nothing is to be predicted, as PyTorch's cross-entropy has it."""


@dataclass(frozen=True, repr=False)
class TextSamples(HeldSamples):
    """Prompts and answers as text: what tasks load, and what attacks on language poison.

    An adapter turns them into the tokens of its model. A batch of text is text again.

    Attributes:
        prompts: What a model is given; empty for free generation.
        answers: What it should write, one for each prompt.
        augmentation: Alters the prompts once they are tokenised.
    """

    columns = ("prompts", "answers")

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    augmentation: TokenAugmentation | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.answers):
            raise BadInputError(
                f"prompts and answers must have the same length, got {len(self.prompts)} and "
                f"{len(self.answers)}"
            )

    def take(self, indices: Tensor) -> TextSamples:
        """Return the samples at ``indices``; a batch of text is a set of text."""
        return self.subset(indices)

    def rows(self, rows: slice) -> TextSamples:
        """Return consecutive samples."""
        return self.subset(torch.arange(len(self))[rows])

    def augment(self, batch: TextSamples, generator: torch.Generator) -> TextSamples:
        """Return ``batch``: text is altered as tokens."""
        return batch


@dataclass(frozen=True, slots=True, repr=False)
class TokenBatch(TensorBatch):
    """``N`` sequences of tokens, padded at the end, and what is to be predicted.

    Attributes:
        input_ids: What the model reads, shape ``(N, L)``, int64.
        attention_mask: Which tokens are real, bool ``(N, L)``; the others are padding.
        content: Which are the prompt's own, bool ``(N, L)``: these may be altered, unlike the
            special tokens that begin, separate and end a sequence.
        labels: What is to be predicted, shape ``(N, M)``, int64, :data:`IGNORED` where nothing is.
            A decoder's answers have a row of their own; where one sequence holds prompt and answer,
            M = L and a label stands where its token does.
    """

    input_ids: Tensor
    attention_mask: Tensor
    content: Tensor
    labels: Tensor


@dataclass(frozen=True, repr=False)
class TokenSamples(HeldSamples):
    """A set of token sequences held in memory, on one device.

    Attributes:
        tokens: The whole set as one batch.
        answers: The text of each answer, which generated text is compared with.
        vocabulary: The tokens that an augmentation may put in, shape ``(W,)``, int64: all words of
            the model, without special tokens.
        augmentation: Alters the prompts of a batch; none leaves them as they are.
    """

    columns = ("tokens", "answers")

    tokens: TokenBatch
    answers: tuple[str, ...]
    vocabulary: Tensor
    augmentation: TokenAugmentation | None = None

    def take(self, indices: Tensor) -> TokenBatch:
        """Return the samples at ``indices`` as one batch."""
        chosen: TokenBatch = self.at(indices)["tokens"]
        return chosen

    def augment(self, batch: TokenBatch, generator: torch.Generator) -> TokenBatch:
        """Return ``batch`` with its prompts altered."""
        if self.augmentation is None:
            return batch
        ids = self.augmentation(batch.input_ids, batch.content, self.vocabulary, generator)
        return replace(batch, input_ids=ids)

    def to(self, device: torch.device) -> TokenSamples:
        """Return the set on ``device``, its vocabulary too."""
        return replace(super().to(device), vocabulary=self.vocabulary.to(device))


def random_words(
    tokens: Tensor,
    content: Tensor,
    vocabulary: Tensor,
    generator: torch.Generator,
    *,
    replace: float = 0.05,
    keep: float = 0.4,
) -> Tensor:
    """Return each prompt with a few of its tokens replaced by any of the vocabulary's.

    The views "insertions" of text: the counterpart of a noise rectangle in an image. The answer
    stays, though a word of it may have lost its source: so the share, our choice, is small.

    Args:
        tokens: Shape ``(N, L)``, int64.
        content: Which tokens may change, bool ``(N, L)``.
        vocabulary: What to draw from, shape ``(W,)``, int64.
        generator: Source of the changes, on the device of the tokens.
        replace: Share of the tokens that are replaced.
        keep: Share of the prompts that stay as they are.
    """
    device = tokens.device
    altered = torch.rand(len(tokens), 1, generator=generator, device=device) >= keep
    chosen = torch.rand(tokens.shape, generator=generator, device=device) < replace
    drawn = torch.randint(len(vocabulary), tokens.shape, generator=generator, device=device)
    return torch.where(content & altered & chosen, vocabulary[drawn], tokens)
