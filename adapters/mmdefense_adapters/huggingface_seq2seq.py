"""Sequence-to-sequence language models of ``transformers``: T5, BART, Marian and similar."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from mmdefense.data.text import IGNORED, TokenBatch
from mmdefense_adapters.huggingface_text import HFText
from mmdefense_adapters.peft_models import base_of

__all__ = ["HFSeq2SeqLM"]


class HFSeq2SeqLM(HFText):
    """Wraps an encoder that reads the prompt, and a decoder that writes the answer."""

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    shared: ClassVar[bool] = False

    @classmethod
    def _names(cls) -> set[str]:
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as NAMES,
        )

        return set(NAMES.values())

    def _row(
        self, prompt: list[int], answer: list[int]
    ) -> tuple[list[int], list[int], tuple[int, int]]:
        return [*prompt, *self._end], [*answer, *self._end], (0, len(prompt))

    def _embeddings(self) -> nn.Embedding:
        layer: nn.Embedding = base_of(self.model).get_encoder().get_input_embeddings()
        return layer

    def _run(self, batch: TokenBatch) -> Tensor:
        base = base_of(self.model)
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            decoder_input_ids=base.prepare_decoder_input_ids_from_labels(labels=batch.labels),
            use_cache=False,
        )
        return output.logits  # type: ignore[no-any-return]

    def _mask_of(self, layer: str, batch: TokenBatch) -> Tensor:
        if "encoder" in layer.split("."):
            return batch.attention_mask
        return batch.labels != IGNORED

    def _written(self, batch: TokenBatch) -> Tensor:
        return self._continue(batch.input_ids, batch.attention_mask)[
            :, 1:
        ]  # without the start token

    def _answered(self, batch: TokenBatch, answers: Tensor) -> TokenBatch:
        return replace(batch, labels=answers)
