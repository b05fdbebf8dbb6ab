"""A grid on a Ray cluster gives what one process gives, though a node dies amid the run."""

from __future__ import annotations

import dataclasses
import threading
import time

import pytest
import torch

from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.evaluation import cluster as cluster_module
from mmdefense.evaluation.cases import named_cases
from mmdefense.evaluation.cluster import run_on_ray
from mmdefense.evaluation.grid import Grid
from mmdefense.evaluation.lineup import Lineup
from mmdefense.store import Store


def without_time(cells):
    return [dataclasses.replace(c, row=dataclasses.replace(c.row, seconds=0.0)) for c in cells]


@pytest.mark.slow
def test_a_cluster_that_loses_a_node_gives_the_cells_of_one_process(tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    fast = {"steps": 50, "restarts": 0, "max_utility_drop": 1.0}  # no search, no cross-validation
    defenses = [Lineup(defense=name, settings=fast) for name in ("fine-tuning", "tsbd")]
    grid = Grid(cases=named_cases(["digits-badnets"]), defenses=defenses, seeds=(0, 1))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    events = []

    def kill():
        while not events:  # one cell is done, others run
            time.sleep(0.2)
        nodes.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run_on_ray(grid, tmp_path / "ray", nodes.address, progress=events.append)
    finally:
        events.append(None)
        killer.join()
        nodes.shutdown()
    torch.set_num_threads(1)
    alone = grid.run(tmp_path / "one")
    store = Store(tmp_path / "ray")
    assert without_time(grid.measured(store)) == without_time(alone)
    assert len(store.entries()) == len(Store(tmp_path / "one").entries())


def test_a_node_of_other_code_or_data_is_refused():
    with pytest.raises(BadInputError, match="has a different version of mmdefense"):
        cluster_module._check_same("a", "b", torch.get_num_threads())


def test_a_cluster_without_ray_is_not_supported(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UnsupportedError, match="ray"):
        run_on_ray(Grid(cases=[], defenses=[]), tmp_path, "auto")
