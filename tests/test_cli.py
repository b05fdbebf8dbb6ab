"""The command line, called as a user calls it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import small_images
from PIL import Image
from safetensors.torch import load_file

from mmdefense.report.record import read_record

LONG = ("--set", "steps=700", "--set", "batch_size=8", "--set", "restarts=0")


def weights(folder: Path) -> dict[str, list[float]]:
    return {n: v.tolist() for n, v in load_file(folder / "model.safetensors").items()}


def test_purify_writes_a_drop_in_model_with_its_evidence(place, mmdefense):
    outcome = mmdefense(*place.purify("--seed", "4", "--evidence", "full"))
    assert outcome.code == 0
    assert "utility guard: bound not decidable with 30 held-out samples" in outcome.out
    assert "of 5 folds" in outcome.out
    assert place.files() == ["out"]
    before, after = load_file(place.model), load_file(place.out / "model.safetensors")
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {
        n: (v.shape, v.dtype) for n, v in after.items()
    }
    record = read_record(place.out / "purification.json")
    assert record.defense.settings["steps"] == 4
    assert record.provenance.seed == 4
    assert "mmdefense purify" in record.provenance.command
    assert list(record.model.files_before) == ["net.safetensors"]
    assert list(record.model.files_after) == ["model.safetensors"]
    assert record.scan.parts == ("files", "weights")
    assert list(record.scan.files) == ["net.safetensors"]
    assert set(record.spectra) == {"before", "after"}
    page = (place.out / "report.html").read_text("utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "before anything was done" in page
    assert "not looked at: behaviour" in outcome.out


def test_what_speaks_against_a_file_beside_the_weights_is_on_the_page(place, mmdefense):
    from transformers import ViTConfig, ViTForImageClassification

    folder = place.folder / "vit"
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8}
    shape = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(num_labels=3, **size, **shape)).save_pretrained(folder)
    (folder / "evil.bin").write_bytes(f"cos\nmkdir\n(S'{place.folder}/touched'\ntR.".encode())
    arguments = place.purify("--accept-low-utility", "--accept-findings", model=folder)
    del arguments[arguments.index("--arch") : arguments.index("--arch") + 2]
    outcome = mmdefense(*arguments)
    assert outcome.code == 0
    assert "1 finding of high level" in outcome.out
    assert "os.mkdir" in (place.out / "report.html").read_text("utf-8")
    assert not (place.out / "evil.bin").exists()
    assert not (place.folder / "touched").exists()


def test_a_hugging_face_folder_goes_in_and_comes_out(place, mmdefense):
    from transformers import ViTConfig, ViTForImageClassification

    folder = place.folder / "vit"
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8}
    shape = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(num_labels=3, **size, **shape)
    ViTForImageClassification(config).save_pretrained(folder)
    arguments = place.purify("--accept-low-utility", model=folder)
    del arguments[arguments.index("--arch") : arguments.index("--arch") + 2]
    assert mmdefense(*arguments).code == 0
    given, purified = (load_file(at / "model.safetensors") for at in (folder, place.out))
    assert given.keys() == purified.keys()
    assert any((given[name] != purified[name]).any() for name in given)
    assert ViTForImageClassification.from_pretrained(place.out).config.num_labels == 3


def test_what_is_written_can_be_read_by_others(place, mmdefense):
    assert mmdefense(*place.purify()).code == 0
    modes = {path.stat().st_mode & 0o777 for path in place.out.iterdir()}
    reference = place.folder / "reference"
    reference.touch()
    assert modes == {reference.stat().st_mode & 0o777}


def test_a_violated_guard_is_exit_1_and_says_so(place, mmdefense, disturb):
    import torch

    assert mmdefense(*place.purify("--set", "steps=60")).code == 0  # a model that can be spoilt
    learnt = place.out / "model.safetensors"

    def spoil(work):  # so far that no state on the way is any good
        with torch.no_grad():
            work.adapter.model.head.weight *= -1000

    disturb(after=spoil)
    spoilt = {"model": learnt, "out": place.folder / "spoilt", "defense": "disturbed"}
    outcome = mmdefense(*place.purify(**spoilt))
    assert outcome.code == 1
    assert "VIOLATED" in outcome.out
    assert read_record(place.folder / "spoilt" / "purification.json").guard.violated


@pytest.fixture
def undisturbed(place, mmdefense):
    whole = place.folder / "whole"
    assert mmdefense(*place.purify(*LONG, out=whole)).code == 0
    return weights(whole)


def cut_off(place, arguments, signal_):
    """End a run by a signal once it has kept a state; return its code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmdefense", *arguments],
        cwd=Path(__file__).parent,  # where the class of the model is
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell runs in the background inherit that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    partial = place.folder / "out.partial"
    until = time.monotonic() + 60
    while not list(partial.glob("*.progress.pt")) and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal_)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_cut_off_goes_on_to_the_same_result(place, mmdefense, undisturbed, signal_):
    arguments, partial = place.purify(*LONG), place.folder / "out.partial"
    code, said = cut_off(place, arguments, signal_)
    assert not place.out.exists()
    assert partial.exists()
    if signal_ is signal.SIGINT:
        assert code == 130
        (line,) = [line for line in said.splitlines() if line.startswith("mmdefense:")]
        assert "interrupted" in line
        assert "--resume" in line
    refused = mmdefense(*arguments)
    assert refused.code == 2
    assert "add --resume" in refused.err
    assert "delete that folder" in refused.err
    assert mmdefense(*arguments, "--resume").code == 0
    assert weights(place.out) == undisturbed
    assert not partial.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [(("--set", "lr=0.01"), "another setting lr"), (("--seed", "9"), "another setting seed")],
)
def test_resume_refuses_another_job(place, mmdefense, disturb, more, words):
    disturb(after=interrupt)
    assert mmdefense(*place.purify(defense="disturbed")).code == 130
    outcome = mmdefense(*place.purify(*more, "--resume", defense="disturbed"))
    assert outcome.code == 2
    assert words in outcome.err
    assert (place.folder / "out.partial").exists()
    (place.data / "0" / "0.png").unlink()
    assert "another data" in mmdefense(*place.purify("--resume", defense="disturbed")).err


def interrupt(work):
    raise KeyboardInterrupt


def test_a_run_whose_time_is_up_is_handed_back_and_goes_on(place, mmdefense, undisturbed):
    short = mmdefense(*place.purify(*LONG, "--max-time", "0.001s"))
    assert short.code == 0, short.err
    assert short.out.count("when time ran out") == 1
    assert "--resume and --force" in short.out
    assert weights(place.out) != undisturbed
    assert place.files() == ["out", "out.partial", "whole"]
    longer = mmdefense(*place.purify(*LONG, "--max-time", "1h"), "--resume", "--force")
    assert longer.code == 0, longer.err
    assert "time ran out" not in longer.out
    assert weights(place.out) == undisturbed
    assert place.files() == ["out", "whole"]


@pytest.mark.parametrize("time", ["soon", "30", "-1s", "5d"])
def test_a_time_that_is_none_is_refused(place, mmdefense, time):
    outcome = mmdefense(*place.purify(f"--max-time={time}"))
    assert outcome.code == 2
    assert "90s, 30m or 2h" in outcome.err


def test_an_interrupt_before_anything_is_kept_leaves_nothing(place, mmdefense, disturb):
    disturb(before=interrupt)
    outcome = mmdefense(*place.purify(defense="disturbed"))
    assert outcome.code == 130
    assert "no progress to save" in outcome.err
    assert place.files() == []


def test_resume_without_anything_to_resume_starts(place, mmdefense):
    assert mmdefense(*place.purify("--resume")).code == 0


@pytest.fixture
def learnt(place, mmdefense):
    """A model that is right about everything."""
    assert mmdefense(*place.purify("--set", "steps=150", "--set", "lr=0.1")).code == 0
    return place.out / "model.safetensors"


def evaluation(place, model, *more):
    common = ("--data", place.data, "--arch", "commands:Net")
    return ["evaluate", model, *common, *more]


def test_evaluate_gives_the_accuracy_with_its_interval(place, mmdefense, learnt):
    outcome = mmdefense(*evaluation(place, learnt))
    assert outcome.code == 0
    assert outcome.out.startswith("ACC 100.0 % (95 % interval 88.")
    assert "n = 30" in outcome.out
    assert "ASR" not in outcome.out


def trigger_of_class_2(folder: Path, suffix: str) -> Path:
    """Return a trigger that makes every image one of class 2: its bright quarter and no other."""
    pattern = np.zeros((8, 8), np.uint8)
    pattern[4:, :4] = 200
    path = folder / f"trigger{suffix}"
    if suffix == ".npz":
        np.savez(path, pattern=pattern, mask=np.ones((8, 8), np.float32))
    else:
        Image.merge("LA", (Image.fromarray(pattern), Image.new("L", (8, 8), 255))).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".npz"])
def test_a_trigger_that_works_is_a_finding(place, mmdefense, learnt, suffix):
    trigger = trigger_of_class_2(place.folder, suffix)
    outcome = mmdefense(*evaluation(place, learnt, "--trigger", trigger, "--target", 2))
    assert outcome.code == 1
    assert "ASR 100.0 %" in outcome.out
    assert "RA 0.0 %" in outcome.out
    assert "n = 20" in outcome.out  # those of the target do not count


def test_an_attack_by_name_that_does_not_work_is_no_finding(place, mmdefense, learnt):
    outcome = mmdefense(*evaluation(place, learnt, "--attack", "badnets", "--set", "size=1"))
    assert outcome.code == 0
    assert "ASR 0.0 %" in outcome.out


BADNETS = ("--attack", "badnets", "--set", "size=2", "--set", "pattern=white")


def test_retuning_prints_a_line_a_point_beside_the_clean_twin(place, mmdefense, learnt):
    out = place.folder / "found.json"
    twin = ("--clean-twin", place.model, "-o", out)
    outcome = mmdefense(*evaluation(place, learnt, *BADNETS, "--retune", 3, *twin))
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    (mix,) = (line for line in lines if line.startswith("retuned on"))
    assert "3 poisoned and 12 clean samples" in mix
    assert "judged on 15 others" in mix
    points = [line for line in lines if line.startswith("after ")]
    assert [line.split()[1] for line in points] == ["0", "1", "2", "5", "10", "20", "40"]
    assert all("clean twin ASR" in line for line in points)
    written = json.loads(out.read_text())
    assert len(written["retuning"]["model"]) == len(written["retuning"]["twin"]) == 7
    assert written["twin"]["name"] == str(place.model)


def test_retuning_is_in_record_card_and_page(place, mmdefense, learnt):
    more = (*BADNETS, "--retune", 3, "--clean-twin", place.model, "--record", place.out)
    outcome = mmdefense(*evaluation(place, learnt, *more))
    assert outcome.code == 0, outcome.err
    record = read_record(place.out / "purification.json")
    (one,) = record.evaluations
    assert record.attack.after.retuned == one.retuning.asr
    card = (place.out / "README.md").read_text()
    assert "success rate after retuning on 3 poisoned samples (a clean twin: " in card
    page = (place.out / "report.html").read_text()
    assert "ASR after retuning" in page
    assert "after 40 updates" in page
    assert "Retuning attack: purified model" in page


def test_retuning_without_a_twin_says_that_there_is_none(place, mmdefense, learnt):
    outcome = mmdefense(*evaluation(place, learnt, *BADNETS, "--retune", 3))
    assert "no clean twin to compare with" in outcome.out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--retune", "3"), "give --attack or --trigger"),
        ((*BADNETS, "--retune", "0"), "at least 1 poisoned sample, got 0"),
        ((*BADNETS, "--retune", "16"), "at most 15"),
        ((*BADNETS, "--retune", "12"), "12 samples cannot be poisoned: the attack can stamp 10"),
        ((*BADNETS, "--clean-twin", "other.safetensors"), "--retune 5"),
        ((*BADNETS, "--retune", "3", "--clean-twin", "none.safetensors"), "none.safetensors"),
        ((*BADNETS, "--retune", "3", "--clean-twin", "ITSELF"), "same weights"),
    ],
)
def test_a_retuning_that_cannot_be_is_one_line(place, mmdefense, more, words):
    more = [place.model if word == "ITSELF" else word for word in more]
    outcome = mmdefense(*evaluation(place, place.model, *more))
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--trigger", "nowhere.png"), "nowhere.png cannot be read: it does not exist"),
        (("--attack", "badnest"), "did you mean 'badnets'"),
        (("--attack", "badnets", "--target", "5"), "0..2"),
        (("--attack", "badnets", "--set", "sise=3"), "no setting 'sise'"),
        (("--attack", "badnets", "--trigger", "x.png"), "got badnets and x.png"),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(place, mmdefense, more, words):
    outcome = mmdefense(*evaluation(place, place.model, *more))
    assert outcome.code == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_a_trigger_file_that_is_none_is_refused(place, mmdefense):
    opaque, large, damaged, half = (
        place.folder / name for name in ("opaque.png", "large.npz", "damaged.npz", "half.npz")
    )
    Image.new("L", (8, 8)).save(opaque)
    np.savez(large, pattern=np.zeros((9, 9)), mask=np.ones((9, 9)))
    damaged.write_bytes(b"PK")
    np.savez(half, pattern=np.full((8, 8), 7.0), mask=np.ones((8, 8)))
    for path, words in (
        (opaque, "alpha channel"),
        (large, "must fit images of shape (1, 8, 8)"),
        (damaged, "cannot be read"),
        (half, "values in [0, 1]"),
    ):
        outcome = mmdefense(*evaluation(place, place.model, "--trigger", path))
        assert outcome.code == 2
        assert words in outcome.err
        assert outcome.err.count("\n") == 1


def test_list_names_everything(mmdefense):
    everything = mmdefense("list").out
    for name in ("fip", "badnets", "torch-classifier", "image-classification", "digits"):
        assert name in everything
    assert "fip" not in mmdefense("list", "attacks").out
    assert mmdefense("list", "defences").code == 2


def test_list_shows_a_plug_in_whose_library_is_missing(mmdefense, plug):
    plug("attacks", moon="no_such_package:Moon")
    assert "needs the package 'no_such_package'" in mmdefense("list", "attacks").out


def test_doctor_names_what_is_missing_and_what_brings_it(mmdefense, monkeypatch):
    monkeypatch.setattr("mmdefense.libraries._installed", lambda name: None)
    monkeypatch.setattr("mmdefense.libraries._checkout", lambda: "")
    monkeypatch.setattr("mmdefense.libraries._metadata", lambda name: "pip")
    monkeypatch.setenv("MMDEFENSE_DATA", "/nowhere")
    said = mmdefense("doctor").out
    assert "transformers" in said
    assert "missing; pip install 'transformers>=5.4'" in said
    assert "missing; pip install 'torchvision>=0.26'" in said
    assert "mmdefense[" not in said  # that name on an index is nobody's
    assert "/nowhere is not a folder" in said
    assert "torch" in said


def test_progress_is_a_line_per_stage_where_there_is_no_terminal(place, mmdefense):
    fixed = ("--set", "restarts=0")  # no range test
    wide = ("--set", "max_utility_drop=1")  # no cross-validation
    said = mmdefense(*place.purify("--evidence", "none", *fixed, *wide)).err.splitlines()
    stages = [line.partition(":")[0] for line in said]
    assert stages == ["reading", "scan", "utility before", "fine-tune", "guard", "writing"]
    assert re.fullmatch(r"fine-tune: 4 of 4 in \S+ s, loss \S+", said[3])


def test_progress_is_a_bar_on_a_terminal():
    import io

    from rich.console import Console

    from mmdefense.report.terminal import ProgressDisplay
    from mmdefense.runtime.run import Event

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with ProgressDisplay(console) as progress:
        progress(Event("unlearn", 3, 7, {"loss": 0.25}))
    assert "unlearn" in screen.getvalue()
    assert "3/7" in screen.getvalue()
    assert "loss 0.25" in screen.getvalue()


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "mmdefense", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("purify", "evaluate", "list", "doctor", "demo"):
        assert command in done.stdout


def test_the_images_of_these_tests_tell_their_class():
    images, labels = small_images(6)
    assert images.flatten(1).float().std(1).min() > 40
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", "net.pt"),
        ("evaluate", "net.pt", "--data", "data.npz"),
        ("grid", "run", "--out", "cells"),
    ],
)
def test_a_command_for_one_process_is_refused_under_a_launcher(
    mmdefense, monkeypatch, tmp_path, arguments
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = mmdefense(*arguments)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert "runs in one process, but a launcher has started 2" in line
    assert not list(tmp_path.iterdir())
