"""The base class for causal and sequence-to-sequence language models of ``transformers``."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdefense.checkpoints.configs import check_configs
from mmdefense.checkpoints.private_folder import offline
from mmdefense.data.batch import Samples, Views
from mmdefense.data.text import IGNORED, TextSamples, TokenBatch, TokenSamples, random_words
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.kernels.hooks import capture, mode, watch_modules
from mmdefense.protocol import UnitGroup
from mmdefense_adapters.divergence import divergence
from mmdefense_adapters.given import told
from mmdefense_adapters.module_adapter import ModuleAdapter, usable
from mmdefense_adapters.peft_models import base_of
from mmdefense_adapters.text_triggers import EmbeddedBatch, TextTriggers, soft_tokens
from mmdefense_adapters.views import with_augmentation

__all__ = ["HFText"]

_SEEN = 8  # prompts used to scan the vocabulary in the trigger search; ours
_ROOM = 8  # tokens by which a generated answer may exceed the longest one in the data; ours
_LONGEST_GRAM = 4  # n-grams of the score, as in BLEU


class HFText(TextTriggers, ModuleAdapter[TokenBatch]):
    """Wraps a text-generating model with its tokenizer.

    The loss of a sample is the mean negative log-likelihood of its answer's tokens, each given the
    previous ones (teacher forcing); padding and, in a causal model, the prompt do not count. For a
    LoRA model only the trainable parameters are purified: its base is not changed.
    """

    task: ClassVar[str] = "language-generation"
    score_name: ClassVar[str] = "n-gram accuracy"
    misreadings: ClassVar[str] = (
        "the order of the pair (--read pair), the tokenizer, and the separator of prompt and answer"
    )
    priority: ClassVar[int] = 10

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        separator: str | None = None,
        pad_token: str | None = None,
        example: TokenBatch | None = None,
    ) -> None:
        """Wrap ``model``.

        Args:
            model: The language model, or a ``peft`` model around one; it is not copied.
            tokenizer: Its ``transformers`` tokenizer; by default the one in the folder that the
                model was loaded from.
            max_length: Number of tokens to which longer prompts and answers are truncated; by
                default a sequence that is too long for the model is rejected.
            separator: Separates prompt and answer in a causal model; by default the tokenizer's own
                separator if it has one, else a line break.
            pad_token: A token of the tokenizer used as (masked) padding; by default the tokenizer's
                own, or else its end-of-text token.
            example: One sample, to trace the model with; by default the first one seen.
        """
        self.model = usable(model)
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        self.tokenizer = _with_pad(tokenizer, pad_token)
        self.max_length = max_length
        self.separator = separator or self.tokenizer.sep_token or "\n"
        self._said_separator = separator
        self.example = example
        self._chance, self._longest = 0.0, 0
        self._prompts: TokenBatch | None = None

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether ``model`` is of this family; nothing is imported for others."""
        base = base_of(model)
        if not any(kind.__module__.startswith("transformers.") for kind in type(base).__mro__):
            return False
        return type(base).__name__ in cls._names()

    @classmethod
    @abstractmethod
    def _names(cls) -> set[str]:
        """Return the names of the ``transformers`` classes that this adapter supports."""

    @property
    def chance(self) -> float:
        """Score of always predicting the most frequent token of the answers seen first."""
        if not self._chance:
            raise BadInputError("the adapter has seen no answer yet; call samples() first")
        return self._chance

    # --- from text to tokens

    def samples(self, data: Any) -> Samples[TokenBatch]:
        """Return ``data`` as tokens on the model's device, checked against the model.

        Args:
            data: Text samples, pairs of prompt and answer, plain texts, or tokens.

        Raises:
            BadInputError: If there is none, a sequence is longer than the model's context, or a
                token is not in the model's vocabulary.
        """
        data = data if isinstance(data, TokenSamples) else as_text(data)
        if not len(data):
            raise BadInputError("data must hold at least one text, got none")
        samples = data if isinstance(data, TokenSamples) else self._encoded(data)
        self._check(samples.tokens)
        if self._said_separator and not (self.shared and samples.tokens.content.any()):
            raise BadInputError(
                f"separator={self._said_separator!r} has no effect on "
                f"{'texts without a prompt' if self.shared else 'a model with an encoder'}; leave "
                "it out"
            )
        samples = samples.to(self.device)
        if self.example is None:
            self.example = samples.take(torch.zeros(1, dtype=torch.int64))
        if not self._chance:
            labels = samples.tokens.labels
            known = labels != IGNORED
            most = labels[known].bincount().argmax()
            self._chance = float(_share_right(labels == most, known).mean())
            self._longest = int(known.sum(1).max())
        self._prompts = samples.take(torch.arange(min(_SEEN, len(samples))))
        return samples

    def viewed(self, samples: Samples[TokenBatch], views: Views) -> Samples[TokenBatch]:
        """Return augmented texts; standard views do not change texts."""
        return with_augmentation(self, samples, views, standard=None, insertions=random_words)

    def _encoded(self, texts: TextSamples) -> TokenSamples:
        prompts, answers = self._ids(texts.prompts), self._ids(texts.answers, answers=True)
        rows = [self._row(*pair) for pair in zip(prompts, answers, strict=True)]
        pad = self.tokenizer.pad_token_id
        ids = _padded([row[0] for row in rows], pad)
        lengths = torch.tensor([len(row[0]) for row in rows])
        starts = torch.tensor([row[2] for row in rows])
        place = torch.arange(ids.shape[1])
        content = (place >= starts[:, :1]) & (place < starts[:, 1:])
        labels = _padded([row[1] for row in rows], IGNORED)
        tokens = TokenBatch(ids, place < lengths[:, None], content, labels)
        return TokenSamples(tokens, texts.answers, self._words(), texts.augmentation)

    @property
    def _end(self) -> list[int]:
        """The end-of-text token, if the tokenizer has one."""
        end = self.tokenizer.eos_token_id
        return [] if end is None else [end]

    def _words(self) -> Tensor:
        """Return the tokens that are not special, shape ``(W,)``."""
        size = min(len(self.tokenizer), self._embeddings().num_embeddings)
        marks = set(self.tokenizer.all_special_ids)
        return torch.tensor([token for token in range(size) if token not in marks])

    def _ids(self, texts: Sequence[str], *, answers: bool = False) -> list[list[int]]:
        named = {"text_target": list(texts)} if answers else {"text": list(texts)}
        try:
            found = self.tokenizer(**named, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # tokenizers raise many exception types
            raise BadInputError(f"the tokenizer cannot read the text: {one_line(error)}") from error
        return [row[: self.max_length] for row in found]

    @abstractmethod
    def _row(
        self, prompt: list[int], answer: list[int]
    ) -> tuple[list[int], list[int], tuple[int, int]]:
        """Return the input tokens, the labels, and the range of the prompt's own tokens."""

    def _check(self, tokens: TokenBatch) -> None:
        context = _context(base_of(self.model).config)
        for kind, mask in (
            ("sequence", tokens.attention_mask),
            ("answer", tokens.labels > IGNORED),
        ):
            lengths = mask.sum(1)
            if context is not None and int(lengths.max()) > context:
                raise BadInputError(
                    f"{kind} {int(lengths.argmax())} has {int(lengths.max())} tokens, but the "
                    f"model reads at most {context}; leave it out, or cut "
                    f"with max_length={context} (--read max_length={context})"
                )
        if not bool((tokens.labels != IGNORED).any(1).all()):
            raise BadInputError("each sample must have an answer of at least one token")
        size = self._embeddings().num_embeddings
        largest = int(max(tokens.input_ids.max(), tokens.labels.max()))
        if largest >= size:
            raise BadInputError(
                f"tokens must lie in 0..{size - 1}, the model's vocabulary, got {largest}; is it "
                "the model's own tokenizer?"
            )

    # --- the interface for defenses

    def answer(self, batch: TokenBatch) -> Tensor:
        """Return the logits of every position, shape ``(N, M, V)``."""
        return self._logits(batch)

    def _logits(self, batch: TokenBatch) -> Tensor:
        """Return the logits that predict :meth:`_targets`, shape ``(N, T, V)``."""
        with soft_tokens(self._embeddings(), batch):
            return self._run(batch)

    @abstractmethod
    def _run(self, batch: TokenBatch) -> Tensor:
        """Run the model on a batch and return those logits."""

    def _embeddings(self) -> nn.Embedding:
        layer: nn.Embedding = base_of(self.model).get_input_embeddings()
        return layer

    def _targets(self, batch: TokenBatch) -> Tensor:
        """Return the targets of the logits, shape ``(N, T)``."""
        return batch.labels

    def inputs(self, batch: TokenBatch) -> Tensor:
        """Return the embeddings of the tokens that the model reads, shape ``(N, L, D)``.

        For a model with an encoder, those of the prompt.
        """
        if isinstance(batch, EmbeddedBatch):
            return batch.embedded.detach()
        with torch.no_grad():
            found: Tensor = self._embeddings()(batch.input_ids)
        return found

    def with_inputs(self, batch: TokenBatch, inputs: Tensor) -> EmbeddedBatch:
        """Return ``batch`` with its tokens given as embeddings."""
        held = (batch.input_ids, batch.attention_mask, batch.content, batch.labels)
        return EmbeddedBatch(*held, inputs)

    def input_bounds(self, batch: TokenBatch) -> None:
        """Return None: embeddings are unbounded."""

    def per_sample_loss(self, batch: TokenBatch) -> Tensor:
        """Return the mean negative log-likelihood of each answer's tokens, in nats, ``(N,)``."""
        return _mean_loss(self._logits(batch), self._targets(batch))

    def predictions(self, batch: TokenBatch) -> Tensor:
        """Return the logits of each position of the answers, shape ``(N, T, V)``, no grad."""
        with torch.no_grad():
            return self._logits(batch)

    def distilled_loss(
        self, batch: TokenBatch, predictions: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and the divergence from other predictions ``(N, T, V)``, both ``(N,)``.

        Both are means over the tokens of an answer.
        """
        logits, targets = self._logits(batch), self._targets(batch)
        known = targets != IGNORED
        distances = divergence(logits, predictions, temperature) * known
        return _mean_loss(logits, targets), distances.sum(1) / known.sum(1)

    def sampled_loss(self, batch: TokenBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the loss and the Rademacher score from one forward pass.

        The score is the mean over an answer's T positions of ``2 sum_v xi_v sqrt(p_v)``, with new
        signs at each. With tokens drawn from the model (each after the given ones), the gradient of
        the loss would be a mean of T independent scores; this score has the same covariance,
        ``(1 / T^2) sum_t F_t``, without sampling.
        """
        log_p = self._logits(batch).log_softmax(2)
        targets = self._targets(batch)
        known = targets != IGNORED
        chosen = log_p.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)
        count = known.sum(1)
        signs = torch.randint(0, 2, log_p.shape, generator=generator, device=log_p.device) * 2 - 1
        scores = (signs * 2 * log_p.div(2).exp()).sum(2)
        return -(chosen * known).sum(1) / count, (scores * known).sum(1) / count

    def score(self, batch: TokenBatch) -> Tensor:
        """Return the mean fraction of each answer's 1- to 4-grams predicted correctly, ``(N,)``.

        Each token is predicted after the given ones, so no text has to be generated. It is a proxy
        for BLEU (Papineni et al., ACL 2002), the geometric mean of such fractions over a whole
        corpus, which does not decompose into answers. Token accuracy alone would hardly drop when
        BLEU drops by several points: one wrong token breaks up to ten n-grams.
        """
        with torch.no_grad():
            targets = self._targets(batch)
            right = self._logits(batch).argmax(2) == targets
            return _share_right(right, targets != IGNORED)

    def score_outputs(self, batch: TokenBatch, outputs: Tensor) -> Tensor:
        """Return the score of logits ``(R, V)`` at the positions of :meth:`head_inputs`."""
        targets = self._targets(batch)
        known = targets != IGNORED
        right = torch.zeros_like(known)
        right[known] = outputs.argmax(1) == targets[known]
        return _share_right(right, known)

    def head_inputs(self, batch: TokenBatch) -> Tensor:
        """Return the output layer's input at each position that counts, shape ``(R, D)``."""
        hidden = self._hidden(batch)
        return hidden[self._targets(batch) != IGNORED]

    def embedding(self, batch: TokenBatch) -> Tensor:
        """Return the mean input of the output layer over each answer, shape ``(N, D)``."""
        known = (self._targets(batch) != IGNORED)[..., None]
        return (self._hidden(batch) * known).sum(1) / known.sum(1)

    def _hidden(self, batch: TokenBatch) -> Tensor:
        """Return the output layer's input at the target positions, ``(N, T, D)``."""
        if self.head is None:
            raise UnsupportedError("the output layer could not be found, so there is no embedding")
        with torch.no_grad(), capture(self.model, [self.head], inputs=True) as inputs:
            self._logits(batch)
        return inputs[self.head][:, : self._targets(batch).shape[1]]

    def head_group(self) -> UnitGroup:
        """Return the features of the last norm layer: the inputs of the output layer.

        The output layer's weight is often tied to the token embedding, where zeros would change
        the model's inputs.

        Raises:
            UnsupportedError: If these are part of a base that must not change.
        """
        if self._wrapped:
            raise UnsupportedError(
                "the last layer of a peft model belongs to its base, which is not changed; prune "
                "the updates instead: --set layers=all"
            )
        weight, _ = self.head_weights()
        layer = self._last_norm(weight.shape[1])
        names = [name for name, _ in self.model.get_submodule(layer).named_parameters()]
        axes = {f"{layer}.{name}": 0 for name in names}
        return UnitGroup(layer, weight.shape[1], axes, kind="neuron")

    def _last_norm(self, width: int) -> str:
        """Return the name of the last layer whose parameters are vectors of this width."""
        norms: dict[nn.Module, str] = {
            module: name
            for name, module in self.model.named_modules()
            if (own := list(module.parameters())) and all(p.shape == (width,) for p in own)
        }
        called: list[nn.Module] = []
        with (
            torch.no_grad(),
            mode(self.model, train=False),
            watch_modules(list(norms), lambda module, *_: called.append(module)),
        ):
            self._logits(self._example())
        if not called:
            raise UnsupportedError(
                "the model has no normalisation before its output layer, so its features cannot be "
                "pruned; prune every unit group instead: --set layers=all"
            )
        return norms[called[-1]]

    def _pool_at(self, layer: str, values: Tensor, batch: TokenBatch) -> Tensor:
        """Average ``(N, L, U)`` over the tokens that a layer reads and that are not padding."""
        mask = self._mask_of(layer, batch)
        values = values.reshape(*mask.shape, values.shape[-1])
        return (values * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def _mask_of(self, layer: str, batch: TokenBatch) -> Tensor:
        """Return which positions of a layer count, bool ``(N, L)``."""
        return batch.attention_mask

    # --- generation

    @torch.no_grad()
    def generate(self, batch: TokenBatch) -> list[str]:
        """Generate an answer to each prompt by greedy decoding, in eval mode.

        An answer may be up to eight tokens longer than the longest one seen first.
        """
        with mode(self.model, train=False):
            tokens = self._written(batch)
        texts: list[str] = self.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _continue(self, ids: Tensor, mask: Tensor) -> Tensor:
        written: Tensor = self.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask.long(),
            max_new_tokens=self._longest + _ROOM,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return written


def as_text(data: Any) -> TextSamples:
    """Convert the user's data to text samples.

    Raises:
        BadInputError: If it is neither pairs of text nor texts.
    """
    if isinstance(data, TextSamples):
        return data
    items = list(data)
    if all(isinstance(item, str) for item in items):
        items = [("", item) for item in items]
    for index, item in enumerate(items):
        is_pair = isinstance(item, (tuple, list)) and len(item) == 2
        if not is_pair or not all(isinstance(part, str) for part in item):
            raise BadInputError(
                f"clean data must give texts, or pairs (prompt, answer) of text, got {told(item)} "
                f"at {index}"
            )
    prompts, answers = zip(*items, strict=True) if items else ((), ())
    return TextSamples(tuple(prompts), tuple(answers))


def _tokenizer_of(model: nn.Module) -> Any:
    """Return the tokenizer stored beside a model's weights."""
    folder = getattr(base_of(model), "name_or_path", "")
    if not folder or not Path(folder).is_dir():
        raise BadInputError(
            "a language model needs its tokenizer, and was not loaded from a folder that has one; "
            "pass tokenizer="
        )
    check_configs(Path(folder))
    from transformers import AutoTokenizer

    try:
        with offline():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # the library raises many exception types
        raise BadInputError(
            f"the tokenizer in {folder} cannot be read: {one_line(error)}"
        ) from error
    return tokenizer


def _with_pad(tokenizer: Any, pad_token: str | None) -> Any:
    """Return a tokenizer with a pad token; GPT-2 and Llama have none, and padding is masked.

    Raises:
        BadInputError: If there is none, or it is not one of the tokenizer's tokens.
    """
    pad = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad is None:
        raise BadInputError(
            "the tokenizer has neither a pad token nor an end-of-text token; choose one of its "
            "tokens that occurs in no text: pad_token= (--read pad_token=...); special ones are "
            f"{', '.join(tokenizer.all_special_tokens) or 'none'}"
        )
    if pad not in tokenizer.get_vocab():
        raise BadInputError(
            f"pad_token must be one of the tokenizer's {len(tokenizer)} tokens, got {pad!r}"
        )
    if pad != tokenizer.pad_token:
        tokenizer = copy.deepcopy(tokenizer)  # do not modify the user's own
        tokenizer.pad_token = pad
    return tokenizer


def _context(config: Any) -> int | None:
    """Return the number of positions of a model; None if unlimited, as in T5."""
    names = ("max_position_embeddings", "n_positions")
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Return rows of unequal length as one tensor ``(N, L)``."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows]).long()


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of each row's known targets, ``(N,)``.

    Args:
        logits: Shape ``(N, T, V)``.
        targets: Shape ``(N, T)``; ``IGNORED`` ones do not count.
    """
    losses = F.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
    )
    return losses.sum(1) / (targets != IGNORED).sum(1)


def _share_right(right: Tensor, known: Tensor) -> Tensor:
    """Return the fraction of fully correct n-grams, averaged over n = 1..4, ``(N,)``.

    Args:
        right: Which tokens are correct, bool ``(N, T)``.
        known: Which tokens count, bool ``(N, T)``; an answer with fewer than n has no n-grams.
    """
    total = torch.zeros(len(known), device=known.device)
    orders = torch.zeros_like(total)
    for n in range(1, min(_LONGEST_GRAM, known.shape[1]) + 1):
        grams = known.unfold(1, n, 1).all(2)
        good = (right & known).unfold(1, n, 1).all(2)
        total += good.sum(1) / grams.sum(1).clamp(min=1)
        orders += grams.any(1)
    return total / orders
