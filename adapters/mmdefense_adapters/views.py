"""How clean samples are augmented in training, and whether they may be mirrored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch

from mmdefense.data.batch import Batch, Samples, Views, few
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import in_parts

__all__ = ["may_mirror", "with_augmentation"]

B = TypeVar("B", bound=Batch)

_SAMPLES = 256
_LOST = 0.05
"""Largest drop of the score on mirrored samples for mirroring to be used. Both ours."""


def with_augmentation(
    adapter: TaskAdapter[B],
    samples: Samples[B],
    views: Views,
    *,
    standard: Callable[..., Any] | None,
    insertions: Callable[..., Any],
    mirrored: Callable[[B], B] | None = None,
) -> Samples[B]:
    """Return samples with the augmentation requested by ``views``.

    Args:
        adapter: The model.
        samples: Of a class with the field ``augmentation``; others, and those with an augmentation
            already set, keep their own as standard views.
        views: Which augmentation to use.
        standard: The usual augmentation of the domain; None for no augmentation.
        insertions: The augmentation that also inserts noise, points or words.
        mirrored: Returns a batch mirrored left to right. Both augmentations then get ``flip``, see
            :func:`may_mirror`; None disables mirroring.

    Raises:
        UnsupportedError: If the samples have no ``augmentation`` to replace.
    """
    if not hasattr(samples, "augmentation"):
        if views == "standard":
            return samples
        raise UnsupportedError(
            f"views={views!r} needs samples with the field augmentation, and "
            f"{type(samples).__name__} has none; set views=standard"
        )
    if views == "standard" and samples.augmentation is not None:
        return samples
    chosen = {"standard": standard, "insertions": insertions, "none": None}[views]
    if mirrored is not None and chosen is not None:
        chosen = partial(chosen, flip=may_mirror(adapter, samples, mirrored))
    augmented: Samples[B] = replace(cast("Any", samples), augmentation=chosen)
    return augmented


@torch.no_grad()
def may_mirror(adapter: TaskAdapter[B], samples: Samples[B], mirrored: Callable[[B], B]) -> bool:
    """Return whether the model scores about as well on mirrored samples as on the originals.

    So signs and digits, whose left and right matter, are automatically not mirrored.

    Args:
        adapter: The model.
        samples: Clean samples; at most 256 are used.
        mirrored: Returns a batch mirrored left to right.
    """
    part = few(samples, _SAMPLES)
    batch = part.take(torch.arange(len(part)))
    with mode(adapter.model, train=False):
        as_given, turned = (
            torch.cat(list(in_parts(adapter.score, each, "scoring", adapter.model))).mean()
            for each in (batch, mirrored(batch))
        )
    return bool(turned >= as_given - _LOST)
