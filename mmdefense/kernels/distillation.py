"""The loss of distillation: labels, and what another model predicts for the same samples.

References:
    Hinton, Vinyals, Dean. *Distilling the Knowledge in a Neural Network*. 2015. arXiv:1503.02531
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from mmdefense.data.batch import Batch
from mmdefense.kernels.hooks import mode
from mmdefense.protocol import DistillingAdapter, TaskAdapter

__all__ = ["distilled"]

B = TypeVar("B", bound=Batch)


def distilled(
    adapter: DistillingAdapter[B], teacher: DistillingAdapter[B], share: float, temperature: float
) -> TaskAdapter[B]:
    """Return ``adapter`` with ``(1 - share) loss + share distance`` as its loss.

    The distance is that of :meth:`~mmdefense.protocol.DistillingAdapter.distilled_loss` to what the
    teacher predicts in eval mode. The model is the same object, and so is everything else but the
    loss, so that each kernel that trains can train on it.

    Args:
        adapter: The model to train.
        teacher: A model with the same outputs, which is not changed.
        share: Weight of the distance, in ``[0, 1]``.
        temperature: Divides the logits of both models.
    """
    return cast("TaskAdapter[B]", _Distilled(adapter, teacher, share, temperature))


class _Distilled(Generic[B]):
    """An adapter with another loss; see :func:`distilled`."""

    def __init__(
        self,
        adapter: DistillingAdapter[B],
        teacher: DistillingAdapter[B],
        share: float,
        temperature: float,
    ) -> None:
        self._adapter, self._teacher = adapter, teacher
        self._share, self._temperature = share, temperature

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def per_sample_loss(self, batch: B) -> Tensor:
        with mode(self._teacher.model, train=False):
            wanted = self._teacher.predictions(batch)
        loss, distance = self._adapter.distilled_loss(batch, wanted, self._temperature)
        return (1 - self._share) * loss + self._share * distance
