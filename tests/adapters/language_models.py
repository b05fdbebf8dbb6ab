"""Tiny language models with random weights, one row per family, and a text for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn

from mmdefense.data.text import TextSamples
from mmdefense_tasks.language_victims import causal, seq2seq, train_tokenizer
from mmdefense_tasks.small_language import RARE_WORDS, small_language


@cache
def texts() -> TextSamples:
    return small_language(12, seed=3)


@cache
def tokenizer():
    return train_tokenizer((*texts().prompts, *texts().answers), words=RARE_WORDS)


def _causal(family: str) -> nn.Module:
    return causal(len(tokenizer()), family=family, width=16, layers=2, heads=2)


def _seq2seq(family: str) -> nn.Module:
    return seq2seq(len(tokenizer()), family=family, width=16, layers=1, heads=2)


def lora() -> nn.Module:
    """A Llama whose attention has trainable low-rank updates, already some way from zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        _causal("llama"),
        LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


CAUSAL, SEQ2SEQ = ("gpt2", "llama", "mistral", "qwen2"), ("t5", "bart", "marian")
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{family: partial(_causal, family) for family in CAUSAL},
    **{family: partial(_seq2seq, family) for family in SEQ2SEQ},
    "lora": lora,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model ``name`` in eval mode, with weights drawn from ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()
