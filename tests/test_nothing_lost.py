"""Nothing of the user's is lost, nothing outside leaks in, and a record is of what was read."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmdefense as mmd
from mmdefense.checkpoints.models import load_model, save_model
from mmdefense.checkpoints.outputs import check_separate
from mmdefense.checkpoints.runs import RunStore
from mmdefense.errors import BadInputError
from mmdefense.store import Store

OURS = json.dumps({"predicateType": "urn:mmdefense:purification:1"})


@pytest.fixture
def vit(place):
    """A Hugging Face folder beside the data of a place, and how to purify it."""
    from transformers import ViTConfig, ViTForImageClassification

    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8}
    shape = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = place.folder / "vit"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(num_labels=3, **size, **shape)).save_pretrained(folder)
    return folder


def refused(outcome, *words):
    """Check that an outcome is one line with these words, behind stages and notes."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("mmdefense: ")]
    (line,) = [line for line in lines if not line.startswith("mmdefense: note: ")]
    assert line == outcome.err.splitlines()[-1]
    for word in words:
        assert word in line
    assert (outcome.code, outcome.out) == (2, "")


def purify(place, *more, **paths):
    arguments = place.purify("--accept-low-utility", *more, **paths)
    del arguments[arguments.index("--arch") : arguments.index("--arch") + 2]
    return arguments


def tree(folder):
    """Return all that lies in a folder, with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# An output is no input.


SPELT = {
    "itself": "vit",
    "by a dot": "vit/.",
    "by the folder above": "vit/../vit",
    "by a link": "link",
    "by a link to the folder above": "up/vit",
    "in it": "vit/out",
    "in it, deep": "vit/a/b",
    "around it": ".",
    "the data": "data",
    "in the data": "data/0/out",
    "in the data by a link": "pictures/out",
}


@pytest.mark.parametrize("out", SPELT.values(), ids=SPELT)
def test_an_output_that_is_or_holds_or_lies_in_an_input(place, mmdefense, vit, out):
    (vit / "purification.json").write_text(OURS)
    (place.data / "purification.json").write_text(OURS)
    (place.folder / "purification.json").write_text(OURS)
    (place.folder / "link").symlink_to("vit")
    (place.folder / "up").symlink_to(".")
    (place.folder / "pictures").symlink_to("data")
    before = tree(place.folder)
    refused(mmdefense(*purify(place, "--force", model=vit, out=place.folder / out)), "is an input")
    assert tree(place.folder) == before


def test_an_output_in_the_place_of_a_file_that_is_read(place, mmdefense, vit):
    classes = place.folder / "names" / "classes.txt"
    classes.parent.mkdir()
    classes.write_text("0\n1\n2\n")
    more = ("--classes", str(classes), "--force")
    refused(mmdefense(*purify(place, *more, model=vit, out=classes.parent)), "holds", "classes.txt")
    refused(mmdefense(*place.purify("--force", out=place.model)), "is an input")
    assert mmdefense(*place.purify("--force", out=place.folder)).code == 2
    assert place.model.exists()


def test_an_output_in_the_base_of_an_adapter(place, mmdefense, vit):
    adapter = place.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(vit)}))
    refused(mmdefense(*purify(place, "--force", model=adapter, out=vit)), str(vit), "is an input")


def test_a_folder_of_states_that_is_an_input(place, mmdefense, vit):
    given = vit.rename(place.folder / "out.partial")
    before = tree(given)
    refused(mmdefense(*purify(place, "--resume", model=given)), "out.partial", "is an input")
    assert tree(given) == before


def test_what_is_called_otherwise_on_the_disk_is_the_same(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    with pytest.raises(BadInputError, match="is the same as"):
        check_separate(tmp_path / "b", [tmp_path / "a"])
    check_separate(tmp_path / "c" / "d", [tmp_path / "e", tmp_path / "a", "a/hub-id"])


def test_the_interface_in_python_keeps_to_it(place, vit):
    (vit / "purification.json").write_text(OURS)
    how = {"steps": 2, "accept_low_utility": True, "progress": None, "evidence": "none"}
    purified = mmd.purify(vit, place.data, "fine-tuning", **how)
    before = tree(place.folder)
    for out in (vit, vit / "sub", place.data, place.folder):
        with pytest.raises(BadInputError, match="is an input"):
            purified.save(out, force=True)
        with pytest.raises(BadInputError, match=r"is an input|already exists"):
            save_model(purified.model, out, vit)
    assert tree(place.folder) == before


FILES = {
    "the model": "net.safetensors",
    "a picture of the data": "data/0/0.png",
    "a new file in the data": "data/0/found.json",
    "a diary": "diary.json",
    "a link": "link.json",
    "a folder": "data",
    "a pipe": "pipe.json",
}


@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
def test_a_measurement_takes_the_place_of_nothing_else(place, mmdefense, name):
    (place.folder / "diary.json").write_text("{}")
    (place.folder / "link.json").symlink_to("diary.json")
    os.mkfifo(place.folder / "pipe.json")
    before = tree(place.folder)
    arguments = ("evaluate", place.model, "--data", place.data, "--arch", "commands:Net")
    refused(mmdefense(*arguments, "-o", place.folder / name), name.rpartition("/")[2])
    assert tree(place.folder) == before


def test_a_measurement_takes_the_place_of_an_earlier_one(place, mmdefense):
    arguments = ("evaluate", place.model, "--data", place.data, "--arch", "commands:Net")
    for _ in range(2):
        assert mmdefense(*arguments, "-o", place.folder / "found.json").code == 0
    assert place.files() == ["found.json"]


def test_a_page_takes_the_place_of_a_page_alone(place, mmdefense):
    assert mmdefense(*place.purify("--evidence", "none")).code == 0
    before = tree(place.out)
    page, notes = place.folder / "page.html", place.folder / "notes.html"
    notes.write_text("<h1>mine</h1>")
    for outs in ([place.out], [place.out, place.out]):
        for target in (place.out / "model.safetensors", place.out / "README.md", notes):
            refused(mmdefense("report", *outs, "-o", target), target.name)
        for _ in range(2):
            assert mmdefense("report", *outs, "-o", page).code == 0
    assert tree(place.out) == before
    assert notes.read_text() == "<h1>mine</h1>"


@pytest.mark.parametrize("name", ["notes.txt", "index.sqlite", "grid.json"])
def test_a_grid_is_not_put_into_a_folder_of_something_else(tmp_path, mmdefense, name):
    out = tmp_path / "mine"
    out.mkdir()
    if name == "index.sqlite":
        with closing(sqlite3.connect(out / name)) as index, index:
            index.execute("CREATE TABLE mine (x)")
    else:
        (out / name).write_text("mine")
    before = tree(tmp_path)
    refused(mmdefense("grid", "run", "-o", out, "--case", "digits-badnets"), str(out))
    assert tree(tmp_path) == before


def test_what_a_grid_exports_replaces_nothing(tmp_path, mmdefense):
    store = tmp_path / "store"
    Store(store)
    (tmp_path / "cells.csv").write_text("mine")
    for target, more in (("cells.csv", ()), ("store/index.sqlite", ("--force",))):
        refused(mmdefense("grid", "export", "-o", store, *more, "--to", tmp_path / target), target)
    assert (tmp_path / "cells.csv").read_text() == "mine"
    assert Store(store, create=False).entries() == []
    exported = mmdefense("grid", "export", "-o", store, "--force", "--to", tmp_path / "cells.csv")
    assert exported.code == 0
    assert (tmp_path / "cells.csv").read_text() != "mine"


def test_a_model_that_is_a_pipe(place, mmdefense):
    os.mkfifo(place.folder / "a.pt")
    for more in ((), ("--accept-findings",)):
        outcome = mmdefense(*place.purify(*more, model=place.folder / "a.pt"))
        refused(outcome, "a.pt", "not a regular file")


# Where states are kept, only what a run has made is touched.


def held(partial, kind):
    if kind == "a link":
        partial.with_name("kept").mkdir()
        (partial.with_name("kept") / "notes.txt").write_text("mine")
        partial.symlink_to("kept")
    elif kind == "a file":
        partial.write_text("mine")
    else:
        partial.mkdir()
        (partial / {"states": "fit.pt", "a job": "job.pt"}.get(kind, "notes.txt")).write_text(
            "mine"
        )


@pytest.mark.parametrize("kind", ["notes", "states", "a job", "a link", "a file"])
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_folder_where_states_would_be_kept_stays_the_users(place, mmdefense, kind, resume):
    partial = place.folder / "out.partial"
    held(partial, kind)
    before = tree(place.folder)
    refused(mmdefense(*place.purify(*resume)), "out.partial")
    assert tree(place.folder) == before


# Links and pipes.


@pytest.fixture
def outside(tmp_path_factory):
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("secret")
    return secret


def linked(name, whole=False):
    def make(folder, outside):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(outside.parent if whole else outside)

    return make


def piped(name):
    def make(folder, _):
        (folder / name).parent.mkdir(exist_ok=True)
        os.mkfifo(folder / name)

    return make


def with_socket(folder, _):
    where = os.getcwd()
    os.chdir(folder)  # its name must be short
    try:
        socket.socket(socket.AF_UNIX).bind("a.bin")
    finally:
        os.chdir(where)


def mapped(to):
    def make(folder, outside):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(state, outside.parent / "a.safetensors")
        name = to or str(outside.parent / "a.safetensors")
        weights = {"metadata": {}, "weight_map": dict.fromkeys(state, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(weights))

    return make


WAYS_OUT = {
    "a link": linked("notes.txt"),
    "a link to a config": linked("generation_config.json"),
    "a link below": linked("additional_chat_templates/x.jinja"),
    "weights below": linked("sub/x.safetensors"),
    "a hidden link": linked(".cache/x"),
    "a linked folder": linked("additional_chat_templates", whole=True),
    "a linked folder below": linked("sub/deep", whole=True),
    "a pipe": piped("a.bin"),
    "a pipe for weights": piped("pytorch_model.bin"),
    "a pipe below": piped("sub/a.json"),
    "a socket": with_socket,
    "shards above": mapped("../a.safetensors"),
    "shards elsewhere": mapped(None),
    "shards that are numbers": mapped(3),
}


@pytest.mark.parametrize("make", WAYS_OUT.values(), ids=WAYS_OUT)
def test_what_leads_out_of_a_folder_is_refused_and_not_read(place, mmdefense, vit, outside, make):
    make(vit, outside)
    refused(mmdefense(*purify(place, "--accept-findings", model=vit)), str(vit))
    assert place.files() == ["vit"]


def test_what_leads_out_and_came_after_is_not_handed_on(place, vit, outside, tmp_path):
    model = load_model(vit)
    linked("additional_chat_templates/x.jinja")(vit, outside)
    save_model(model, tmp_path / "handed", vit)
    assert b"secret" not in b"".join(v or b"" for v in tree(tmp_path / "handed").values())


@pytest.mark.parametrize("below", ["", "sub"])
def test_the_links_of_the_hubs_cache_are_read(place, mmdefense, vit, below):
    blobs, snapshot = place.folder / "models--a" / "blobs", place.folder / "models--a" / "snapshots"
    folder = snapshot / "abc" / below
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(vit.iterdir())):
        path.rename(blobs / str(number))
        up = "../../../" if below else "../../"
        (folder / path.name).symlink_to(f"{up}blobs/{number}")
    assert mmdefense(*purify(place, model=folder)).code == 0
    assert not any(path.is_symlink() for path in place.out.rglob("*"))


# Files that are changed while they are in use.


def in_place(folder):
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def by_another(folder):
    state = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "new")
    os.utime(folder / "new", ns=(1, 1))
    (folder / "new").rename(folder / "model.safetensors")


def there_and_back(folder):
    path = folder / "model.safetensors"
    seen, content = path.stat(), path.read_bytes()
    in_place(folder)
    path.write_bytes(content)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def another_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_act"', '"x": "y", "hidden_act"'))


def one_more(folder):
    (folder / "generation_config.json").write_text('{"trust_remote_code": true}')


def one_less(folder):
    (folder / "notes.txt").unlink(missing_ok=True)  # a defense may run on several folds


CHANGES = [in_place, by_another, another_config, one_more, one_less]


@pytest.mark.parametrize("change", [*CHANGES, there_and_back])
@pytest.mark.parametrize("command", ["purify", "evaluate", "scan"])
def test_a_change_while_a_model_is_read(place, mmdefense, vit, monkeypatch, change, command):
    from mmdefense.pipeline.sources import Source

    (vit / "notes.txt").write_text("a note")
    genuine, arguments = Source.open, purify(place, model=vit)
    if command != "purify":
        arguments = [command, vit, "--data", place.data, "--accept-low-utility"]

    def changed(self):
        opened = genuine(self)
        change(vit)
        return opened

    monkeypatch.setattr(Source, "open", changed)
    refused(mmdefense(*arguments), str(vit), "was changed while it was in use")
    assert place.files() == ["vit"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_output_is_written(place, mmdefense, vit, disturb, change):
    (vit / "notes.txt").write_text("a note")
    disturb(before=lambda work: change(vit))
    refused(mmdefense(*purify(place, model=vit, defense="disturbed")), str(vit), "was changed")
    assert not place.out.exists()


def test_a_change_before_a_purification_is_saved(place, vit):
    how = {"steps": 2, "accept_low_utility": True, "progress": None, "evidence": "none"}
    purified = mmd.purify(vit, place.data, "fine-tuning", **how)
    given = (vit / "config.json").read_bytes()
    another_config(vit)
    with pytest.raises(BadInputError, match="was changed"):
        purified.save(place.out)
    assert not place.out.exists()
    (vit / "config.json").write_bytes(given)
    purified.save(place.out)


def test_weights_in_memory_do_not_change_with_their_file(vit):
    model = load_model(vit)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size = (vit / "model.safetensors").stat().st_size
    (vit / "model.safetensors").write_bytes(b"\x11" * size)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_the_record_has_the_hashes_of_what_was_read(place, mmdefense, vit):
    given = tree(vit)
    assert mmdefense(*purify(place, model=vit)).code == 0
    statement = json.loads((place.out / "purification.json").read_text())
    listed = {one["name"]: one["digest"]["sha256"] for one in statement["predicate"]["materials"]}
    assert listed == {name: hashlib.sha256(held).hexdigest() for name, held in given.items()}


# Records that came with a model.


def test_a_record_that_came_with_a_model_is_not_taken_for_ours(place, mmdefense, vit):
    clean = {"level": None, "text": "CERTIFIED CLEAN"}
    held = hashlib.sha256((vit / "model.safetensors").read_bytes()).hexdigest()
    scan = {"model": "m", "findings": [], "verdict": clean, "files": {"model.safetensors": held}}
    for name in ("scan.json", "Scan.JSON", "comparison.json", "purification.json", "report.html"):
        (vit / name).write_text(json.dumps(scan))
    assert mmdefense(*purify(place, model=vit)).code == 0
    assert "CERTIFIED" not in (place.out / "report.html").read_text("utf-8")
    names = {path.name for path in place.out.iterdir()}
    assert not names & {"scan.json", "Scan.JSON", "comparison.json"}
    assert "CERTIFIED" not in (place.out / "purification.json").read_text("utf-8")


def test_a_section_that_came_with_a_model_is_not_taken_for_ours(place, mmdefense, vit):
    card = "# A net\n\n<!-- mmdefense: begin -->\nCLEAN\n<!-- mmdefense: end -->\n"
    (vit / "README.md").write_text(card)
    unchanged = ("--set", "lr=0")
    assert mmdefense(*purify(place, *unchanged, model=vit)).code == 1
    assert (place.out / "README.md").read_text() == "# A net\n"
    assert mmdefense(*purify(place, "--force", model=vit)).code == 0
    text = (place.out / "README.md").read_text()
    assert text.startswith("---\n")  # tags
    assert text.partition("\n---\n\n")[2].startswith("# A net\n")
    assert "CLEAN" not in text
    assert "came with the given model, and was not checked" in " ".join(text.split())


# What was kept is what was kept, to the bit.


def test_a_flipped_bit_anywhere_in_a_kept_state_is_seen(tmp_path):
    store = RunStore(tmp_path)
    store.save("a", {"weights": torch.arange(5.0), "step": 3, "name": "x"})
    path = tmp_path / "a.pt"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        )
        with pytest.raises(BadInputError, match="damaged") as caught:
            store.load("a")
        assert "\n" not in str(caught.value)
    path.write_bytes(content)
    assert store.load("a")["step"] == 3


@pytest.mark.parametrize(
    ("name", "remedy"), [("job.pt", "delete"), ("*.progress.pt", "delete it to restart")]
)
def test_a_run_does_not_go_on_from_a_damaged_state(place, mmdefense, disturb, name, remedy):
    def interrupt(work):
        raise KeyboardInterrupt

    disturb(after=interrupt)
    assert mmdefense(*place.purify(defense="disturbed")).code == 130
    (path,) = (place.folder / "out.partial").rglob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    resumed = mmdefense(*place.purify("--resume", defense="disturbed"))
    refused(resumed, path.name, "damaged", remedy)
    assert not place.out.exists()


DAMAGE = {
    "cut": lambda held: held[: len(held) // 2],
    "empty": lambda held: b"",
    "no text": lambda held: b"\xff\xfe" + held,
    "too deep": lambda held: b"[" * 100_000,
    "a list": lambda held: b"[]",
    "no subject": lambda held: held.replace(b'"subject"', b'"subjekt"'),
    "no guard": lambda held: held.replace(b'"guard"', b'"gward"'),
    "text for a number": lambda held: held.replace(b'"seconds": ', b'"seconds": "x", "s": '),
}


@pytest.mark.parametrize("file", ["purification.json", "report.npz"])
def test_a_page_of_a_damaged_record_is_one_line(place, mmdefense, file):
    assert mmdefense(*place.purify("--evidence", "none")).code == 0
    path = Path(place.out / file)
    content = path.read_bytes()
    for damage in DAMAGE.values():
        path.write_bytes(damage(content))
        if path.read_bytes() != content:
            for outs in ([place.out], [place.out, place.out, "-o", place.folder / "page.html"]):
                outcome = mmdefense("report", *outs)
                last = outcome.err.splitlines()[-1]
                assert outcome.code in {1, 2}, outcome.err
                assert last.startswith("mmdefense: ")
                assert str(place.out) in last
