"""Clean data of classes that a victim does not know: images of another data set.

They have no right labels, so the victim itself labels them, backdoor included, as a user would do
who has nothing but images of the right size. (BackdoorBenchER, arXiv:2502.07231, goes less far: its
foreign images are of the victim's own classes, from another source, and have right labels.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdefense import registry
from mmdefense.data.batch import as_float, batches
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense.protocol import TriggerAdapter, missing_members

__all__ = ["foreign_images", "labelled_by_the_model"]


@lru_cache(maxsize=1)
def foreign_images(task: str, data: str) -> tuple[str, LabelledSamples]:
    """Return the name and the images of a data set of the task that shares no class with ``data``.

    It is the first available one in the order of ``mmdefense list data``.

    Raises:
        UnsupportedError: If ``data`` is not for image classification, or no such data set is
            available.
    """
    reader = registry.load("tasks", task)()
    own = reader.load(data, split="train").in_memory()
    if not isinstance(own, LabelledSamples) or own.inputs.ndim != 4:
        raise UnsupportedError(
            f"clean data of kind 'other' is for image classification, and {data} is not; use seen "
            "or unseen"
        )
    for name in reader.data():
        try:
            found = reader.load(name, split="train").in_memory()
        except (BadInputError, UnsupportedError):
            continue  # not available
        if found.classes and not set(found.classes) & set(own.classes):
            return name, found
    raise UnsupportedError(
        f"clean data of kind 'other' needs a data set of other classes than {data}, and none is "
        "available; `mmdefense list data` shows what is"
    )


def labelled_by_the_model(
    adapter: Any, clean: LabelledSamples, foreign: LabelledSamples, generator: torch.Generator
) -> LabelledSamples:
    """Return foreign images instead of the clean samples, as many of them, labelled by the model.

    Args:
        adapter: The model, whose predictions become the labels.
        clean: The clean samples, whose augmentation and class names are kept.
        foreign: Images, which get the size and the number of channels of the clean ones.
        generator: Draws the images.

    Raises:
        UnsupportedError: If the adapter does not return class probabilities.
    """
    if missing := missing_members(adapter, TriggerAdapter):
        raise UnsupportedError(
            f"clean data of kind 'other' is labelled by the model, and {type(adapter).__name__} "
            f"lacks {', '.join(missing)}"
        )
    chosen = torch.randperm(len(foreign), generator=generator)[: len(clean)]
    samples = replace(
        clean,
        inputs=_resized_like(clean.inputs, as_float(foreign.inputs[chosen])),
        labels=torch.zeros(len(chosen), dtype=torch.int64, device=clean.labels.device),
    )
    labels = []
    with mode(adapter.model, train=False), torch.no_grad():
        for batch in batches(adapter.samples(samples), 256):
            likely = [
                adapter.target_log_probability(batch, torch.full_like(batch.labels, target))
                for target in range(adapter.trigger_targets())
            ]
            labels.append(torch.stack(likely).argmax(0))
    return replace(samples, labels=torch.cat(labels))


def _resized_like(clean: Tensor, images: Tensor) -> Tensor:
    """Return images with the size, channels and device of ``clean``, ``(N, C, H, W)``."""
    if images.shape[1] != clean.shape[1]:  # grey, repeated over the channels of the clean ones
        images = images.mean(1, keepdim=True).expand(-1, clean.shape[1], -1, -1)
    if images.shape[-2:] != clean.shape[-2:]:
        images = F.interpolate(images, size=clean.shape[-2:], mode="bilinear", antialias=True)
    return images.clamp(0, 1).to(clean.device)
