"""What is given is read, checked and hashed once, from the door to the output.

The counts are kept in a file, so that what is done in a child process counts as well.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from commands import fitted_net, small_images

import mmdefense as mmd
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses.fine_tuning import FineTuning
from mmdefense.prepared import prepare
from mmdefense.report.record import read_record
from mmdefense_adapters.classifier import Classifier
from mmdefense_adapters.torch_classifier import TorchClassifier
from mmdefense_tasks.image_classification import ImageClassification


class Counts:
    """What was done how often, by kind and by what it was done to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def add(self, kind: str, what: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, str(what)]) + "\n")

    def of(self, kind: str) -> Counter[str]:
        entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        return Counter(what for known, what in entries if known == kind)

    def times(self, kind: str) -> int:
        """Return how often it was done in all."""
        return self.of(kind).total()


@pytest.fixture
def counts(tmp_path_factory, monkeypatch):
    """Count what adapters read, tasks load, samples are fingerprinted, and files are hashed."""
    counts = Counts(tmp_path_factory.mktemp("counts") / "counts.jsonl")

    def counted(kind, of, name, what=lambda *_: ""):
        genuine = getattr(of, name)

        @functools.wraps(genuine)
        def call(*arguments, **named):
            counts.add(kind, what(*arguments))
            return genuine(*arguments, **named)

        static = isinstance(inspect.getattr_static(of, name), staticmethod)
        monkeypatch.setattr(of, name, staticmethod(call) if static else call)

    counted("read", Classifier, "samples")
    counted("load", ImageClassification, "load")
    counted("fingerprint", LabelledSamples, "fingerprint")
    counted("file", hashlib, "file_digest", lambda file, _: written_as(os.fstat(file.fileno())))
    genuine = hashlib.sha256

    class Digest:
        """A hash of what is in memory; what it comes to is counted."""

        def __init__(self, content=b"", **named):
            self.hash = genuine(content, **named)

        def hexdigest(self):
            counts.add("memory", self.hash.hexdigest())
            return self.hash.hexdigest()

        def __getattr__(self, name):
            return getattr(self.hash, name)

    monkeypatch.setattr(hashlib, "sha256", Digest)
    return counts


def written_as(seen):
    """Return what a file is until it is written again."""
    return f"{seen.st_dev} {seen.st_ino} {seen.st_size} {seen.st_mtime_ns}"


def check_files(counts, *paths):
    """Check that each file was hashed once, and that these are among them."""
    hashed = counts.of("file")
    assert set(hashed.values()) == {1}, hashed
    assert hashed.keys() >= {written_as(path.stat()) for path in paths}


def check_record(counts, record):
    """Check that the digests in memory that stand in a record were computed once."""
    digests = {record.model.sha256_before, record.model.sha256_after, record.data.fingerprint}
    assert {digest: counts.of("memory")[digest] for digest in digests} == dict.fromkeys(digests, 1)
    assert counts.times("fingerprint") == 1


def others(folder, *names):
    """Return the files of a folder but those of these names."""
    return [path for path in folder.iterdir() if path.name not in names]


@pytest.fixture
def vit(place):
    """A Hugging Face folder with files beside its weights."""
    from transformers import ViTConfig, ViTForImageClassification

    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8}
    shape = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = place.folder / "vit"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(num_labels=3, **size, **shape)).save_pretrained(folder)
    (folder / "README.md").write_text("# A model")
    (folder / "notes.txt").write_text("a note")
    return folder


def test_purify_from_files_to_files(place, mmdefense, counts):
    outcome = mmdefense(*place.purify("--evidence", "full"))
    assert outcome.code == 0, outcome.err
    assert (counts.times("load"), counts.times("read")) == (1, 1)
    check_files(counts, place.model, *others(place.out, "report.html", "purification.json"))
    check_record(counts, read_record(place.out / "purification.json"))


def test_purify_of_a_folder(place, mmdefense, counts, vit):
    arguments = place.purify("--accept-low-utility", model=vit)
    del arguments[arguments.index("--arch") : arguments.index("--arch") + 2]
    outcome = mmdefense(*arguments)
    assert outcome.code == 0, outcome.err
    assert (counts.times("load"), counts.times("read")) == (1, 1)
    written = others(place.out, "report.html", "purification.json")
    assert len(written) == 5  # weights, config, notes, card, data of the plots
    check_files(counts, *others(vit), *written)
    check_record(counts, read_record(place.out / "purification.json"))


def test_purify_of_paths_in_python(place, counts):
    how = {"arch": "commands:Net", "steps": 2, "progress": None}
    purified = mmd.purify(place.model, place.data, "fine-tuning", **how)
    purified.save(place.out)
    assert (counts.times("load"), counts.times("read")) == (1, 1)
    check_files(counts, place.model, place.out / "model.safetensors")
    check_record(counts, read_record(place.out / "purification.json"))


def test_a_file_that_was_touched_is_hashed_again(place, counts):
    how = {"arch": "commands:Net", "steps": 2, "progress": None, "evidence": "none"}
    purified = mmd.purify(place.model, place.data, "fine-tuning", **how)
    before = written_as(place.model.stat())
    os.utime(place.model, ns=(1, 1))
    purified.save(place.out)
    check_files(counts, place.model)
    assert counts.of("file")[before] == 1


def test_purify_in_memory(tmp_path, counts):
    given = {"steps": 2, "progress": None, "evidence": "full"}
    purified = mmd.purify(fitted_net(), small_images(), "fine-tuning", **given)
    assert counts.times("read") == 1
    purified.save(tmp_path / "out")
    assert counts.times("read") == 1
    check_record(counts, read_record(tmp_path / "out" / "purification.json"))
    check_files(counts, tmp_path / "out" / "model.safetensors")


def test_a_dry_run(place, mmdefense, counts):
    outcome = mmdefense(*place.purify("--dry-run"))
    assert outcome.code == 0, outcome.err
    assert (counts.times("load"), counts.times("read")) == (1, 1)
    assert set(counts.of("file").values()) <= {1}
    assert set(counts.of("memory").values()) <= {1}


def evaluated(place, model, *more):
    return ["evaluate", model, "--data", place.data, "--arch", "commands:Net", *more]


def test_evaluate(place, mmdefense, counts):
    assert mmdefense(*evaluated(place, place.model)).code == 0
    assert (counts.times("load"), counts.times("read"), counts.times("fingerprint")) == (1, 1, 1)
    check_files(counts, place.model)


def test_evaluate_under_an_attack_reads_what_it_stamps_beside(place, mmdefense, counts):
    how = ("--attack", "badnets", "--target", "0")
    assert mmdefense(*evaluated(place, place.model, *how)).code in {0, 1}
    assert counts.times("load") == 1
    assert counts.times("read") == 3  # what is clean, what is stamped, and its right answers
    assert counts.times("fingerprint") == 1


@pytest.mark.parametrize("given", [True, False], ids=["the given model", "the purified model"])
def test_evaluate_into_the_record_of_a_purification(place, mmdefense, counts, given):
    assert mmdefense(*place.purify("--evidence", "none")).code == 0
    counts.path.write_text("")
    model = place.model if given else place.out / "model.safetensors"
    outcome = mmdefense(*evaluated(place, model, "--record", place.out))
    assert outcome.code == 0, outcome.err
    check_files(counts, model, *others(place.out, "report.html", "purification.json"))
    assert (counts.times("load"), counts.times("read"), counts.times("fingerprint")) == (1, 1, 1)


def test_scan_with_data(place, mmdefense, counts):
    outcome = mmdefense("scan", place.model, "--data", place.data, "--arch", "commands:Net")
    assert outcome.code in {0, 1}, outcome.err
    assert (counts.times("load"), counts.times("read")) == (1, 1)
    check_files(counts, place.model)


def test_scan_in_memory(counts):
    mmd.scan(fitted_net(), small_images(), progress=None)
    assert counts.times("read") == 1


def test_the_door_runs_the_model_once(counts):
    net, passes = fitted_net(), []

    def note(module, _):
        passes.append(module is net)  # not those of the copy that is tried in train mode

    net.register_forward_pre_hook(note)
    assert prepare(TorchClassifier(net), small_images()).model is net
    assert sum(passes) == 1
    assert counts.times("read") == 1


def test_what_was_prepared_is_checked_no_more(counts):
    prepared = prepare(TorchClassifier(fitted_net()), small_images())
    with torch.no_grad():
        prepared.model.head.bias[0] = torch.nan  # which a check would refuse
    result = FineTuning(steps=0).purify(prepared)
    assert result.data["fingerprint"] == prepared.fingerprint
    assert (counts.times("read"), counts.times("fingerprint")) == (1, 1)
