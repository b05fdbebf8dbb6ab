"""The distance between what two models predict."""

from __future__ import annotations

from torch import Tensor

__all__ = ["divergence"]


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(teacher || student)`` of softmax outputs over the last axis of the logits.

    Both logits are divided by the temperature T (Hinton, Vinyals, Dean 2015, arXiv:1503.02531,
    section 2).
    """
    log_p, log_q = (logits.div(temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)
