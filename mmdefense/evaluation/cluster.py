"""A grid on a Ray cluster: Ray schedules, retries and moves data; results go to the same store.

Each node needs the same version of mmdefense and the same data, found as on any machine; the error
names a node whose code or data differs. If a node dies, Ray runs its tasks again on another one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmdefense.errors import BadInputError
from mmdefense.evaluation.grid import Grid, Planned, measure
from mmdefense.evaluation.identity import cell_identity, victim_identity
from mmdefense.evaluation.kept import restored, trained
from mmdefense.evaluation.victims import train_and_describe
from mmdefense.libraries import needed
from mmdefense.protocol import Case
from mmdefense.report.encoding import plain
from mmdefense.runtime.run import Event, Progress
from mmdefense.store import Identity, Store

__all__ = ["run_on_ray"]

Kept = tuple[dict[str, Any], dict[str, Tensor]]
"""A victim as it is stored: its JSON content and its tensors."""


def run_on_ray(
    grid: Grid,
    folder: str | Path,
    address: str,
    *,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Measure the cells of a grid that the store lacks on an existing Ray cluster.

    Args:
        grid: The grid.
        folder: Folder of the store, on this machine.
        address: Address of the cluster, such as ``"auto"`` or ``"ray://head:10001"``.
        threads: Threads of each task, which requests as many CPUs.
        progress: Called with one event whenever a cell is done.

    Raises:
        BadInputError: If the cluster cannot be reached.
        UnsupportedError: If Ray is not installed.
    """
    with needed("--ray"):
        import ray
    cells, store = grid.planned(), Store(folder)
    left = [cell for cell in cells if store.find(cell.identity) is None]
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:  # it raises many kinds
        raise BadInputError(f"no Ray cluster found at {address!r}: {error}") from error
    try:
        _collect(ray, store, left, threads, len(cells), progress or (lambda _: None))
    finally:
        ray.shutdown()


def _collect(
    ray: Any, store: Store, left: Sequence[Planned], threads: int, total: int, report: Progress
) -> None:
    """Submit every victim and cell to the cluster, and store the results."""
    options = {"num_cpus": threads, "max_retries": -1}
    train, measure_cell = (ray.remote(**options)(call) for call in (_train, _measure_cell))
    victims: dict[str, Any] = {}
    waiting: dict[Any, Any] = {}

    def victim(identity: Identity, case: Case, seed: int, device: str) -> Any:
        if identity.digest not in victims:
            entry = store.find(identity)
            if entry is None and "weights" in identity.parts:  # of the zoo, which this machine has
                entry = trained(store, identity, case, seed, lambda _: None, device)
            if entry is not None and entry.status == "done":
                kept: Kept = store.content(entry), store.tensors(entry)
                victims[identity.digest] = ray.put(kept)
            else:
                reference = train.remote(case, seed, device, identity.digest, threads)
                victims[identity.digest] = reference
                waiting[reference] = identity
        return victims[identity.digest]

    for cell in left:
        where = cell.defense.seed, cell.device
        model, twin = victim(cell.victim, cell.case, *where), None
        if cell.twin is not None:
            twin = victim(victim_identity(cell.twin, *where), cell.twin, *where)
        reference = measure_cell.remote(model, twin, cell, cell.identity.digest, threads)
        waiting[reference] = cell.identity
    while waiting:
        (reference,), _ = ray.wait(list(waiting), num_returns=1)
        identity = waiting.pop(reference)
        try:
            content, tensors = ray.get(reference)
        except Exception as error:  # of the task, with its traceback on the node
            store.fail(identity, error)
        else:
            store.put(identity, content, tensors)
        report(Event("cells", total - sum(i.kind == "cell" for i in waiting.values()), total))


def _train(case: Case, seed: int, device: str, digest: str, threads: int) -> Kept:
    """Train a victim on a node."""
    _check_same(victim_identity(case, seed, device).digest, digest, threads)
    with tempfile.TemporaryDirectory() as folder:
        return train_and_describe(case, seed, lambda _: None, device, Path(folder))


def _measure_cell(
    victim: Kept, twin: Kept | None, cell: Planned, digest: str, threads: int
) -> tuple[dict[str, Any], None]:
    """Measure a cell on a node."""
    weights = cell.victim.parts.get("weights", "")
    mine = victim_identity(cell.case, cell.defense.seed, cell.device, weights)
    found = cell_identity(
        mine, cell.case, cell.label, cell.defense, cell.views, cell.change, cell.retune
    )
    _check_same(found.digest, digest, threads)
    model = restored(cell.case, cell.defense.seed, *victim, cell.device)
    if cell.twin is not None and twin is not None:
        twin_model = restored(cell.twin, cell.defense.seed, *twin, cell.device)
        model = replace(model, retune=cell.retune, twin=twin_model.adapter)
    return plain(measure(cell, model, lambda _: None)), None


def _check_same(found: str, wanted: str, threads: int) -> None:
    """Refuse to compute if code, data or libraries differ from where the grid was planned.

    Raises:
        BadInputError: If they differ.
    """
    import socket

    import torch

    torch.set_num_threads(threads)
    if found != wanted:
        raise BadInputError(
            f"node {socket.gethostname()} has a different version of mmdefense, its libraries or "
            "its data than the machine that planned the grid; install the same versions and data"
        )
