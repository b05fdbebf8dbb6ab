"""Whatever is wrong with the input: one clear line, exit 2 or 3, nothing written or lost."""

from __future__ import annotations

import errno
import os
import pickle
import re

import numpy as np
import pytest
import torch
from commands import Net, small_images, write_images
from PIL import Image
from safetensors.torch import load_file, save_file

BEFORE = re.compile(
    r"[\w :-]+: (done|\d+ of \d+|stopped at \d+ of \d+)( in \S+ s)?(, .*)?|.* \.\.\."
    r"|mmdefense: note: .*"
)


def refused(outcome, *words, code=2):
    """Check that an outcome is one line with these words; stages and notes may come before it."""
    lines = [line for line in outcome.err.splitlines() if not BEFORE.fullmatch(line)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("mmdefense: ")
    for word in words:
        assert word in lines[0]
    assert outcome.code == code
    assert outcome.out == ""


def test_a_missing_model(place, mmdefense):
    refused(mmdefense(*place.purify(model="nowhere.pt")), "nowhere.pt", "does not exist")
    assert place.files() == []


def test_an_unreadable_model(place, mmdefense):
    broken = place.folder / "broken.safetensors"
    broken.write_bytes(b"no weights")
    refused(mmdefense(*place.purify(model=broken)), "broken.safetensors", "cannot be read")
    assert place.files() == ["broken.safetensors"]


class RunsCode:
    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return os.mkdir, (str(self.touched),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(place, mmdefense):
    touched = place.folder / "touched"
    evil = place.folder / "evil.pt"
    torch.save({"conv.weight": RunsCode(touched)}, evil)
    refused(mmdefense(*place.purify(model=evil)), "refused and nothing in it executed", "mkdir")
    assert place.files() == ["evil.pt"]
    torch.load(evil, weights_only=False)  # it would have
    assert touched.exists()


def test_a_plain_pickle_that_would_run_code_is_refused(place, mmdefense):
    evil = place.folder / "evil.bin"
    evil.write_bytes(pickle.dumps(RunsCode(place.folder / "touched")))
    refused(mmdefense(*place.purify(model=evil)), "refused")
    assert place.files() == ["evil.bin"]


def test_keys_that_do_not_match(place, mmdefense):
    state = load_file(place.model)
    state["stray"] = state.pop("head.bias")
    save_file(state, place.model)
    refused(mmdefense(*place.purify()), "missing: head.bias", "unexpected: stray")
    assert place.files() == []


def test_nan_weights(place, mmdefense):
    state = load_file(place.model)
    state["conv.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, place.model)
    refused(mmdefense(*place.purify()), "'conv.weight'", "NaN")
    assert place.files() == []


def test_no_architecture(place, mmdefense):
    arguments = place.purify()
    del arguments[arguments.index("--arch") : arguments.index("--arch") + 2]
    refused(mmdefense(*arguments), "--arch module:callable")


def test_an_empty_data_folder(place, mmdefense):
    empty = place.folder / "empty"
    empty.mkdir()
    refused(mmdefense(*place.purify(data=empty)), "got no image")
    assert place.files() == ["empty"]


def test_missing_data(place, mmdefense):
    refused(mmdefense(*place.purify(data="nowhere")), "'nowhere'", "none found")


def test_a_corrupt_image(place, mmdefense):
    (place.data / "1" / "1.png").write_bytes(b"no picture")
    refused(mmdefense(*place.purify()), "1.png", "cannot be decoded")
    assert place.files() == []


def test_wrong_channel_count(place, mmdefense):
    words = ("cannot read images of shape (3, 8, 8)", "--channels")
    refused(mmdefense(*place.purify("--channels", "3")), *words)
    assert place.files() == []


def test_mixed_channel_counts(place, mmdefense):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(place.data / "1" / "1.png")
    refused(mmdefense(*place.purify()), "1 channel", "1.png")
    assert place.files() == []


def test_labels_outside_the_classes(place, mmdefense):
    images, labels = small_images(1)
    write_images(place.data, images, labels + 7)
    refused(mmdefense(*place.purify()), "labels must lie in 0..2", "got 7")
    assert place.files() == []


def test_fewer_samples_than_classes(place, mmdefense):
    few = place.folder / "few"
    write_images(few, *small_images(2))
    refused(mmdefense(*place.purify(data=few)), "at least one sample per class (3), got 2")
    assert place.files() == ["few"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--defense", "fibp"), ("unknown defense 'fibp'", "did you mean 'fip'?")),
        (("--set", "stepz=3"), ("no setting 'stepz'", "steps")),
        (("--set", "steps=many"), ("steps", "whole number", "'many'")),
        (("--set", "steps=-1"), ("steps", "-1")),
        (("--max-utility-drop", "2"), ("max_utility_drop must lie in [0, 1]", "2")),
        (("--device", "warp"), ("device 'warp'",)),
        (("--mean", "0.5"), ("mean and std",)),
        (("--mean", "0.5,0.5", "--std", "1,1"), ("a value for each channel", "got 2", "(1, 8, 8)")),
    ],
)
def test_settings_that_cannot_be(place, mmdefense, arguments, words):
    refused(mmdefense(*place.purify(*arguments)), *words)
    assert place.files() == []


@pytest.mark.parametrize("arguments", [("--set", "steps"), ("--mean", "grey"), ("--channels", "9")])
def test_options_that_cannot_be_parsed(place, mmdefense, arguments):
    outcome = mmdefense(*place.purify(*arguments))
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert place.files() == []


def test_what_a_defense_cannot_serve_is_exit_3(place, mmdefense, disturb):
    from mmdefense.errors import UnsupportedError

    def unfit(work):
        raise UnsupportedError("FineTuning needs a moon; there is none")

    disturb(before=unfit)
    refused(mmdefense(*place.purify(defense="disturbed")), "needs a moon", code=3)
    assert place.files() == []


DIVERGES = ("--set", "lr=1e30", "--set", "max_norm=None", "--set", "restarts=0")


def test_a_loss_that_turns_nan_at_once_leaves_nothing(place, mmdefense):
    refused(mmdefense(*place.purify(*DIVERGES)), "stopped being finite", "smaller learning rate")
    assert place.files() == []


def test_a_loss_that_turns_nan_keeps_the_last_good_state(place, mmdefense, disturb):
    def good_step(work):
        with torch.no_grad():
            work.adapter.model.head.bias += 0.01

    disturb(before=good_step)
    outcome = mmdefense(*place.purify(*DIVERGES, defense="disturbed"))
    kept = place.folder / "out.partial" / "last_good.safetensors"
    refused(outcome, "stopped being finite", str(kept), "smaller learning rate")
    assert place.files() == ["out.partial"]
    net = Net()
    net.load_state_dict(load_file(kept))
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_an_output_folder_that_exists(place, mmdefense):
    place.out.mkdir()
    (place.out / "diary.txt").write_text("dear diary")
    refused(mmdefense(*place.purify()), "out", "--force")
    refused(mmdefense(*place.purify("--force")), "has no record of an earlier output")
    assert [path.name for path in place.out.iterdir()] == ["diary.txt"]


def test_force_replaces_an_earlier_output(place, mmdefense):
    assert mmdefense(*place.purify()).code == 0
    refused(mmdefense(*place.purify()), "--force")
    before = (place.out / "model.safetensors").read_bytes()
    assert mmdefense(*place.purify("--force", "--seed", "1")).code == 0
    assert (place.out / "model.safetensors").read_bytes() != before
    assert place.files() == ["out"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_start_leaves_nothing(place, mmdefense, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    refused(mmdefense(*place.purify()), "out.partial", "No space left on device")
    assert place.files() == []


def test_a_full_disk_at_the_end_loses_nothing(place, mmdefense, disturb, monkeypatch):
    with monkeypatch.context() as disk:
        disturb(after=lambda work: disk.setattr(os, "fsync", no_space))
        wide = ("--set", "max_utility_drop=1")  # no cross-validation, which is reported
        outcome = mmdefense(*place.purify(*wide, defense="disturbed"))
    refused(outcome, "No space left on device", "out.partial", "--resume")
    assert place.files() == ["out.partial"]
    disturb()
    assert mmdefense(*place.purify("--resume", *wide, defense="disturbed")).code == 0
    assert place.files() == ["out"]


def test_pytorch_hiding_a_full_disk_is_seen_through(tmp_path, monkeypatch):
    from mmdefense.checkpoints.runs import RunStore

    class FullDisk:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            no_space()

    monkeypatch.setattr(
        "mmdefense.checkpoints.runs.write_atomically",
        lambda path, write: write(FullDisk(path)),
    )
    with pytest.raises(OSError, match="No space left"):
        RunStore(tmp_path).save("state", {"weights": torch.zeros(3)})


def test_debug_shows_the_traceback(place, mmdefense, monkeypatch):
    monkeypatch.setenv("MMDEFENSE_DEBUG", "1")
    from mmdefense.cli.app import main
    from mmdefense.errors import BadInputError

    monkeypatch.setattr("sys.argv", ["mmdefense", *place.purify(model="nowhere.pt")])
    with pytest.raises(BadInputError):
        main()


def fault(work):
    raise KeyError("oops")


def test_a_fault_of_ours_is_one_line_too(place, mmdefense, disturb):
    disturb(before=fault)
    outcome = mmdefense(*place.purify(defense="disturbed"))
    refused(outcome, "internal error: KeyError", code=70)
    assert place.files() == []  # nothing that could be gone on with


def test_a_fault_after_states_were_kept_says_where_they_are(place, mmdefense, disturb):
    disturb(after=fault)
    outcome = mmdefense(*place.purify(defense="disturbed"))
    refused(outcome, "KeyError", "out.partial", "--resume", code=70)
    assert place.files() == ["out.partial"]
    disturb()
    assert mmdefense(*place.purify("--resume", defense="disturbed")).code == 0


def test_after_a_loss_that_turned_nan_another_try_begins_afresh(place, mmdefense):
    diverging = ("--set", "lr=1e30", "--set", "max_norm=None", "--set", "restarts=0")
    assert mmdefense(*place.purify(*diverging)).code == 2
    assert mmdefense(*place.purify()).code == 0
    assert place.files() == ["out"]


def test_a_run_that_another_process_has_begun_is_left_alone(place, mmdefense):
    from mmdefense.checkpoints.folders import reserved

    for force in ((), ("--force",)):
        with reserved(place.out):
            refused(mmdefense(*place.purify(*force)), "another run is writing", str(place.out))
    assert place.files() == []
    assert mmdefense(*place.purify()).code == 0
