"""Differentiable triggers for text: soft tokens, each a mixture of real tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmdefense.data.text import IGNORED, TokenBatch
from mmdefense.errors import BadInputError
from mmdefense.kernels.hooks import mode, watch_modules
from mmdefense.protocol import TriggerFamily

__all__ = ["EmbeddedBatch", "SoftBatch", "TextTriggers", "inserted", "packed", "soft_tokens"]

# Ours: soft tokens per trigger; tokens per mixture, per scan batch and for the continuation search;
# and the number of continuations kept.
_SLOTS, _MIXED, _SCANNED, _TRIED, _TARGETS = 2, 64, 2048, 16, 6
_SHARPNESS = 12.0  # of a mixture: a raw value of 1 against zeros weighs e^12


@dataclass(frozen=True, slots=True)
class SoftBatch(TokenBatch):
    """A token batch whose first prompt tokens are given as embeddings.

    Attributes:
        soft: Embeddings of the first k tokens of each prompt, shape ``(N, k, D)``.
    """

    soft: Tensor


@dataclass(frozen=True, slots=True)
class EmbeddedBatch(TokenBatch):
    """A token batch all of whose input tokens are given as embeddings.

    Attributes:
        embedded: Embeddings of the tokens, shape ``(N, L, D)``.
    """

    embedded: Tensor


@dataclass(frozen=True)
class _Suspects:
    """Results of a vocabulary scan.

    Attributes:
        tokens: Tokens that change the beginning of the answer most, shape ``(S,)``.
        answers: Continuations that different prompts share, ``(C, T)``, padded with ``IGNORED``.
    """

    tokens: Tensor
    answers: Tensor


class TextTriggers(ABC):
    """Mixin for language model adapters that searches for a prefix which collapses the answer.

    Text has no classes that could serve as targets. Instead the vocabulary is scanned once: each
    token is prepended to a few prompts. The tokens that change the beginning of the answers most
    are the ingredients of triggers, and continuations that different prompts share after one of
    them are the targets: a backdoor gives the same answer to any prompt.
    """

    shared: ClassVar[bool]
    """Whether prompt and answer are one sequence."""

    model: nn.Module
    tokenizer: Any
    _prompts: TokenBatch | None

    def trigger_targets(self) -> int:
        """Return the number of continuations shared by different prompts."""
        return len(self._suspects.answers)

    def trigger_families(self) -> Sequence[TriggerFamily]:
        """Return prefixes of two soft tokens."""
        shape = (_SLOTS, len(self._suspects.tokens))
        return [TriggerFamily("prefix", shape, budget=0.5, starts=64)]

    def stamp(self, batch: TokenBatch, family: TriggerFamily, triggers: Tensor) -> SoftBatch:
        """Prepend soft prefixes ``triggers``, shape ``(T, N, k, S)``, to the prompts."""
        count = len(triggers)
        table = self._embeddings()(self._suspects.tokens)
        soft = (_SHARPNESS * triggers).softmax(-1) @ table
        filler = torch.full(
            (len(batch), triggers.shape[2]), self.tokenizer.pad_token_id, device=table.device
        )
        longer = _repeated(inserted(batch, filler, shared=self.shared), count)
        return SoftBatch(
            longer.input_ids,
            longer.attention_mask,
            longer.content,
            longer.labels,
            soft.flatten(0, 1),
        )

    def trigger_size(self, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return the fraction of a prompt taken by soft tokens, the same for each trigger."""
        prompt = float(self._seen().content.sum(1).float().mean())
        share = family.shape[0] / (family.shape[0] + prompt)
        return torch.full(triggers.shape[:-2], share, device=triggers.device)

    def trigger_words(self, trigger: Tensor) -> str:
        """Return the real tokens nearest to a raw trigger ``(k, S)``, as text."""
        tokens = self._suspects.tokens[trigger.argmax(-1).to(self._suspects.tokens.device)]
        return str(self.tokenizer.decode(tokens.tolist()))

    def target_words(self, target: int) -> str:
        """Return the continuation that is a target, as text."""
        tokens = self._suspects.answers[target]
        return str(self.tokenizer.decode(tokens[tokens != IGNORED].tolist()))

    def trigger_picture(self, family: TriggerFamily, trigger: Tensor) -> Tensor:
        """Return a picture of the words nearest to a raw trigger, ``(1, H, W)``."""
        from PIL import Image, ImageDraw

        words = self.trigger_words(trigger).split() or ["(blank)"]
        picture = Image.new("L", (96, 16 * len(words) + 8), 255)
        for row, word in enumerate(words):
            ImageDraw.Draw(picture).text((6, 4 + 16 * row), word, fill=0)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return pixels.view(1, picture.height, picture.width).float() / 255

    def target_log_probability(self, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Return the log-probability of each target's whole continuation, shape ``(N,)``."""
        answers = self._suspects.answers[targets]
        asked = self._answered(batch, answers)
        log_p = self._logits(asked).log_softmax(2)
        wanted = self._targets(asked)
        chosen = log_p.gather(2, wanted.clamp(min=0)[..., None]).squeeze(2)
        return (chosen * (wanted != IGNORED)).sum(1)

    def not_target(self, batch: TokenBatch, targets: Tensor) -> Tensor:
        """Return whether each answer differs from the continuation that is its target."""
        answers = self._suspects.answers[targets]
        own = packed(batch.labels, batch.labels != IGNORED)
        width = max(own.shape[1], answers.shape[1])
        return (_widened(own, width) != _widened(answers, width)).any(1)

    @cached_property
    def _suspects(self) -> _Suspects:
        with torch.no_grad(), mode(self.model, train=False):
            tokens = self._unsettling()
            return _Suspects(tokens[:_MIXED], self._shared_answers(tokens[:_TRIED]))

    def _seen(self) -> TokenBatch:
        if self._prompts is None:
            raise BadInputError("the adapter has seen no prompt yet; call samples() first")
        return self._prompts

    def _unsettling(self) -> Tensor:
        """Rank the vocabulary by how much a token changes the beginning of the answer, most first.

        The change is the mean divergence of the first answer token's distribution with and without
        it.
        """
        plain = self._first(self._seen())
        size, special = self._embeddings().num_embeddings, set(self.tokenizer.all_special_ids)
        scanned = [token for token in range(0, size, -(-size // _SCANNED)) if token not in special]
        tokens = torch.tensor(scanned, device=plain.device)
        shifts = []
        for some in torch.split(tokens, _TRIED):
            log_p = self._first(self._behind(some)).view(len(some), *plain.shape)
            shifts.append((log_p.exp() * (log_p - plain)).sum(2).mean(1))
        return tokens[torch.cat(shifts).argsort(descending=True)]

    def _behind(self, tokens: Tensor) -> TokenBatch:
        """Prepend each of S tokens to the prompts seen first: S x N samples."""
        prompts = self._seen()
        filler = tokens.repeat_interleave(len(prompts))[:, None]
        return inserted(_repeated(prompts, len(tokens)), filler, shared=self.shared)

    def _first(self, batch: TokenBatch) -> Tensor:
        """Return the log-probabilities of each answer's first token, shape ``(N, V)``."""
        known = self._targets(batch) != IGNORED
        rows = torch.arange(len(batch), device=known.device)
        return self._logits(batch)[rows, known.int().argmax(1)].log_softmax(1)

    def _shared_answers(self, tokens: Tensor) -> Tensor:
        """Return the continuations that most prompts share after one of ``tokens``."""
        written = self._written(self._behind(tokens)).tolist()
        answers = [_ended(row, self.tokenizer.eos_token_id) for row in written]
        shared: dict[tuple[int, ...], int] = {}
        for start in range(0, len(answers), len(self._seen())):
            for answer, count in Counter(answers[start : start + len(self._seen())]).items():
                shared[answer] = max(shared.get(answer, 0), count)
        best = sorted(shared, key=lambda answer: -shared[answer])[:_TARGETS]
        longest = max(len(answer) for answer in best)
        rows = [[*answer, *[IGNORED] * (longest - len(answer))] for answer in best]
        return torch.tensor(rows, device=tokens.device)

    @abstractmethod
    def _embeddings(self) -> nn.Embedding:
        """Return the layer that embeds the prompt's tokens."""

    @abstractmethod
    def _logits(self, batch: TokenBatch) -> Tensor:
        """Return the logits that predict :meth:`_targets`, shape ``(N, T, V)``."""

    @abstractmethod
    def _targets(self, batch: TokenBatch) -> Tensor:
        """Return the targets of the logits, shape ``(N, T)``."""

    @abstractmethod
    def _written(self, batch: TokenBatch) -> Tensor:
        """Return the greedily generated answer to each prompt, ``(N, T)``."""

    @abstractmethod
    def _answered(self, batch: TokenBatch, answers: Tensor) -> TokenBatch:
        """Return the prompts with other answers, ``(N, T)``, padded with ``IGNORED``."""


def inserted(batch: TokenBatch, tokens: Tensor, *, shared: bool) -> TokenBatch:
    """Insert ``tokens``, shape ``(N, k)``, before the first own token of each prompt.

    Args:
        batch: The prompts.
        tokens: The tokens to insert.
        shared: Whether prompt and answer are one sequence, so that labels shift too.
    """
    start = int(batch.content.any(0).int().argmax())
    new = torch.ones_like(tokens, dtype=torch.bool)

    def put(values: Tensor, between: Tensor) -> Tensor:
        return torch.cat([values[:, :start], between, values[:, start:]], 1)

    labels = put(batch.labels, torch.full_like(tokens, IGNORED)) if shared else batch.labels
    return TokenBatch(
        put(batch.input_ids, tokens),
        put(batch.attention_mask, new),
        put(batch.content, new),
        labels,
    )


def _repeated(batch: TokenBatch, count: int) -> TokenBatch:
    """Repeat a batch ``count`` times."""
    return TokenBatch(
        batch.input_ids.repeat(count, 1),
        batch.attention_mask.repeat(count, 1),
        batch.content.repeat(count, 1),
        batch.labels.repeat(count, 1),
    )


@contextmanager
def soft_tokens(embeddings: nn.Module, batch: TokenBatch) -> Iterator[None]:
    """Let the embedding layer return the batch's own embeddings, if it has any."""
    if not isinstance(batch, SoftBatch | EmbeddedBatch):
        yield
        return
    start = int(batch.content.any(0).int().argmax())

    def give(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if given[0].data_ptr() != batch.input_ids.data_ptr():  # a decoder reads its own tokens
            return None
        if isinstance(batch, EmbeddedBatch):
            return batch.embedded.to(output)
        stop = start + batch.soft.shape[1]
        return torch.cat([output[:, :start], batch.soft.to(output), output[:, stop:]], 1)

    with watch_modules([embeddings], give):
        yield


def packed(values: Tensor, known: Tensor) -> Tensor:
    """Move known values to the front of each row, in order, followed by ``IGNORED``."""
    order = (~known).int().argsort(dim=1, stable=True)
    return torch.where(known, values, IGNORED).gather(1, order)


def _widened(values: Tensor, width: int) -> Tensor:
    return nn.functional.pad(values, (0, width - values.shape[1]), value=IGNORED)


def _ended(row: list[int], end: int | None) -> tuple[int, ...]:
    return tuple(row[: row.index(end) + 1] if end in row else row)
