from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from clocks import LATE
from torch import nn

from mmdefense.checkpoints.runs import RunStore
from mmdefense.errors import BadInputError
from mmdefense.runtime.deadline import Deadline
from mmdefense.runtime.run import OutOfTime, Run, copy_state


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "run")


def test_a_state_comes_back_as_it_was(store):
    assert store.load("a") is None
    state = {"step": 3, "mean": 0.5, "weight": torch.tensor([1.0, float("nan")]), "pairs": [(1, 2)]}
    store.save("a", state)
    found = store.load("a")
    assert torch.equal(found.pop("weight").isnan(), state.pop("weight").isnan())
    assert found == state


def test_a_failure_before_the_rename_leaves_the_old_state_and_no_rubbish(store, monkeypatch):
    store.save("a", {"step": 1})

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        store.save("a", {"step": 2})
    assert store.load("a") == {"step": 1}
    assert [path.name for path in store.folder.iterdir()] == ["a.pt"]


def test_a_kill_before_the_rename_leaves_the_old_state(store, monkeypatch):
    store.save("a", {"step": 1})

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(Killed):
            store.save("a", {"step": 2})
    assert len(list(store.folder.iterdir())) == 2
    assert store.load("a") == {"step": 1}
    store.save("a", {"step": 3})
    assert store.load("a") == {"step": 3}


def test_the_state_is_on_disk_before_it_takes_the_name(store, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (calls.append("sync"), sync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    store.save("a", {"step": 1})
    assert calls == ["sync", "replace"]


@pytest.mark.parametrize("content", ["empty", "cut", "text", "code", "list"])
def test_a_file_that_is_no_state_is_refused_in_one_line(store, content):
    store.save("a", {"weight": torch.rand(1000)})
    path = store.folder / "a.pt"
    if content == "empty":
        path.write_bytes(b"")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "text":
        path.write_text("hello")
    elif content == "code":
        torch.save({"model": nn.Linear(1, 1)}, path)
    else:
        torch.save([1, 2], path)
    with pytest.raises(BadInputError, match="delete it to restart") as caught:
        store.load("a")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_generators_depend_on_seed_and_name_alone():
    def drawn(seed, name):
        return torch.rand(2, generator=Run(seed=seed).generator(name)).tolist()

    assert drawn(1, "a") == drawn(1, "a")
    assert drawn(1, "a") != drawn(2, "a")
    assert drawn(1, "a") != drawn(1, "b")
    assert Run(seed=1).seed_for("1/a") != Run(seed=11).seed_for("/a")


def test_reports_reach_the_listener_and_the_history():
    heard = []
    run = Run(progress=heard.append)
    run.report("a", 1, 3)
    run.report("a", 2, 3, loss=torch.tensor(0.5))
    assert [(event.stage, event.step, event.total) for event in heard] == [("a", 1, 3), ("a", 2, 3)]
    assert run.history == [{"stage": "a", "step": 2, "loss": 0.5}]
    assert type(run.history[0]["loss"]) is float


def test_only_a_stage_that_is_not_done_runs_out_of_time():
    Run(deadline=Deadline()).report("a", 1, 3)
    late = Run(deadline=LATE)
    late.report("a", 3, 3)
    with pytest.raises(OutOfTime, match="a, step 2 of 3"):
        late.report("a", 2, 3, loss=0.5)
    assert late.history == [{"stage": "a", "step": 2, "loss": 0.5}]


def test_a_snapshot_does_not_move_with_the_model():
    model = nn.Linear(2, 2)
    run = Run()
    run.snapshot("early", model)
    state = copy_state(model)
    with torch.no_grad():
        model.weight.zero_()
    for found in (state, dict(run.states)["early"]):
        assert found["weight"].count_nonzero() == 4
        assert not found["weight"].requires_grad


def test_once_computes_once_and_brings_history_and_states_back(store):
    calls = []

    def compute(run):
        calls.append(1)
        run.report("measure", 1, 1, value=2.0)
        run.snapshot("measured", nn.Linear(1, 1))
        return {"diagonal": [torch.ones(2)]}

    first, second = Run(store=store), Run(store=store)
    for run in (first, second):
        value = run.once("measure", lambda run=run: compute(run))
        assert torch.equal(value["diagonal"][0], torch.ones(2))
    assert len(calls) == 1
    assert second.history == first.history == [{"stage": "measure", "step": 1, "value": 2.0}]
    assert [label for label, _ in second.states] == ["measured"]
    Run().once("measure", lambda: compute(Run()))
    assert len(calls) == 2


def test_a_state_that_no_run_kept_is_refused(store):
    store.save("stage", {"weight": torch.ones(1)})
    with pytest.raises(BadInputError, match="delete it to start again"):
        Run(store=store).recall("stage")
