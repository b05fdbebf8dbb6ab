"""Purifications and scans in a store: computed once, and again where anything is another."""

from __future__ import annotations

import json
import os
import time

import pytest
from commands import fitted_net
from safetensors.torch import save_file

from mmdefense.pipeline import jobs
from mmdefense.pipeline import scan as scan_module
from mmdefense.store import Store


@pytest.fixture
def computed(monkeypatch):
    """Count the purifications and the looks at files."""
    done = []
    for module, name in ((jobs, "purify_prepared"), (scan_module, "scan_files")):
        genuine = getattr(module, name)

        def counted(*given, _genuine=genuine, _name=name, **more):
            done.append(_name)
            return _genuine(*given, **more)

        monkeypatch.setattr(module, name, counted)
    return done


def files_in(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_purification_is_written_again_and_not_computed(place, mmdefense, computed):
    kept = place.folder / "store"
    first = mmdefense(*place.purify("--store", str(kept)))
    second = place.folder / "again"
    again = mmdefense(*place.purify("--store", str(kept), out=second))
    assert (first.code, again.code) == (0, 0)
    assert computed == ["purify_prepared"]
    assert files_in(second) == files_in(place.out)
    assert "nothing to compute: the result of" in again.err
    assert first.out.splitlines()[:2] == again.out.splitlines()[:2]
    assert mmdefense(*place.purify("--store", str(kept))).code == 2  # the output is there
    assert mmdefense(*place.purify("--store", str(kept), "--force")).code == 0
    assert files_in(second) == files_in(place.out)
    assert not place.out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--seed", "3"),
        ("--set", "lr=0.005"),
        ("--mean", "0.01", "--std", "1"),
        ("--evidence", "none"),
    ],
    ids=" ".join,
)
def test_another_seed_setting_reading_or_level_is_another_purification(
    place, mmdefense, computed, more
):
    kept = place.folder / "store"
    assert mmdefense(*place.purify("--store", str(kept))).code == 0
    other = mmdefense(*place.purify("--store", str(kept), *more, out=place.folder / "other"))
    assert other.code in {0, 1}, other.err
    assert computed == ["purify_prepared"] * 2
    assert len(Store(kept).entries("purification")) == 2


def test_other_weights_or_data_are_another_purification(place, mmdefense, computed):
    kept = place.folder / "store"
    purify = place.purify("--store", str(kept), "--force")
    mmdefense(*purify)
    next(place.data.rglob("*.png")).unlink()
    mmdefense(*purify)
    state = fitted_net().state_dict()
    state["head.bias"] += 0.01
    save_file(state, place.model)
    mmdefense(*purify)
    assert computed == ["purify_prepared"] * 3
    assert len(Store(kept).entries("purification")) == 3


def test_the_same_scan_is_told_again(place, mmdefense, computed):
    kept, renamed = place.folder / "store", place.folder / "other.safetensors"
    scan = ["scan", str(place.model), "--arch", "commands:Net", "--store", str(kept)]
    first = mmdefense(*scan, "--format", "json")
    again = mmdefense(*scan, "--format", "json")
    assert computed == ["scan_files"]
    assert json.loads(first.out) == json.loads(again.out)
    assert "nothing to compute: the scan of" in again.err
    with_data = [*scan, "--data", str(place.data)]
    assert mmdefense(*with_data).out == mmdefense(*with_data).out
    assert computed == ["scan_files"] * 2
    place.model.rename(renamed)
    scan[1] = str(renamed)
    mmdefense(*scan)
    assert computed == ["scan_files"] * 3  # the file's name is in the findings
    assert [entry.kind for entry in Store(kept).entries()] == ["scan"] * 3


def test_the_store_commands_know_both_kinds(place, mmdefense):
    kept = place.folder / "store"
    mmdefense(*place.purify("--store", str(kept)))
    mmdefense("scan", str(place.model), "--arch", "commands:Net", "--store", str(kept))
    listed = mmdefense("store", "ls", str(kept)).out.splitlines()
    assert [line.split()[1] for line in listed] == ["purification", "scan"]
    store = Store(kept)
    purified = store.entries("purification")[0]
    shown = json.loads(mmdefense("store", "show", str(kept), purified.digest).out)
    assert "output/purification.json" in shown["files"]
    assert mmdefense("store", "verify", str(kept)).code == 0
    weights = shown["files"]["output/model.safetensors"]
    blob = next(kept.rglob(f"{weights}.safetensors"))
    blob.write_bytes(blob.read_bytes()[:-1])
    assert mmdefense("store", "verify", str(kept)).code == 1
    refused = mmdefense(*place.purify("--store", str(kept), "--force"))
    assert refused.code == 2
    assert "is damaged; `mmdefense store rm" in refused.err
    assert (place.out / "model.safetensors").exists()  # the earlier output stays
    assert mmdefense("store", "rm", str(kept), purified.digest).code == 0
    old = time.time() - 7200
    for path in kept.rglob("blobs/*/*"):
        os.utime(path, (old, old))
    assert int(mmdefense("store", "gc", str(kept)).out.split()[1]) == len(purified.files)
    assert [entry.kind for entry in store.entries()] == ["scan"]
    assert mmdefense(*place.purify("--store", str(kept), "--force")).code == 0
    assert mmdefense("store", "verify", str(kept)).code == 0


def test_what_was_cut_off_is_not_kept(place, mmdefense):
    kept = place.folder / "store"
    short = mmdefense(
        *place.purify("--store", str(kept), "--set", "steps=5000"), "--max-time", "2s"
    )
    assert short.code in {0, 1}, short.err
    assert Store(kept).entries() == []


def test_a_scan_of_data_that_only_a_model_can_tell_is_not_kept(place, mmdefense):
    scan = ["scan", str(place.model), "--data", "owner/nothing", "--store", str(place.folder / "s")]
    assert "leave --store out" in mmdefense(*scan).err
