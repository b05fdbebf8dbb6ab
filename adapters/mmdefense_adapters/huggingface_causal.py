"""Causal language models of ``transformers``: GPT-2, Llama, Qwen, Mistral and similar."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from mmdefense.data.text import IGNORED, TokenBatch
from mmdefense_adapters.huggingface_text import HFText

__all__ = ["HFCausalLM"]


class HFCausalLM(HFText):
    """Wraps a decoder: prompt, separator and answer form one sequence; the answer is predicted.

    Without a prompt there is no separator, and the whole text is predicted.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    shared: ClassVar[bool] = True

    @classmethod
    def _names(cls) -> set[str]:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return {
            name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _all(names)
        }

    def _row(
        self, prompt: list[int], answer: list[int]
    ) -> tuple[list[int], list[int], tuple[int, int]]:
        tokenizer = self.tokenizer
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        middle = self._separator() if prompt else []
        end = [*answer, *self._end]
        head = [*start, *prompt, *middle]
        content = (len(start), len(start) + len(prompt))
        return [*head, *end], [*[IGNORED] * len(head), *end], content

    def _separator(self) -> list[int]:
        ids: list[int] = self.tokenizer(self.separator, add_special_tokens=False)["input_ids"]
        return ids

    def _run(self, batch: TokenBatch) -> Tensor:
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
        )
        return output.logits[:, :-1]  # type: ignore[no-any-return]

    def _targets(self, batch: TokenBatch) -> Tensor:
        return batch.labels[:, 1:]

    def _written(self, batch: TokenBatch) -> Tensor:
        stands = (batch.labels == IGNORED) & batch.attention_mask
        # Left padding: generated tokens must follow the prompt's last token.
        order = stands.int().argsort(dim=1, stable=True)
        width = int(stands.sum(1).max())
        ids = batch.input_ids.gather(1, order)[:, -width:]
        mask = stands.gather(1, order)[:, -width:]
        pad = torch.full_like(ids, self.tokenizer.pad_token_id)
        return self._continue(torch.where(mask, ids, pad), mask)[:, width:]

    def _answered(self, batch: TokenBatch, answers: Tensor) -> TokenBatch:
        stands = torch.cat(
            [(batch.labels == IGNORED) & batch.attention_mask, answers != IGNORED], 1
        )
        order = (~stands).int().argsort(dim=1, stable=True)
        nothing = torch.full_like(batch.labels, IGNORED)
        return replace(
            batch,
            input_ids=torch.cat([batch.input_ids, answers.clamp(min=0)], 1).gather(1, order),
            attention_mask=stands.gather(1, order),
            content=torch.cat(
                [batch.content, torch.zeros_like(answers, dtype=torch.bool)], 1
            ).gather(1, order),
            labels=torch.cat([nothing, answers], 1).gather(1, order),
        )


def _all(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
