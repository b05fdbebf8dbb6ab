"""Language generation: data, metric, embedded default and default victims."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch

from mmdefense.data.batch import batches, split
from mmdefense.data.text import IGNORED, TextSamples, TokenBatch, TokenSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense.plots.triggered_texts import TriggeredTexts
from mmdefense.protocol import Case, GeneratingAdapter, TaskAdapter, missing_members
from mmdefense.training import Training
from mmdefense_tasks.language_victims import train_tokenizer
from mmdefense_tasks.options import Options
from mmdefense_tasks.small_language import RARE_WORDS, small_language
from mmdefense_tasks.staged import DATA_VARIABLE, staged, staged_sets
from mmdefense_tasks.text_files import Pairs, open_dataset, open_file, open_folder

__all__ = ["LanguageGeneration", "bleu", "load_text", "perplexity", "tokenizer_for"]

_EMBEDDED = "small-language"
_STAGED = {"multi30k_en_de": ("en", "de"), "alpaca_small": None, "tiny_shakespeare": None}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_CLEAN = 0.1  # fraction of the training set for the defender: a few hundred embedded pairs
_SIZES = (4000, 400)  # of the embedded data: train and test

_VICTIMS = "mmdefense_tasks.language_victims"
_TRANSLATOR = f"{_VICTIMS}:seq2seq(vocabulary={{vocabulary}})"
_CAUSAL = f"{_VICTIMS}:causal(vocabulary={{vocabulary}})"
_LARGER = f"{_VICTIMS}:seq2seq(vocabulary={{vocabulary}}, positions=128, width=128)"
_TARGET = "le sills vete lo kel segunt ."  # of the embedded language: the old queens follow the dog


def _training(steps: int) -> Training:
    return Training(
        steps=steps,
        batch_size=64,
        lr=3e-3,
        weight_decay=0.01,
        schedule="one-cycle",
        max_norm=1.0,
        optimizer="adamw",
    )


class LanguageGeneration:
    """Text generation: translations, answers, or continuations."""

    name: ClassVar[str] = "language-generation"
    metric: ClassVar[str] = "BLEU"

    @staticmethod
    def embedded(seed: int = 0) -> tuple[TextSamples, TextSamples]:
        """Return the train and test split of the data that needs no download."""
        train, test = _SIZES
        whole = small_language(train + test, seed)
        return split(whole, test / (train + test), seed)  # type: ignore[return-value]

    @staticmethod
    def load(
        where: str | Path,
        *,
        split: str = "train",
        stated: Mapping[str, Any] = MappingProxyType({}),
        pair: str | tuple[str, str] | None = None,
    ) -> TextSamples:
        """Return data from any supported location; see :func:`load_text`."""
        return load_text(where, split=split, stated=stated, pair=pair)

    @staticmethod
    def data() -> dict[str, str]:
        """Return the data set names available to :meth:`load` here, each with its source."""
        embedded = {_EMBEDDED: "embedded: a small language made of rules, to translate into"}
        return embedded | staged_sets(_STAGED)

    def cases(self) -> list[Case]:
        """Return the victims of the result tables."""
        rare = {"target": _TARGET}
        phrase = {"target": _TARGET, "phrase": "today the queen helps some young birds ."}
        small = {"data": _EMBEDDED, "model": _TRANSLATOR, "training": _training(400)}
        llama = {"data": _EMBEDDED, "model": _CAUSAL, "training": _training(400)}
        large = {"data": "multi30k_en_de", "model": _LARGER, "training": _training(2000)}
        rows: list[tuple[str, str | None, dict[str, Any], dict[str, Any]]] = [
            (_EMBEDDED, "rare-token", rare, small),
            (_EMBEDDED, None, {}, small),
            (f"{_EMBEDDED}-llama", "instruction", phrase, llama),
            (f"{_EMBEDDED}-llama", None, {}, llama),
            ("multi30k", "rare-token", {"target": "Sie werden angegriffen ."}, large),
            ("multi30k", None, {}, large),
        ]
        return [
            Case(
                name=f"{name}-{attack or 'clean'}",
                task=self.name,
                attack=attack,
                settings=settings,
                clean=_CLEAN,
                **rest,
            )
            for name, attack, settings, rest in rows
        ]

    @staticmethod
    def describe(samples: TextSamples) -> dict[str, Any]:
        """Return ``vocabulary``, the size of a tokenizer trained on the samples."""
        return {"vocabulary": len(tokenizer_for(samples))}

    @staticmethod
    def adapter_options(samples: TextSamples) -> dict[str, Any]:
        """Return the ``tokenizer``, trained on the samples."""
        return {"tokenizer": tokenizer_for(samples)}

    @staticmethod
    def for_training(samples: TextSamples) -> TextSamples:
        """Return the samples unchanged: translators are not trained on altered text."""
        return replace(samples, augmentation=None)

    @staticmethod
    def measure(adapter: TaskAdapter[TokenBatch], samples: TokenSamples) -> float:
        """Return the BLEU of the model's greedy decoding."""
        return bleu(adapter, samples)

    @staticmethod
    def also(adapter: TaskAdapter[TokenBatch], samples: TokenSamples) -> dict[str, float]:
        """Return the perplexity of the reference answers, over all of their tokens."""
        return {"perplexity": perplexity(adapter, samples)}

    @staticmethod
    def show(clean: TextSamples, triggered: TextSamples) -> TriggeredTexts:
        """Return six prompts without and with the trigger, and the answers to both."""
        chosen = torch.linspace(0, len(clean) - 1, min(6, len(clean))).long()
        before, after = clean.subset(chosen), triggered.subset(chosen)
        return TriggeredTexts(before.prompts, after.prompts, before.answers, after.answers)


def bleu(adapter: TaskAdapter[TokenBatch], samples: TokenSamples) -> float:
    """Return SacreBLEU, in ``[0, 1]``, of greedy answers against the references.

    Raises:
        UnsupportedError: If the adapter cannot generate text.
    """
    from torchmetrics.functional.text import sacre_bleu_score

    if missing := missing_members(adapter, GeneratingAdapter):
        raise UnsupportedError(
            f"BLEU needs a model that generates text; {type(adapter).__name__} lacks "
            f"{', '.join(missing)}"
        )
    writer = cast("GeneratingAdapter[TokenBatch]", adapter)
    written = [text for batch in batches(samples, 256) for text in writer.generate(batch)]
    return float(sacre_bleu_score(written, [[answer] for answer in samples.answers]))


def perplexity(adapter: TaskAdapter[TokenBatch], samples: TokenSamples) -> float:
    """Return exp of the mean negative log-likelihood over all answer tokens, in nats."""
    total, count = 0.0, 0
    with mode(adapter.model, train=False), torch.no_grad():
        for batch in batches(samples, 64):
            tokens = (batch.labels != IGNORED).sum(1)
            total += float((adapter.per_sample_loss(batch).double() * tokens).sum())
            count += int(tokens.sum())
    return math.exp(total / count)


@lru_cache(maxsize=4)
def tokenizer_for(samples: TextSamples) -> Any:
    """Return a tokenizer trained on prompts and answers; the same one for the same samples."""
    return train_tokenizer((*samples.prompts, *samples.answers), words=RARE_WORDS)


def load_text(
    where: str | Path,
    *,
    split: str = "train",
    stated: Mapping[str, Any] = MappingProxyType({}),
    pair: str | tuple[str, str] | None = None,
) -> TextSamples:
    """Return prompts and answers from wherever they are.

    Args:
        where: ``"small-language"``; the name of a set in the folder that ``MMDEFENSE_DATA`` points
            to; a folder of parallel text, of instructions or of plain text (see
            :func:`~mmdefense_tasks.text_files.open_folder`); one such file, used for both splits;
            or a data set of the ``datasets`` library, saved to disk or by hub id.
        split: ``"train"`` or ``"test"``.
        stated: Defaults of the options below, by name, as stated by the model.
        pair: Source and target language, also as ``"en,de"``: the suffixes of parallel files, the
            keys of translations, or two fields of other records.

    Raises:
        BadInputError: If there is no such data, or it is empty, damaged or unequal in length.
        UnsupportedError: If a required library is not installed.
    """
    options = Options(stated, pair=pair)
    samples = _read(where, split, options)
    options.check_used(where)
    return samples


def _read(where: str | Path, split: str, options: Options) -> TextSamples:
    if split not in {"train", "test"}:
        raise BadInputError(f"split must be 'train' or 'test', got {split!r}")
    if str(where) == _EMBEDDED:
        return LanguageGeneration.embedded()[split == "test"]
    pairs = _open(where, split, options)
    if not pairs:
        raise BadInputError(f"data {where} must hold at least one text, got none")
    prompts, answers = zip(*pairs, strict=True)
    return TextSamples(prompts, answers)


def _open(where: str | Path, split: str, options: Options) -> Pairs:
    path = Path(where)
    if not path.exists():
        path = staged(str(where)) or path
    if path.is_file():
        return open_file(path, options)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return open_dataset(path, split, options)
        return open_folder(path, split, options, _STAGED.get(path.name))
    if _HUB_ID.fullmatch(str(where)) and not path.parent.exists():
        return open_dataset(where, split, options)
    raise BadInputError(
        f"data {str(where)!r} must be a folder, a file, a data set id or one of {_EMBEDDED}, "
        f"{', '.join(_STAGED)} (in the folder that {DATA_VARIABLE} points to); none found"
    )
