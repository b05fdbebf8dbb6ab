"""Reads labelled point clouds: npz archives, and a folder of files per class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmdefense.class_names import few
from mmdefense.data.clouds import check_clouds, to_unit_sphere
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.files import plain_file
from mmdefense.libraries import how_to_install, needed
from mmdefense.notes import note
from mmdefense_tasks.archives import Array, described, labels_of, read_archive
from mmdefense_tasks.class_folders import class_files
from mmdefense_tasks.options import Options
from mmdefense_tasks.parts import part_archive, part_folder

__all__ = ["Values", "read_cloud", "read_clouds"]

_SUFFIXES = frozenset({".ply", ".pcd", ".obj", ".off"})
_BY_TRIMESH = frozenset({".obj", ".off"})  # Open3D reads neither polygons nor one-line headers
_HEAD = 1 << 16  # largest header in bytes
_PACKED = 256  # our choice; largest compression ratio of a pcd file
_COUNTS = {
    ".ply": re.compile(rb"^[ \t]*element[ \t]+\w+[ \t]+(\d{1,300})", re.MULTILINE),
    ".pcd": re.compile(rb"^[ \t]*(?:POINTS|WIDTH|HEIGHT)[ \t]+(\d{1,300})", re.MULTILINE),
    ".off": re.compile(rb"\A\s*\w*OFF\s*(?:#[^\n]*\n\s*)*(\d{1,300}\s+\d{1,300})"),
}
"""The words in a header before the number of points or faces."""
_MOST_VALUES = 9  # our choice; most values per point; a longer axis in an archive is the point axis

Values = Literal["normals", "estimated", "colours"]
"""The values after the coordinates in a file."""


def read_clouds(
    path: Path, split: str, points: int, features: int, options: Options
) -> tuple[LabelledSamples, bool]:
    """Return the clouds of an npz archive or a folder, in the unit sphere.

    Also returned is whether the labels just index the class names, as for a folder per class.

    Args:
        path: The archive or folder.
        split: ``"train"`` or ``"test"``.
        points: Largest number of points per cloud; larger clouds are subsampled at random.
        features: Values per point to keep.
        options: ``values``: the meaning of the values after the coordinates in files.

    Raises:
        BadInputError: If it is empty or damaged, or has too few features.
        UnsupportedError: If Open3D is needed and cannot be used.
    """
    archive = path if path.is_file() else part_archive(path, split)
    if archive is not None:
        clouds, labels, names, counted = _read_archive(archive, split)
    else:
        held = class_files(part_folder(path, split), _SUFFIXES, "clouds")
        values = options.take("values", "normals") if features > 3 else None
        clouds = torch.stack([read_cloud(p, points, values=values) for p in held.files])
        labels, names, counted = held.labels, held.classes, True
    check_clouds(clouds, f"clouds of {path}")
    if clouds.shape[2] < features:
        raise BadInputError(
            f"clouds of {path} must have at least {features} values per point, got "
            f"{clouds.shape[2]}"
        )
    # In double precision: with map coordinates such as 5.4e6, float32 cannot resolve the shape.
    clouds = to_unit_sphere(_sampled(clouds, points)[..., :features].double()).float()
    return LabelledSamples(clouds, labels, classes=names), counted


def _sampled(clouds: Tensor, points: int) -> Tensor:
    """Sample ``points`` points of each cloud, with a fixed seed."""
    if clouds.shape[1] <= points:
        return clouds
    draw = torch.rand(clouds.shape[:2], generator=torch.Generator().manual_seed(0))
    order = draw.argsort(1)[:, :points, None].expand(-1, -1, clouds.shape[2])
    return clouds.gather(1, order)


def _read_archive(path: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...], bool]:
    """Read ``points`` or ``points_int8`` ``(N, P, 3 + F)``, and ``labels`` ``(N,)``.

    ``points_int8`` are in units of 1/127. Class names are read from a ``classes.txt`` or
    ``classes.json`` beside the archive. Pickled arrays are rejected.
    """
    arrays = read_archive(path, split)
    clouds = _points_of(arrays)
    needed = "'points' (N, P, 3 + F) and integer 'labels' (N,)"
    if clouds is None:
        raise BadInputError(f"{path} must hold {needed}, got {described(arrays)}")
    if clouds.ndim == 3 and 3 <= clouds.shape[1] <= _MOST_VALUES < clouds.shape[2]:
        note(f"points {clouds.shape} of {path.name} look like (N, 3 + F, P) and are transposed")
        clouds = np.ascontiguousarray(clouds.swapaxes(1, 2))
    labels, names, counted = labels_of(arrays, path, needed)
    if not len(labels) or len(labels) != len(clouds):
        raise BadInputError(
            f"{path} must hold one label per cloud, and at least one cloud, got {len(labels)} "
            f"labels for {len(clouds)} clouds"
        )
    return torch.from_numpy(clouds), labels, names, counted


def _points_of(arrays: dict[str, Array]) -> Array | None:
    points = arrays.get("points_int8")
    if points is not None and points.dtype.kind == "i" and points.ndim == 3:
        return points.astype(np.float32) / 127
    points = arrays.get("points")
    if points is None or points.dtype.kind not in "fiu" or points.ndim != 3:
        return None
    return points if points.dtype == np.float32 else points.astype(np.float64)


def read_cloud(
    path: Path,
    points: int,
    *,
    values: Values | None = None,
    voxel: float | None = None,
    outliers: float | None = None,
) -> Tensor:
    """Return one file as a cloud, ``(points, 3)``, or ``(points, 6)`` with further values, float64.

    The surface of a mesh is sampled uniformly by area; larger clouds are reduced by farthest point
    sampling; in smaller ones, some points are repeated.

    Args:
        path: A ply, pcd, obj or off file.
        points: Number of points.
        values: Values to add to each point's coordinates: the ``"normals"`` of the file, or of its
            faces; normals ``"estimated"`` from neighbours, whose sign is arbitrary; or the
            ``"colours"`` of the file in ``[0, 1]``. None adds nothing.
        voxel: Voxel size for downsampling, in the file's unit; None keeps all points.
        outliers: Drops points whose mean distance to 20 neighbours is that many standard
            deviations above the average; None drops none.

    Raises:
        BadInputError: If the file is damaged, has no points or a NaN, or lacks such values.
        UnsupportedError: If Open3D or trimesh cannot be used.
    """
    _check_counts(path)
    cloud = _opened(path, points)
    if voxel is not None:
        cloud = cloud.voxel_down_sample(voxel)
    if outliers is not None:
        cloud, _ = cloud.remove_statistical_outlier(20, outliers)
    if not len(cloud.points):
        raise BadInputError(f"cloud {path} must hold at least one point, got an empty one")
    if len(cloud.points) > points:
        cloud = cloud.farthest_point_down_sample(points)
    columns = [np.asarray(cloud.points)]
    if values is not None:
        columns.append(_values(cloud, values, path))
    found = torch.from_numpy(np.concatenate(columns, 1))
    check_clouds(found[None], f"cloud {path}")
    return found[torch.arange(points) % len(found)]


def _check_counts(path: Path) -> None:
    """Reject a file whose header claims more points or faces than the file has bytes.

    Readers allocate memory for the claimed number before reading.
    """
    size = plain_file(path).stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD)
    header = head.partition(b"end_header")[0] if head.startswith(b"ply") else head
    pattern = _COUNTS.get(path.suffix.lower())
    counts = [int(n) for found in pattern.findall(header) for n in found.split()] if pattern else []
    most = size * (_PACKED if path.suffix.lower() == ".pcd" else 1)
    if wrong := [count for count in counts if count > most]:
        raise BadInputError(
            f"file {path} cannot be read as a mesh or a cloud: its header claims {wrong[0]:.3g} "
            f"points or faces, but it has {size} bytes"
        )


def _values(cloud: Any, values: Values, path: Path) -> Array:
    """Return the values after the coordinates, ``(P, 3)``."""
    if values not in get_args(Values):
        raise BadInputError(f"values must be one of {few(get_args(Values))}, got {values!r}")
    if values == "estimated":
        cloud.estimate_normals()
    held = {"normals": cloud.has_normals(), "colours": cloud.has_colors()}
    if not held.get(values, True):
        others = [name for name, there in held.items() if there]
        raise BadInputError(
            f"cloud {path} has no {values}; give --read values=estimated to estimate normals "
            f"from neighbouring points{''.join(f', or values={name}' for name in others)}"
        )
    return np.asarray(cloud.colors if values == "colours" else cloud.normals)


def _opened(path: Path, points: int) -> Any:
    """Return a file as an Open3D cloud; for a mesh, ``points`` samples."""
    open3d = _open3d(path)
    open3d.utility.random.seed(0)
    quiet = open3d.utility.VerbosityContextManager(open3d.utility.VerbosityLevel.Error)
    by_trimesh = path.suffix.lower() in _BY_TRIMESH
    with quiet:
        found = _polygons(path, open3d) if by_trimesh else open3d.io.read_triangle_mesh(str(path))
        if len(found.triangles):
            return _surface(found, points, path)
        if by_trimesh:
            cloud = open3d.geometry.PointCloud(found.vertices)
            cloud.colors = found.vertex_colors
        else:  # NaN and infinity are kept, to be rejected with a message
            cloud = open3d.io.read_point_cloud(str(path), remove_nan_points=False)
    if not len(cloud.points):
        raise BadInputError(f"file {path} cannot be read as a mesh or a cloud; is it damaged?")
    return cloud


def _surface(mesh: Any, points: int, path: Path) -> Any:
    """Sample points of a surface with normals: those of the file, or else of the faces."""
    check_clouds(torch.from_numpy(np.asarray(mesh.vertices))[None], f"mesh {path}")
    if not mesh.get_surface_area() > 0:
        raise BadInputError(f"mesh {path} must have a surface, but its faces have no area")
    return mesh.sample_points_uniformly(points, use_triangle_normal=not mesh.has_vertex_normals())


def _polygons(path: Path, open3d: Any) -> Any:
    """Return an obj or off file as a triangle mesh, or as vertices only."""
    with needed(f"reading {path.name}", "trimesh"):
        import trimesh
    try:
        scene = trimesh.load_scene(path, process=False, skip_materials=True)
        parts = [part for part in scene.geometry.values() if len(part.vertices)]
        vertices = np.concatenate([part.vertices for part in parts])
        faces = [np.asarray(getattr(part, "faces", ())).reshape(-1, 3) for part in parts]
        starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
        mesh = open3d.geometry.TriangleMesh(
            open3d.utility.Vector3dVector(vertices),
            open3d.utility.Vector3iVector(
                np.concatenate([f + n for f, n in zip(faces, starts, strict=False)]).astype(int)
            ),
        )
        colours = np.concatenate([_colours(part) for part in parts])
        if len(colours) == len(vertices):
            mesh.vertex_colors = open3d.utility.Vector3dVector(colours[:, :3] / 255)
    except Exception as error:  # the library raises many exception types
        raise BadInputError(
            f"file {path} cannot be read as a mesh or a cloud: {one_line(error)}; is it damaged?"
        ) from error
    return mesh


def _colours(part: Any) -> Array:
    """Return the colours of vertices, ``(V, 4)`` in 0..255; None if the file has none."""
    held = part.visual.vertex_colors if part.visual.kind == "vertex" else ()
    return np.reshape(held, (-1, 4))


def _open3d(path: Path) -> Any:
    try:
        import open3d
    except ImportError as error:  # not installed, or a required system library is missing
        raise UnsupportedError(
            f"reading {path.name} needs Open3D ({one_line(error)}); {how_to_install('open3d')}, "
            "and on Linux the system packages libusb-1.0-0, libgl1 and libgomp1; npz archives "
            "need none of these"
        ) from error
    return open3d
