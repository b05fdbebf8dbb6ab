"""A model and its clean data, checked once; what comes after the door takes both as they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from mmdefense.checkpoints.weights import check_finite, hash_weights
from mmdefense.data.batch import Batch, Samples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import scores
from mmdefense.kernels.precision import in_float32
from mmdefense.protocol import TaskAdapter
from mmdefense.shown import Shown

__all__ = ["Prepared", "prepare"]

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, repr=False)
class Prepared(Shown, Generic[B]):
    """A model and clean data that fit each other; made by :func:`prepare`.

    Attributes:
        model: The given model, which nobody changes.
        adapter: Around it; where it has weights in half precision, around a copy in float32.
        samples: The clean data as the adapter reads it.
    """

    model: nn.Module
    adapter: TaskAdapter[B]
    samples: Samples[B]

    @cached_property
    def scores(self) -> Tensor:
        """Each sample's share of the task metric under the given model, shape ``(N,)``."""
        return scores(self.adapter, self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of the samples' content."""
        return self.samples.fingerprint()

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the given model's weights and buffers."""
        return hash_weights(self.model)


def prepare(
    adapter: TaskAdapter[B], clean: Any, *, finite: bool = False, to_learn: bool = True
) -> Prepared[B]:
    """Check a model and clean data, with one forward pass on a few samples.

    Args:
        adapter: The model in its adapter.
        clean: Clean samples, in any form that ``adapter.samples`` reads.
        finite: Whether the weights are known to be finite, as those that
            :func:`~mmdefense.checkpoints.models.load_model` returns are.
        to_learn: Whether there must be at least one sample per class.

    Raises:
        BadInputError: If a weight is not finite, the model cannot read the data, or there is not
            enough of it.
    """
    if not finite:
        check_finite(adapter.model.state_dict(), type(adapter.model).__name__)
    wide = in_float32(adapter)
    samples = wide.samples(clean)
    classes = round(1 / wide.chance)
    if to_learn and samples.strata() is not None and len(samples) < classes:
        raise BadInputError(
            f"clean data must hold at least one sample per class ({classes}), got {len(samples)}"
        )
    return Prepared(adapter.model, wide, samples)
