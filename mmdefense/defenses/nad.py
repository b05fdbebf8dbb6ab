"""NAD: neural attention distillation from a fine-tuned teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmdefense.defenses.base import Purifying
from mmdefense.defenses.rate_finding import RateFindingDefense
from mmdefense.errors import UnsupportedError
from mmdefense.kernels.coordinates import Weights, trainable
from mmdefense.kernels.hooks import frozen_statistics, mode
from mmdefense.kernels.loop import Gradients, optimise, train
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.memory import gradient_in_parts
from mmdefense.settings import Count, NotNegative, Whole

__all__ = ["NAD", "attention_distance", "attention_layers"]


@dataclass(frozen=True, kw_only=True)
class NAD(RateFindingDefense):
    """Fine-tune a copy as a teacher, then train the model to attend where the teacher does.

    Minimises ``CE + beta sum_l d_l``; d_l is the squared distance between the attention maps of
    student and teacher at layer l. A map sums the squared activations over channels at each
    position, and is normalised to unit length.

    Ours: the distance is summed over positions (the released code takes their mean, so that its
    weights of 500 to 1000 mean less on larger maps); maps are taken at the outputs of units, after
    their BatchNorm and before the nonlinearity (there, at residual blocks, after it).

    Attributes:
        beta: Weight of each layer's distance.
        layers: Number of layers to compare, evenly spaced among those with several positions, the
            last one included.
        teacher_steps: Updates of the teacher; the released code uses a tenth of the student's.

    References:
        Li, Lyu, Koren, Lyu, Li, Ma. *Neural Attention Distillation: Erasing Backdoor Triggers from
        Deep Neural Networks*. ICLR 2021. arXiv:2101.05930
    """

    beta: NotNegative = 20.0
    layers: Count = 3
    teacher_steps: Whole = 50

    def _run(self, work: Purifying[Any]) -> None:
        adapter, teacher = work.adapter, work.adapter.fork()
        plan = replace(self.training(teacher), steps=self.teacher_steps)
        train(teacher, work.fit, plan, work.run, stage="teacher")
        student = self.student(adapter)
        names = attention_layers(adapter, work.fit.take(torch.tensor([0])), self.layers)
        optimise(
            adapter.model,
            work.fit,
            self.training(adapter),
            work.run,
            gradients=self._gradients(student, teacher, names),
            stage="distil",
        )

    def _gradients(
        self, adapter: TaskAdapter[Any], teacher: TaskAdapter[Any], names: list[str]
    ) -> Gradients:
        space = Weights(trainable(adapter.model))

        def gradients(batch: Any, _: int) -> Tensor:
            def value(rows: slice) -> tuple[Tensor, Tensor]:
                part = batch.rows(rows)
                loss = adapter.per_sample_loss(part).mean()
                with torch.no_grad(), mode(teacher.model, train=False):
                    wanted = teacher.activations(part, names)
                with frozen_statistics(adapter.model):
                    distance = attention_distance(adapter.activations(part, names), wanted)
                return loss, loss + self.beta * distance.mean()

            loss, found = gradient_in_parts(
                value, len(batch), space.weights, "distilling attention", adapter.model
            )
            space.assign(found)
            return loss

        return gradients


def attention_layers(adapter: TaskAdapter[Any], batch: Any, count: int) -> list[str]:
    """Return up to ``count`` layers that have more than one position.

    Convolutions are preferred if there are enough of them: rows after a region proposal have no
    fixed position.

    Raises:
        UnsupportedError: If there is none, as in a network on vectors.
    """
    groups = list(adapter.unit_groups())
    filters = [group for group in groups if group.kind == "filter"]
    names = [group.layer for group in (filters if len(filters) >= count else groups)]
    with torch.no_grad(), mode(adapter.model, train=False):
        found = adapter.activations(batch, names)
    wide = [name for name in names if found[name].shape[1] > 1]
    if not wide:
        raise UnsupportedError(
            "attention needs a layer with several positions (pixels, frames, points, tokens), and "
            "the model has none; use another defense, such as fine-tuning"
        )
    indices = [max(0, round(len(wide) * (n + 1) / count) - 1) for n in range(count)]
    return [wide[index] for index in dict.fromkeys(indices)]


def attention_distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Return the squared distance between two models' attention maps, summed over layers, ``(N,)``.

    Args:
        student: Activations ``(N, L, C)`` by layer.
        teacher: Activations of the same layers and samples.
    """
    distances = []
    for name, values in student.items():
        maps = [F.normalize(v.square().sum(2), dim=1) for v in (values, teacher[name])]
        distances.append((maps[0] - maps[1]).square().sum(1))
    return torch.stack(distances).sum(0)
