"""Reads labelled point clouds: npz archives, and a folder of files per class by Open3D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdefense.batches import LabelledSamples
from mmdefense.clouds import check_clouds, random_cloud_view, to_unit_sphere
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.libraries import how_to_install
from mmdefense_tasks.archives import Array, described, labels_of, read_archive
from mmdefense_tasks.class_folders import class_files
from mmdefense_tasks.parts import part_archive, part_folder

__all__ = ["read_cloud", "read_clouds"]

_SUFFIXES = frozenset({".ply", ".pcd", ".obj", ".off"})
_MESHES = frozenset({".ply", ".obj", ".off"})  # a ply file may also be a mere cloud


def read_clouds(path: Path, split: str, points: int, features: int) -> tuple[LabelledSamples, bool]:
    """Return the clouds of an npz archive or a folder, in the unit sphere.

    Beside them: whether their labels do no more than count the class names, as those of a folder
    per class.

    Args:
        path: What there is.
        split: ``"train"`` or ``"test"``.
        points: Largest number of points of each cloud; from more, some are drawn at random.
        features: Values a point to keep.

    Raises:
        BadInputError: If it is empty or damaged, or does not have that many features.
        UnsupportedError: If Open3D is needed and cannot be used.
    """
    archive = path if path.is_file() else part_archive(path, split)
    if archive is not None:
        clouds, labels, names, counted = _read_archive(archive, split)
    else:
        held = class_files(part_folder(path, split), _SUFFIXES, "clouds")
        clouds = torch.stack([read_cloud(p, points, normals=features > 3) for p in held.files])
        labels, names, counted = held.labels, held.classes, True
    check_clouds(clouds, f"clouds of {path}")
    if clouds.shape[2] < features:
        raise BadInputError(
            f"clouds of {path} must have at least {features} values a point, got {clouds.shape[2]}"
        )
    clouds = to_unit_sphere(_sampled(clouds, points)[..., :features])
    return LabelledSamples(clouds, labels, random_cloud_view, names), counted


def _sampled(clouds: Tensor, points: int) -> Tensor:
    """Return ``points`` of the points of each cloud, drawn from a fixed seed."""
    if clouds.shape[1] <= points:
        return clouds
    draw = torch.rand(clouds.shape[:2], generator=torch.Generator().manual_seed(0))
    order = draw.argsort(1)[:, :points, None].expand(-1, -1, clouds.shape[2])
    return clouds.gather(1, order)


def _read_archive(path: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...], bool]:
    """Read ``points`` or ``points_int8`` ``(N, P, 3 + F)``, and ``labels`` ``(N,)``.

    ``points_int8`` are 127ths. Class names stand in a ``classes.txt`` or ``classes.json`` beside
    the archive. Pickled arrays are refused.
    """
    arrays = read_archive(path, split)
    clouds = _points_of(arrays)
    needed = "'points' (N, P, 3 + F) and whole-number 'labels' (N,)"
    if clouds is None:
        raise BadInputError(f"{path} must hold {needed}, got {described(arrays)}")
    labels, names, counted = labels_of(arrays, path, needed)
    if not len(labels) or len(labels) != len(clouds):
        raise BadInputError(
            f"{path} must hold a label per cloud and at least one, got {len(labels)} labels for "
            f"{len(clouds)} clouds"
        )
    return torch.from_numpy(clouds), labels, names, counted


def _points_of(arrays: dict[str, Array]) -> Array | None:
    if "points_int8" in arrays:
        return arrays["points_int8"].astype(np.float32) / 127
    points = arrays.get("points")
    return None if points is None or points.dtype.kind not in "fiu" else points.astype(np.float32)


def read_cloud(
    path: Path,
    points: int,
    *,
    normals: bool = False,
    voxel: float | None = None,
    outliers: float | None = None,
) -> Tensor:
    """Return one file as a cloud, ``(points, 3)``, or ``(points, 6)`` with normals.

    The surface of a mesh is sampled uniformly by area; of a larger cloud, points spread by farthest
    point sampling are kept; of a smaller one, some stand there twice.

    Args:
        path: A ply, pcd, obj or off file.
        points: Number of points.
        normals: Whether each point gets its normal, estimated from its neighbours where the file
            has none.
        voxel: Side of the voxels that a cloud is thinned to, in the file's unit; none keeps all.
        outliers: Drops points whose mean distance to 20 neighbours is that many standard
            deviations above the average; none drops none.

    Raises:
        BadInputError: If the file is damaged, or holds no point or a NaN.
        UnsupportedError: If Open3D cannot be used.
    """
    cloud = _opened(path, points)
    if voxel is not None:
        cloud = cloud.voxel_down_sample(voxel)
    if outliers is not None:
        cloud, _ = cloud.remove_statistical_outlier(20, outliers)
    if not len(cloud.points):
        raise BadInputError(f"cloud {path} must hold at least one point, got an empty one")
    if len(cloud.points) > points:
        cloud = cloud.farthest_point_down_sample(points)
    if normals and not cloud.has_normals():
        cloud.estimate_normals()
    columns = [np.asarray(cloud.points)] + [np.asarray(cloud.normals)] * normals
    values = torch.from_numpy(np.concatenate(columns, 1)).float()
    check_clouds(values[None], f"cloud {path}")
    return values[torch.arange(points) % len(values)]


def _opened(path: Path, points: int) -> Any:
    """Return a file as a cloud of Open3D; of a mesh, ``points`` samples."""
    open3d = _open3d(path)
    open3d.utility.random.seed(0)
    quiet = open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error)
    with quiet:
        if path.suffix.lower() in _MESHES:
            mesh = open3d.io.read_triangle_mesh(str(path))
            if len(mesh.triangles):
                return mesh.sample_points_uniformly(points)
            if len(mesh.vertices):
                return open3d.geometry.PointCloud(mesh.vertices)
        if path.suffix.lower() in {".ply", ".pcd"}:
            # NaN and infinity are kept, to be refused with a word.
            return open3d.io.read_point_cloud(str(path), remove_nan_points=False)
    raise BadInputError(f"file {path} cannot be read as a mesh or a cloud; is it damaged?")


def _open3d(path: Path) -> Any:
    try:
        import open3d
    except ImportError as error:  # not installed, or a system library that it needs is missing
        raise UnsupportedError(
            f"reading {path.name} needs Open3D ({one_line(error)}); {how_to_install('open3d')}, "
            "and on Linux the system packages libusb-1.0-0, libgl1 and libgomp1; npz archives "
            "need neither"
        ) from error
    return open3d
