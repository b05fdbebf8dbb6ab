"""Point cloud classification: data, metric, embedded default and default victims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from mmdefense.data.clouds import random_jitter
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError
from mmdefense.kernels.loop import mean_score
from mmdefense.plots.triggered_clouds import TriggeredClouds
from mmdefense.protocol import Case, TaskAdapter
from mmdefense.training import Training
from mmdefense_tasks.class_labels import Order, under_the_models_labels
from mmdefense_tasks.options import Options
from mmdefense_tasks.parts import check_split
from mmdefense_tasks.point_files import Values, read_clouds
from mmdefense_tasks.staged import DATA_VARIABLE, staged, staged_sets
from mmdefense_tasks.surfaces import draw_surfaces

__all__ = ["PointCloudClassification", "load_clouds"]

_STAGED = ("radhar_points", "modelnet10_chair_monitor")
_POINTS = 256
_TRAIN, _TEST = 2400, 800  # surfaces
_SHOWN = 8

_POINTNET = (
    "mmdefense_tasks.point_victims:PointNet(classes={classes}, features={features}, width=24)"
)
_TRANSFORMER = (
    "mmdefense_tasks.point_victims:PointTransformer(classes={classes}, features={features})"
)


def _training(steps: int, lr: float = 2e-3) -> Training:
    return Training(
        steps=steps,
        batch_size=64,
        lr=lr,
        weight_decay=1e-2,
        schedule="one-cycle",
        optimizer="adamw",
        max_norm=5.0,
    )


class PointCloudClassification:
    """Point cloud classification."""

    name: ClassVar[str] = "point-cloud-classification"
    metric: ClassVar[str] = "accuracy"

    @staticmethod
    def load(
        where: str | Path,
        *,
        split: str = "train",
        stated: Mapping[str, Any] = MappingProxyType({}),
        points: int | None = None,
        features: int | None = None,
        classes: Sequence[str] = (),
        order: Order | None = None,
        values: Values | None = None,
    ) -> LabelledSamples:
        """Return data from any supported location; see :func:`load_clouds`."""
        return load_clouds(
            where,
            split=split,
            stated=stated,
            points=points,
            features=features,
            classes=classes,
            order=order,
            values=values,
        )

    @staticmethod
    def data() -> dict[str, str]:
        """Return the data set names available to :meth:`load` here, each with its source."""
        embedded = {"surfaces": "embedded: eight kinds of computed surfaces, 256 points"}
        return embedded | staged_sets(_STAGED)

    def cases(self) -> list[Case]:
        """Return the victims of the result tables."""
        described: dict[str, dict[str, Any]] = {
            "surfaces": {"data": "surfaces", "model": _POINTNET, "training": _training(300)},
            "surfaces-transformer": {
                "data": "surfaces",
                "model": _TRANSFORMER,
                "training": _training(400),
            },
            "radhar": {"data": "radhar_points", "model": _POINTNET, "training": _training(300)},
        }
        return [
            Case(
                name=f"{name}-{attack or 'clean'}", task=self.name, attack=attack, clean=0.1, **rest
            )
            for name, rest in described.items()
            for attack in ("pcba", "pointpba", "irba", None)
        ]

    @staticmethod
    def describe(samples: LabelledSamples) -> dict[str, Any]:
        """Return ``classes`` and ``features`` (values per point)."""
        return {
            "classes": len(samples.classes) or int(samples.labels.max()) + 1,
            "features": samples.inputs.shape[2],
        }

    @staticmethod
    def adapter_options(samples: LabelledSamples) -> dict[str, Any]:
        """Return the adapter's name: a plain module does not reveal that it reads points."""
        return {"adapter": "points"}

    @staticmethod
    def for_training(samples: LabelledSamples) -> LabelledSamples:
        """Return the samples with jitter and changes of scale, the usual augmentation."""
        return replace(samples, augmentation=random_jitter)

    @staticmethod
    def measure(adapter: TaskAdapter[LabelledBatch], samples: LabelledSamples) -> float:
        """Return the accuracy."""
        return mean_score(adapter, samples)

    @staticmethod
    def show(clean: LabelledSamples, triggered: LabelledSamples) -> TriggeredClouds:
        """Return eight clouds without and with the trigger, from the side and from above."""
        chosen = torch.linspace(0, len(clean) - 1, _SHOWN).long()
        before, after = clean.take(chosen).inputs, triggered.take(chosen).inputs
        names = [_name_of(clean, label) for label in clean.labels[chosen].tolist()]
        return TriggeredClouds(before, after, names)


def _name_of(samples: LabelledSamples, label: int) -> str:
    return samples.classes[label] if samples.classes else str(label)


def load_clouds(
    where: str | Path,
    *,
    split: str = "train",
    stated: Mapping[str, Any] = MappingProxyType({}),
    points: int | None = None,
    features: int | None = None,
    classes: Sequence[str] = (),
    order: Order | None = None,
    values: Values | None = None,
) -> LabelledSamples:
    """Return labelled clouds from wherever they are, centred and in the unit sphere.

    Args:
        where: ``"surfaces"``; the name of a set in the folder that ``MMDEFENSE_DATA`` points to; an
            npz archive; a folder of such archives (``train.npz``, ``test.npz``); or a folder with
            one sub-folder of ply, pcd, obj or off files per class, or with such folders for
            ``train`` and ``test`` (needs Open3D and trimesh). Meshes are sampled.
        split: ``"train"`` or ``"test"``; data without splits is used for both.
        stated: Defaults of the options below, by name, as stated by the model.
        points: Points of each cloud; None takes 256, or all if a cloud has fewer.
        features: Values per point to keep, coordinates first: 3, the default, keeps only the
            coordinates; 6 adds three further values from a file.
        values: What these are: the ``"normals"`` of the file or of its faces, which is the default;
            normals ``"estimated"`` from neighbours; or the ``"colours"`` of the file. Not for
            archives, whose values are fixed.
        classes: The model's class names in order; data with class names is relabelled accordingly.
        order: How class folders are numbered: ``"number"`` uses their names as labels, ``"text"``
            numbers them like torchvision's ``ImageFolder``. By default they are matched to the
            class names; without class names, folders named by integers get these as labels, and
            others are numbered in text order.

    Raises:
        BadInputError: If there is no such data, it is empty or damaged, or has too few features.
        UnsupportedError: If a required library is not installed.
    """
    options = Options(
        stated, points=points, features=features, classes=classes, order=order, values=values
    )
    samples = _read(where, split, options)
    options.check_used(where)
    return samples


def _read(where: str | Path, split: str, options: Options) -> LabelledSamples:
    check_split(split)
    points = options.take("points")
    features = options.take("features", 6 if options.given("values") else 3)
    if str(where) == "surfaces":
        if features != 3:
            raise BadInputError(f"surfaces have 3 values per point, got features={features}")
        is_test = split == "test"
        counted = False
        samples = draw_surfaces(_TEST if is_test else _TRAIN, points or _POINTS, seed=int(is_test))
    else:
        samples, counted = read_clouds(_found(where), split, points or _POINTS, features, options)
    return under_the_models_labels(samples, options, where, counted=counted)


def _found(where: str | Path) -> Path:
    path = Path(where)
    if path.exists():
        return path
    if (known := staged(str(where))) is not None:
        return known
    raise BadInputError(
        f"data {str(where)!r} must be a folder, an npz archive or one of surfaces, "
        f"{', '.join(_STAGED)} (in the folder that {DATA_VARIABLE} points to); none found"
    )
