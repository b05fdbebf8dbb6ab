"""Language models to plant a backdoor in, and tokenizers trained on the given texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mmdefense.libraries import needed

__all__ = ["causal", "seq2seq", "train_tokenizer"]

PAD, START, END, UNKNOWN, BREAK = "<pad>", "<s>", "</s>", "<unk>", "<sep>"
_SPECIAL = (PAD, START, END, UNKNOWN, BREAK)
_WORD_LEVEL = 1000  # largest vocabulary with one token per word; our choice


def train_tokenizer(texts: Sequence[str], size: int = 2000, words: Iterable[str] = ()) -> Any:
    """Return a ``transformers`` tokenizer trained on ``texts``.

    If there are few different words, each is a token; otherwise BPE is used.

    Args:
        texts: Training texts.
        size: Largest BPE vocabulary.
        words: Additional words for the vocabulary, if each word is a token.

    Raises:
        UnsupportedError: If a required library is not installed.
    """
    with needed("a tokenizer"):
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
    counts = Counter(word for text in texts for word in text.split())
    counts.update(set(words) - set(counts))
    few = len(counts) <= _WORD_LEVEL
    made: Tokenizer = _word_level(counts) if few else _pieces(texts, size)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        sep_token=BREAK,
        clean_up_tokenization_spaces=False,
    )


def _word_level(counts: Counter[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*_SPECIAL, *sorted(counts)]
    vocabulary = {name: index for index, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def _pieces(texts: Sequence[str], size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def seq2seq(
    vocabulary: int,
    *,
    family: str = "marian",
    positions: int = 64,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """Return a small encoder-decoder model with random weights, of one of the library's families.

    Args:
        vocabulary: Number of tokens V.
        family: ``"marian"``, ``"bart"`` or ``"t5"``.
        positions: Longest sequence in tokens.
        width: Features D per token, a multiple of ``heads``.
        layers: Blocks of the encoder, and of the decoder.
        heads: Attention heads in each block.
        dropout: Dropout rate.
    """
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": vocabulary,
        "pad_token_id": _SPECIAL.index(PAD),
        "eos_token_id": _SPECIAL.index(END),
        "decoder_start_token_id": _SPECIAL.index(START),
    }
    if family == "t5":
        config: Any = transformers.T5Config(
            **shared,
            d_model=width,
            d_kv=width // heads,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=heads,
            dropout_rate=dropout,
        )
        return transformers.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]
    kinds = {
        "marian": (transformers.MarianConfig, transformers.MarianMTModel),
        "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
    }
    make, build = kinds[family]
    config = make(
        **shared,
        bos_token_id=_SPECIAL.index(START),
        forced_eos_token_id=None,
        max_position_embeddings=positions,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        dropout=dropout,
        activation_function="gelu",
        init_std=width**-0.5,  # the default suits models ten times as wide
        scale_embedding=True,
    )
    return build(config)  # type: ignore[no-any-return]


def causal(
    vocabulary: int,
    *,
    family: str = "llama",
    positions: int = 128,
    width: int = 64,
    layers: int = 3,
    heads: int = 4,
) -> nn.Module:
    """Return a small causal language model with random weights, of one of the library's families.

    Args:
        vocabulary: Number of tokens V.
        family: ``"gpt2"``, ``"llama"``, ``"mistral"`` or ``"qwen2"``.
        positions: Longest sequence in tokens.
        width: Features D per token, a multiple of ``heads``.
        layers: Number of blocks.
        heads: Attention heads in each block.
    """
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": vocabulary,
        "pad_token_id": _SPECIAL.index(PAD),
        "bos_token_id": _SPECIAL.index(START),
        "eos_token_id": _SPECIAL.index(END),
    }
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            **shared,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            n_inner=2 * width,
            initializer_range=width**-0.5,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    make, build = kinds[family]
    config = make(
        **shared,
        max_position_embeddings=positions,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=width**-0.5,  # the default suits models ten times as wide
    )
    return build(config)  # type: ignore[no-any-return]
