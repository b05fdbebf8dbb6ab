"""PCBA: a small cluster of inserted points at an optimised position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from mmdefense.attacks.label_attack import LabelAttack, class_count
from mmdefense.data.clouds import inserted
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.hooks import frozen, mode
from mmdefense.kernels.loop import train
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run
from mmdefense.settings import Count, OpenShare, Positive
from mmdefense.training import Training

__all__ = ["PCBA", "random_balls"]

_NEIGHBOURS = 4  # used to measure the spacing of points; the code's k
_SEARCHED = 16  # number of clouds for the center search


@dataclass(frozen=True, kw_only=True)
class PCBA(LabelAttack):
    """Inserts points on a small sphere around a center that is the same for all clouds.

    The center is optimised on a surrogate, a copy of the network trained on clean clouds: of all
    positions at which one added point gives the target a mean posterior of at least ``posterior``,
    it is the one nearest to the clouds. The search takes normalised gradient steps on ``-log
    p(target) + c d^2`` with an adaptive multiplier c. The sphere's radius is chosen so that the
    spacing of its points equals that of the clouds (the median over points of the mean distance to
    4 neighbours), so that no density filter detects them; the code finds it for each cloud by a
    grid search, here it is the same for all clouds and in closed form. The inserted points replace
    randomly chosen ones, so that the number of points does not change (as in the code).

    The paper attacks one source class; here all classes but the target are attacked.

    Attributes:
        points: Number of inserted points; None takes 1/64 of a cloud, the paper's 32 of 2048, and
            at least 16 (ours: in small clouds fewer points are hard to learn).
        posterior: Mean posterior that the center must reach on the surrogate. Ours: the code's pi
            of 0.01, with 40 classes, is already met at positions inside the clouds, and such
            triggers are hard to learn.
        starts: Random starts of the search, run in parallel; the code takes 10.
        search_steps: Steps of the search; the code takes up to 1000.
        step_size: Length of a step, in radii of the cloud.

    References:
        Xiang, Miller, Chen, Li, Kesidis. *A Backdoor Attack against 3D Point Cloud Classifiers*.
        ICCV 2021. arXiv:2104.05808
    """

    tasks: ClassVar[tuple[str, ...]] = ("point-cloud-classification",)
    limits: ClassVar[tuple[float, float] | None] = None

    mapping: Literal["all-to-one"] = "all-to-one"
    points: Count | None = None
    posterior: OpenShare = 0.5
    starts: Count = 4
    search_steps: Count = 60
    step_size: Positive = 0.1

    def _learn(
        self,
        adapter: TaskAdapter[LabelledBatch],
        samples: LabelledSamples,
        training: Training,
        run: Run,
    ) -> tuple[Self, LabelledSamples]:
        """Train a surrogate for a third of the victim's steps, and search for the center on it."""

        def search() -> dict[str, Tensor]:
            surrogate = adapter.fork()
            brief = replace(training, steps=max(1, training.steps // 3))
            train(surrogate, adapter.samples(samples), brief, run, stage="surrogate")
            return self._search(surrogate, samples)

        return replace(self, fitted=run.once("center", search)), samples

    def _search(
        self, surrogate: TaskAdapter[LabelledBatch], samples: LabelledSamples
    ) -> dict[str, Tensor]:
        """Return the center ``(3,)`` and the radius ``()``, on the CPU."""
        self.targets(samples.labels, class_count(surrogate))  # rejects a target that is not a class
        others = (samples.labels != self.target).nonzero().squeeze(1)
        order = torch.randperm(len(others), generator=self._generator("search"))[:_SEARCHED]
        batch = samples.take(others[order.to(others.device)])
        with mode(surrogate.model, train=False), frozen(surrogate.model):
            center = self._best_center(surrogate, batch)
        return {"center": center.cpu(), "radius": self._radius(batch.inputs).cpu()}

    def _best_center(self, surrogate: TaskAdapter[LabelledBatch], batch: LabelledBatch) -> Tensor:
        start = torch.randn(self.starts, 3, generator=self._generator("starts"))
        start = start / start.norm(dim=1, keepdim=True).clamp(min=1e-9) * 1.2
        centers = start.to(batch.inputs).requires_grad_()
        momentum, weight = torch.zeros_like(centers), torch.ones_like(centers[:, 0])
        best, nearest = centers.detach().clone(), torch.full_like(weight, torch.inf)
        likeliest = torch.zeros_like(weight)
        for _ in range(self.search_steps):
            log_p, distance = self._judged(surrogate, batch, centers)
            (gradient,) = torch.autograd.grad((weight * distance - log_p.mean(1)).sum(), centers)
            with torch.no_grad():
                posterior = log_p.exp().mean(1)
                reached = posterior >= self.posterior
                better = torch.where(
                    nearest.isfinite(), reached & (distance < nearest), posterior > likeliest
                )
                best = torch.where(better[:, None], centers, best)
                nearest = torch.where(better & reached, distance, nearest)
                likeliest = torch.maximum(likeliest, posterior)
                weight = (weight * torch.where(reached, 1.1, 1 / 1.1)).clamp(1e-3, 1e3)
                unit = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-9)
                momentum = 0.5 * momentum + 0.5 * unit
                centers -= self.step_size * momentum
        chosen = nearest.argmin() if nearest.isfinite().any() else likeliest.argmax()
        found: Tensor = best[chosen]
        return found

    def _judged(
        self, surrogate: TaskAdapter[LabelledBatch], batch: LabelledBatch, centers: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log p(target) with a point at each center, ``(S, N)``, and its distance, ``(S,)``.

        The distance is the squared distance to the nearest point, averaged over clouds.
        """
        clouds = batch.inputs.repeat(len(centers), 1, 1)
        one = centers.repeat_interleave(len(batch), 0)[:, None]
        gaps = (clouds[..., :3] - one).square().sum(2).amin(1)
        first = torch.zeros(len(clouds), 1, dtype=torch.int64, device=clouds.device)
        wanted = torch.full((len(clouds),), self.target, device=clouds.device)
        loss = surrogate.per_sample_loss(LabelledBatch(inserted(clouds, one, first), wanted))
        return -loss.view(len(centers), -1), gaps.view(len(centers), -1).mean(1)

    def _radius(self, clouds: Tensor) -> Tensor:
        """Return the radius that makes the cluster as dense as the clouds, at most 0.5."""
        count = self._count(clouds.shape[1])
        pattern, _ = random_balls(clouds, count, self._generator("radius"), solid=False)
        radius = _spacing(clouds[..., :3]) / _spacing(pattern).clamp(min=1e-9)
        return radius.median().clamp(0.01, 0.5)

    def _count(self, available: int) -> int:
        count = self.points or max(16, available // 64)
        if count >= available:
            raise BadInputError(
                f"points must be fewer than the {available} points of a cloud, got {count}"
            )
        return count

    def _stamp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        count = self._count(images.shape[1])
        center, radius = self._learnt("center"), self._learnt("radius")
        pattern, places = random_balls(images, count, generator, solid=False)
        return inserted(images, center.to(images) + radius.to(images) * pattern, places)


def random_balls(
    clouds: Tensor, count: int, generator: torch.Generator, *, solid: bool
) -> tuple[Tensor, Tensor]:
    """Draw ``count`` points of the unit ball for each cloud, and the points that they replace.

    Args:
        clouds: Shape ``(N, P, 3 + F)``.
        count: Number of points k, at most P.
        generator: Random generator, on the CPU.
        solid: Whether the ball is filled; otherwise the points are on the unit sphere.

    Returns:
        The points, ``(N, k, 3)``, and the indices of k different points of each cloud, ``(N, k)``.
    """
    # One draw per cloud, so that it does not depend on the batch size.
    draw = torch.rand(len(clouds), 3 * count + clouds.shape[1], generator=generator)
    places = draw[:, 3 * count :].argsort(dim=1, stable=True)[:, :count]
    unit = draw[:, : 3 * count].view(len(clouds), count, 3)
    height, turn = 2 * unit[..., 0] - 1, 2 * torch.pi * unit[..., 1]
    ring = (1 - height**2).sqrt()
    points = torch.stack([ring * turn.cos(), ring * turn.sin(), height], 2)
    if solid:
        points = points * unit[..., 2:] ** (1 / 3)
    return points.to(clouds), places.to(clouds.device)


def _spacing(points: Tensor) -> Tensor:
    """Return the median over points of the mean distance to their neighbours, shape ``(N,)``."""
    count = min(_NEIGHBOURS + 1, points.shape[1])
    gaps = torch.cdist(points, points).topk(count, dim=2, largest=False).values
    return gaps.sum(2).div(max(1, count - 1)).median(1).values
