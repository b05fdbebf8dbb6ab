"""Every family of models that an adapter serves, each with data: the rows of the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import cloud_models
import detectors
import language_models
import models
import torch
import torch.nn.functional as F
import video_models
from torch import Tensor, nn

from mmdefense.data.labelled import LabelledBatch
from mmdefense.kernels.hooks import mode
from mmdefense.registry import adapt

N = 5


@dataclass(frozen=True)
class Family:
    """How to try an adapter on one family of models.

    Attributes:
        adapter: The name of the adapter that must serve it.
        wrap: Returns an adapter around a new model of random weights, the same every time.
        data: Returns ``N`` samples for such an adapter, as a user gives them.
        wrong: Returns data that the adapter must refuse, each with a part of what it says.
        training_loss: What the model's library or PyTorch gives for each sample of a batch,
            ``(N,)``; none where the library draws at random.
    """

    adapter: str
    wrap: Callable[[], Any]
    data: Callable[[Any], Any]
    wrong: Callable[[Any], dict[str, Any]]
    training_loss: Callable[[Any, Any], Tensor] | None

    @property
    def classifies(self) -> bool:
        """Whether a sample has one label, and the model a logit for each class."""
        return self.training_loss is _cross_entropy


def _wrong_labelled(data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    inputs, labels = data
    return {
        "labels must lie in 0..": (inputs, labels + 100),
        "NaN": (inputs * float("nan"), labels),
        "at least one": [],
        "pairs": [3],
        "shape": (inputs[:, 0, 0], labels),
    }


def _cross_entropy(adapter: Any, batch: LabelledBatch) -> Tensor:
    return F.cross_entropy(adapter.logits(batch.inputs), batch.labels, reduction="none")


def _labelled(adapter: str, wrap: Callable[[], Any], inputs: Callable[[Any], Tensor]) -> Family:
    def data(made: Any) -> tuple[Tensor, Tensor]:
        return inputs(made), torch.arange(N) % 4

    return Family(
        adapter, wrap, data, lambda made: _wrong_labelled(data(made)), training_loss=_cross_entropy
    )


def _image(name: str) -> Family:
    def images(count: int, seed: int) -> Tensor:
        shape = (count, 3, models.SIDE, models.SIDE)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

    def wrap() -> Any:
        scaling = {"mean": [0.5] * 3, "std": [0.25] * 3}
        return adapt(models.build(name), **scaling, example=images(1, seed=1))

    adapter = "huggingface-image" if name.startswith("hf-") else "torch-classifier"
    return _labelled(adapter, wrap, lambda _: images(N, seed=2))


def _video(name: str) -> Family:
    def clips(count: int, seed: int) -> Tensor:
        shape = (count, 3, video_models.FRAMES, video_models.SIDE, video_models.SIDE)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

    def wrap() -> Any:
        scaling = {"mean": [0.5] * 3, "std": [0.25] * 3}
        return adapt(video_models.build(name), **scaling, example=clips(1, seed=1))

    adapter = "huggingface-video" if name.startswith("hf-") else "torch-video"
    return _labelled(adapter, wrap, lambda _: clips(N, seed=2))


def _points(name: str) -> Family:
    def wrap() -> Any:
        model = cloud_models.build(name)
        options = {"channels_first": True} if name == "channels-first" else {}
        example = cloud_models.clouds_for(model, 1, seed=1)
        return adapt(model, adapter="points", example=example, **options)

    return _labelled("points", wrap, lambda made: cloud_models.clouds_for(made.model, N))


def library_loss(adapter: Any, batch: Any) -> Tensor:
    """Return what the library of a detector itself gives for a batch, its layers in eval mode."""
    if hasattr(adapter, "offset"):  # of torchvision
        targets = [
            {"boxes": boxes, "labels": labels + adapter.offset}
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
        with mode(adapter.model, train=False):
            adapter.model.training = True
            return sum(adapter.model(list(batch.images), targets).values())
    targets = []
    for boxes, labels in zip(batch.boxes, batch.labels, strict=True):
        centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        boxes = torch.cat([centre, side], 1) / detectors.SIDE
        targets.append({"class_labels": labels, "boxes": boxes})
    return adapter.model(pixel_values=batch.images, labels=targets).loss


def _loss_of_each_image(adapter: Any, batch: Any) -> Tensor:
    alone = [library_loss(adapter, batch.rows(slice(n, n + 1))) for n in range(len(batch))]
    return torch.stack(alone)


def _detector(name: str) -> Family:
    def wrong(_: Any) -> dict[str, Any]:
        samples = detectors.images()
        unknown = tuple(labels + 100 for labels in samples.labels)
        return {
            "labels must lie in 0..2": replace(samples, labels=unknown),
            "NaN": replace(samples, images=samples.images * float("nan")),
            "at least one image": [],
            "pairs": [(samples.images[0], 1)],
            "one size": [(torch.rand(3, s, s), {"boxes": [], "labels": []}) for s in (16, 32)],
        }

    return Family(
        "torchvision-detection" if name in detectors.TORCHVISION else "huggingface-detection",
        lambda: adapt(detectors.build(name), example=detectors.images().images[:1]),
        lambda _: detectors.images(),
        wrong,
        training_loss=None if name == "faster-rcnn" else _loss_of_each_image,
    )


def _loss_of_each_text(adapter: Any, batch: Any) -> Tensor:
    """Return the library's loss of each sequence without its padding."""
    losses = []
    for ids, stands, labels in zip(
        batch.input_ids, batch.attention_mask, batch.labels, strict=True
    ):
        wanted = labels[stands] if adapter.shared else labels[labels >= 0]
        losses.append(adapter.model(input_ids=ids[stands][None], labels=wanted[None]).loss)
    return torch.stack(losses)


def _language(name: str) -> Family:
    def wrong(adapter: Any) -> dict[str, Any]:
        samples = adapter.samples(language_models.texts().subset(torch.arange(N)))
        beyond = samples.tokens.input_ids + len(language_models.tokenizer())
        return {
            "the model's vocabulary": replace(
                samples, tokens=replace(samples.tokens, input_ids=beyond)
            ),
            "at least one text": [],
            "pairs (prompt, answer)": [("a", 3)],
        }

    return Family(
        "huggingface-seq2seq" if name in language_models.SEQ2SEQ else "huggingface-causal",
        lambda: adapt(language_models.build(name), tokenizer=language_models.tokenizer()),
        lambda _: language_models.texts().subset(torch.arange(N)),
        wrong,
        training_loss=_loss_of_each_text,
    )


def _named(rows: dict[str, Callable[[], nn.Module]], row: Callable[[str], Family]) -> Any:
    return {name: row(name) for name in rows}


FAMILIES: dict[str, Family] = {
    **_named(models.MODELS, _image),
    **_named(video_models.MODELS, _video),
    **_named(cloud_models.MODELS, _points),
    **_named(detectors.MODELS, _detector),
    **_named(language_models.MODELS, _language),
}
assert len(FAMILIES) == sum(
    len(kind.MODELS) for kind in (models, video_models, cloud_models, detectors, language_models)
)
