"""Options that a reader does not use, and data of the hub that is not to be had."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from everyday.labels import refused

from mmdefense.registry import adapt
from mmdefense_tasks.image_classification import load_data


def without_datasets(where: str) -> Any:
    with patch.dict("sys.modules", {"datasets": None}):
        return load_data(where)


def offline(where: str) -> Any:
    with patch("datasets.load_dataset", side_effect=ConnectionError("no network")):
        return load_data(where)


HUB = [
    refused(
        "a hub id without its owner, without the library",
        lambda _: without_datasets("beans"),
        "AI-Lab-Makerere/beans needs .*datasets",
        3,
    ),
    refused(
        "a hub id without its owner, without a network",
        lambda _: offline("beans"),
        "AI-Lab-Makerere/beans cannot be loaded: no network",
    ),
    refused(
        "a name that may be a hub id without its owner",
        lambda _: load_data("bean"),
        r"a data set of the Hugging Face hub \(OWNER/NAME\), .* none found",
    ),
]


def text_adapter(kind: str) -> Any:
    """Return an adapter of a small language model, with a separator."""
    from mmdefense_tasks import language_victims as victims

    tokenizer = victims.train_tokenizer(["a b", "b a"])
    family = {"seq2seq": "t5", "causal": "gpt2"}[kind]
    model = getattr(victims, kind)(len(tokenizer), family=family, width=8, layers=1, heads=1)
    return adapt(model, tokenizer=tokenizer, separator=" = ")


OPTIONS = [
    refused(
        "a size for data that has one size alone",
        lambda _: load_data("digits", image_size=8),
        "image_size=8 has no effect on digits",
    ),
    refused(
        "a separator for a model that has none",
        lambda _: text_adapter("seq2seq").samples([("a", "b")]),
        "separator=' = ' has no effect on a model with an encoder",
    ),
    refused(
        "a separator for texts without a prompt",
        lambda _: text_adapter("causal").samples(["a b"]),
        "separator=' = ' has no effect on texts without a prompt",
    ),
]

ROWS = [*HUB, *OPTIONS]
