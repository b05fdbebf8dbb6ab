"""The store: everything under what determines it, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from mmdefense.errors import BadInputError
from mmdefense.store import Identity, Store

ONE = Identity("cell", "one", {"a": 1, "settings": {"x": 0.5, "y": [1, 2]}})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_what_is_put_is_found_under_its_identity_alone(store):
    tensors = {"w": torch.randn(3, 2), "n": torch.tensor(3)}
    entry = store.put(ONE, {"acc": 0.5}, tensors)
    again = Store(store.folder)
    assert again.find(ONE) == entry
    assert again.content(entry) == {"acc": 0.5}
    kept = again.tensors(entry)
    assert all(torch.equal(kept[name], value) for name, value in tensors.items())
    assert again.find(Identity("cell", "one", {**ONE.parts, "a": 2})) is None
    assert again.find(Identity("victim", "one", ONE.parts)) is None


def test_a_name_and_the_order_of_keys_are_no_part_of_an_identity():
    same = Identity("cell", "two", {"settings": {"y": [1, 2], "x": 0.5}, "a": 1})
    assert same.digest == ONE.digest
    assert Identity("cell", "one", {**ONE.parts, "a": 1.5}).digest != ONE.digest


def test_an_identity_of_nan_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        _ = Identity("cell", "nan", {"a": float("nan")}).digest


def test_a_result_is_written_once_and_a_failure_gives_way(store):
    failed = store.fail(ONE, ValueError("broken"))
    assert (failed.status, failed.error) == ("failed", "broken")
    assert "ValueError" in failed.trace
    done = store.put(ONE, {"acc": 1})
    assert done.status == "done"
    assert not done.error
    assert store.put(ONE, {"acc": 2}) == done
    assert store.fail(ONE, ValueError("later")) == done
    assert store.content(done) == {"acc": 1}


def test_one_claim_at_a_time_and_it_ends_with_the_process(store):
    program = (
        "import sys, time; from mmdefense.store import Identity, Store\n"
        "with Store(sys.argv[1]).claim(Identity('cell', 'x', {'a': 1})) as mine:\n"
        "    print(mine, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(store.folder)]
    identity = Identity("cell", "x", {"a": 1})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with store.claim(identity) as mine:
            assert not mine
        assert store.claimed() == {identity.digest}
        other.kill()
    with store.claim(identity) as mine:
        assert mine
    assert store.claimed() == set()


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_damaged_or_missing_file_is_told(store, suffix):
    entry = store.put(ONE, {"acc": 0.5}, {"w": torch.ones(4)})
    path = next(store.folder.glob(f"blobs/*/*.{suffix}"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert ["is damaged" in fault for fault in store.verify()] == [True]
    with pytest.raises(BadInputError, match=r"cell one .* is damaged"):
        store.content(entry) if suffix == "json" else store.tensors(entry)
    path.unlink()
    assert ["cannot be read" in fault for fault in store.verify()] == [True]


def test_a_clean_up_takes_what_nothing_needs_and_is_old(store):
    kept = store.put(ONE, {"acc": 0.5}, {"w": torch.ones(4)})
    lost = store.put(Identity("cell", "lost", {"a": 3}), {"acc": 0.25})
    store.forget(lost)
    states = store.work(ONE)
    states.save("step", {"value": torch.ones(2)})
    store.work(Identity("cell", "unfinished", {"a": 4})).save("step", {"value": torch.ones(2)})
    young = store.folder / store.content_path(lost)
    assert store.gc().files == 1  # the states of what is done
    old = time.time() - 7200
    os.utime(young, (old, old))
    for path in store.folder.glob("blobs/*/*"):
        os.utime(path, (old, old))
    assert store.gc().files == 1
    assert not young.exists()
    assert store.verify() == []
    assert store.content(kept) == {"acc": 0.5}
    assert len(list(store.folder.glob("work/*"))) == 1


def test_an_entry_is_named_by_the_start_of_its_digest(store):
    entry = store.put(ONE, {})
    assert store.named(entry.digest[:8]) == entry
    with pytest.raises(BadInputError, match=r"no entries of .* begins with 'zz'"):
        store.named("zz")


def test_a_folder_that_is_no_store_and_one_of_another_version_are_refused(store, tmp_path):
    with pytest.raises(BadInputError, match="holds no store"):
        Store(tmp_path / "none", create=False)
    with store._index() as index:
        index.execute("PRAGMA user_version = 99")
    with pytest.raises(BadInputError, match="is of version 99"):
        Store(store.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.sqlite").write_text("no database")
    with pytest.raises(BadInputError, match="cannot be opened"):
        Store(tmp_path / "other")
