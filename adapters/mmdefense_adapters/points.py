"""Any PyTorch classifier of point clouds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Samples, Views
from mmdefense.data.clouds import check_clouds, inserted, random_cloud_view, random_turn, turned
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.plots.clouds import render_clouds
from mmdefense.protocol import TriggerFamily
from mmdefense_adapters.classifier import Classifier
from mmdefense_adapters.given import labelled_tensors
from mmdefense_adapters.views import with_augmentation

__all__ = ["PointClassifier"]

_SHARE = 1 / 16  # fraction of a cloud's points in an inserted cluster
_REACH = 1.2  # how far from 0 the center of a cluster may lie, per axis, in radii of the cloud
_SPREAD = 0.25  # how far a point of a cluster may lie from its center, per axis
_GAIN = 4.0  # spreads the initial centers of a search over the space, not just around 0 (ours)
_TURN = math.radians(45)  # the largest rotation about each axis


class PointClassifier(Classifier):
    """Wraps a module that maps clouds ``(N, P, 3 + F)`` to logits ``(N, K)``.

    Clouds are used as given: centred and in the unit sphere, if the model was trained so. If a
    model returns a tuple, its first entry is used, as in the released code of PointNet, whose other
    entries are the matrices regularised in training.
    """

    task: ClassVar[str] = "point-cloud-classification"
    noun: ClassVar[str] = "clouds"
    misreadings: ClassVar[str] = (
        "the labels, the units and axes of the points, their features, and their number"
    )
    generic: ClassVar[bool] = True
    mixable: ClassVar[bool] = False
    priority: ClassVar[int] = 10

    def __init__(
        self, model: nn.Module, *, channels_first: bool = False, example: Tensor | None = None
    ) -> None:
        """Wrap ``model``.

        Args:
            model: The classifier; it is not copied.
            channels_first: Whether the model reads clouds as ``(N, 3 + F, P)``.
            example: One cloud, shape ``(1, P, 3 + F)``, to trace the model with; by default the
                first that the adapter sees.
        """
        super().__init__(model, example=example)
        self.channels_first = channels_first

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Return whether a model declares that it reads points; otherwise, name the task."""
        return getattr(model, "reads", None) == "points"

    def _call(self, inputs: Tensor) -> Any:
        return self.model(inputs.mT if self.channels_first else inputs)

    def _as_samples(self, data: Any) -> Samples[LabelledBatch]:
        if hasattr(data, "take") and hasattr(data, "strata"):
            samples: Samples[LabelledBatch] = data
            return samples
        clouds, labels = labelled_tensors(data, "clouds", 2)
        return LabelledSamples(clouds, labels)

    def viewed(self, samples: Samples[LabelledBatch], views: Views) -> Samples[LabelledBatch]:
        """Return augmented clouds; standard views are rotation, scale and jitter."""
        return with_augmentation(
            self, samples, views, standard=random_turn, insertions=random_cloud_view
        )

    def _check(self, samples: Samples[LabelledBatch], some: Tensor) -> int:
        check_clouds(samples.inputs if isinstance(samples, LabelledSamples) else some)
        seen = some if self.example is None else self.example.inputs
        if seen.shape[2] != some.shape[2]:
            raise BadInputError(
                f"clouds must have {seen.shape[2]} values per point, as those seen before, got "
                f"{some.shape[2]}"
            )
        return super()._check(samples, some)

    def trigger_families(self) -> Sequence[TriggerFamily]:
        """Return clusters of points at any position, and rigid rotations.

        A raw cluster ``(k + 1, 3)`` is a center and k offsets; a raw rotation ``(3,)`` its angles.
        A cluster alone is no evidence of a backdoor: clean networks, too, assign one class to
        clouds with a few points in the right place (docs/results.md).
        """
        points = max(4, round(_SHARE * self._example().inputs.shape[1]))
        return [
            TriggerFamily("cluster", (points + 1, 3), budget=0.1, starts=512, diagnostic=False),
            TriggerFamily("rotation", (3,), budget=0.5, starts=64),
        ]

    def stamp(self, batch: LabelledBatch, family: TriggerFamily, triggers: Tensor) -> LabelledBatch:
        """Return the clouds with ``triggers``, shape ``(T, N, *P)``, applied: T x N clouds.

        A cluster replaces every (P / k)-th point.
        """
        clouds = batch.inputs.repeat(len(triggers), 1, 1)
        raw = triggers.flatten(0, 1).to(clouds.dtype)
        if family.name == "cluster":
            cluster = _cluster(raw)
            places = torch.linspace(0, clouds.shape[1] - 1, cluster.shape[1], device=raw.device)
            stamped = inserted(clouds, cluster, places.long().expand(len(clouds), -1))
        else:
            stamped = turned(clouds, _angles(raw))
        return LabelledBatch(stamped, batch.labels.repeat(len(triggers)))

    def trigger_size(self, family: TriggerFamily, triggers: Tensor) -> Tensor:
        """Return the fraction of points in a cluster, or the mean angle relative to the largest."""
        if family.name == "cluster":
            share = (family.shape[0] - 1) / self._example().inputs.shape[1]
            return triggers.new_full(triggers.shape[:-2], share)
        return (2 * triggers - 1).abs().mean(-1)

    def trigger_picture(self, family: TriggerFamily, trigger: Tensor) -> Tensor:
        """Return a picture ``(3, H, W)``: a cluster beside the unit sphere, or rotated axes."""
        if family.name == "cluster":
            shown, new = _sphere(256), _cluster(trigger[None].float())[0]
        else:
            shown = (torch.linspace(0, 1, 40)[:, None, None] * torch.eye(3)).flatten(0, 1)
            new = turned(shown, _angles(trigger.float()))
        cloud = 0.6 * torch.cat([shown, new])  # so that the farthest cluster is in the picture
        return render_clouds(cloud[None], torch.arange(len(cloud))[None] >= len(shown))[0]


def _cluster(raw: Tensor) -> Tensor:
    """Return the points of raw clusters ``(N, k + 1, 3)``, shape ``(N, k, 3)``."""
    signed = 2 * raw - 1
    return _REACH * (_GAIN * signed[:, :1]).tanh() + _SPREAD * signed[:, 1:]


def _angles(raw: Tensor) -> Tensor:
    return (2 * raw - 1) * _TURN


def _sphere(count: int) -> Tensor:
    """Return points spread evenly over the unit sphere, ``(count, 3)`` (a Fibonacci lattice)."""
    index = torch.arange(count) + 0.5
    height, turn = 1 - 2 * index / count, index * math.pi * (1 + 5**0.5)
    ring = (1 - height**2).sqrt()
    return torch.stack([ring * turn.cos(), ring * turn.sin(), height], 1)
