"""``mmdefense scan``, called as a user calls it."""

from __future__ import annotations

import json

import pytest


def evil(place):
    path = place.folder / "evil.bin"
    path.write_bytes(f"cos\nmkdir\n(S'{place.folder}/touched'\ntR.".encode())
    return path


def test_a_sound_model_is_exit_0_and_not_called_clean(place, mmdefense):
    outcome = mmdefense("scan", place.model)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Looked at: files, weights; not looked at: behaviour" in " ".join(outcome.out.split())
    assert "clean" not in outcome.out


def test_a_malicious_file_is_exit_1_and_named(place, mmdefense):
    outcome = mmdefense("scan", evil(place))
    assert outcome.code == 1
    assert "os.mkdir" in outcome.out
    assert "do not load this model" in outcome.out
    assert place.files() == ["evil.bin"]


@pytest.mark.parametrize(("level", "code"), [("low", 1), ("medium", 1), ("high", 0)])
def test_fail_on_says_what_is_exit_1(place, mmdefense, level, code):
    (place.folder / "model").mkdir()
    (place.folder / "model" / "setup.py").write_text("x = 1\n")
    assert mmdefense("scan", place.folder / "model", "--fail-on", level).code == code


@pytest.mark.parametrize(("format_", "key"), [("json", "findings"), ("sarif", "runs")])
def test_other_programs_can_read_it(place, mmdefense, format_, key):
    outcome = mmdefense("scan", evil(place), "--format", format_)
    assert outcome.code == 1
    assert json.loads(outcome.out)[key]


def test_a_model_that_is_not_there_is_exit_2(place, mmdefense):
    outcome = mmdefense("scan", "nowhere")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines() == [
        "mmdefense: model 'nowhere' must be a file, a folder or a hub id; none found"
    ]


@pytest.mark.parametrize("arguments", [("--format", "xml"), ("--fail-on", "never")])
def test_options_that_cannot_be(place, mmdefense, arguments):
    outcome = mmdefense("scan", place.model, *arguments)
    assert outcome.code == 2
    assert "must be one of" in outcome.err


def test_all_files_of_a_hub_id_are_looked_into(place, mmdefense, monkeypatch):
    import huggingface_hub

    def given(repo, allow_patterns):
        assert (repo, allow_patterns) == ("some/model", None)
        evil(place)
        return str(place.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", given)
    outcome = mmdefense("scan", "some/model")
    assert outcome.code == 1
    assert "os.mkdir" in outcome.out


def with_data(place, *more, model=None):
    return ("scan", model or place.model, "--data", place.data, "--arch", "commands:Net", *more)


def test_with_data_the_behaviour_is_looked_at(place, mmdefense):
    outcome = mmdefense(*with_data(place, "--format", "json", "--fail-on", "high"))
    found = json.loads(outcome.out)
    assert outcome.code == int(any(f["level"] == "high" for f in found["findings"]))
    assert found["parts"] == ["files", "weights", "behaviour"]
    assert "behaviour-smoothness" in {finding["id"] for finding in found["findings"]}


def test_a_malicious_model_is_not_loaded_for_its_behaviour(place, mmdefense):
    outcome = mmdefense(*with_data(place, "--format", "json", model=evil(place)))
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert found["parts"] == ["files"]
    (remark,) = [f for f in found["findings"] if f["id"] == "behaviour-not-looked-at"]
    assert "not loaded" in remark["value"]
    assert place.files() == ["evil.bin"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--data", "nowhere"), "nowhere"),
        (("--arch", "commands:Nothing"), "Nothing"),
        (("--task", "image"), "unknown task 'image'"),
        (("--read", "frames=3"), "has no option 'frames'"),
    ],
)
def test_data_or_a_model_that_cannot_be_read_is_one_line(place, mmdefense, more, said):
    outcome = mmdefense(*with_data(place, *more))
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err.splitlines()[-1]
