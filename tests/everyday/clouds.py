"""Point clouds as scanners and other tools write them: coordinates, axes, values a point.

Those of files are in ``tests/tasks/test_point_clouds.py``, for they need Open3D.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from everyday.rows import Refused, Row

from mmdefense.notes import Note
from mmdefense_tasks.point_clouds import load_clouds

CUBE = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])


def archive(folder: Path, points: np.ndarray) -> Path:
    np.savez(folder / "train.npz", points=points, labels=np.zeros(len(points), int))
    return folder / "train.npz"


def corners(folder: Path, points: np.ndarray, **options) -> list:
    """Return the distinct corners that are read, times the root of 3: signs alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        found = load_clouds(archive(folder, points), **options).inputs[0, :, :3]
    return sorted({tuple(point) for point in (found * 3**0.5).round(decimals=3).tolist()})


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def shape(folder: Path, *sides: int, **options) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        return list(load_clouds(archive(folder, random(*sides)), **options).inputs.shape)


def note(folder: Path) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_clouds(archive(folder, random(2, 3, 64)))
    return str(caught[0].message)


SIGNS = sorted(tuple(corner) for corner in (2.0 * CUBE - 1).tolist())
FAR = 0.3 * CUBE + [4.5e5, 5.4e6, 100]
ROWS = [
    Row("map coordinates in metres", lambda f: corners(f, FAR[None]), SIGNS),
    Row("map coordinates in millimetres, as whole numbers",
        lambda f: corners(f, (1000 * FAR).astype(np.int64)[None]), SIGNS),
    Row("map coordinates with values behind them",
        lambda f: corners(f, np.concatenate([FAR, FAR], 1)[None], features=6), SIGNS),
    Row("an archive (N, 3, P)", lambda f: shape(f, 2, 3, 64), [2, 64, 3]),
    Row("an archive (N, 6, P)", lambda f: shape(f, 2, 6, 64, features=6), [2, 64, 6]),
    Row("a note on an archive (N, 3, P)", note,
        "points (2, 3, 64) of train.npz look like (N, 3 + F, P) and are transposed"),
    Row("values of an archive", lambda f: shape(f, 2, 64, 6, values="normals"),
        Refused("values=normals has no effect")),
]  # fmt: skip
