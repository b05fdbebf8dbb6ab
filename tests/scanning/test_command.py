"""``mmdefense scan``, called as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch


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


def reported(place, mmdefense, model, format_="json", name="baseline"):
    report = place.folder / name
    report.write_text(mmdefense("scan", model, "--format", format_).out)
    return report


@pytest.mark.parametrize("format_", ["json", "sarif"])
def test_what_the_baseline_has_is_known_and_is_exit_0(place, mmdefense, format_):
    model = evil(place)
    baseline = reported(place, mmdefense, model, format_)
    outcome = mmdefense("scan", model, "--baseline", baseline)
    assert outcome.code == 0
    assert "high, known" in outcome.out
    assert "Not in the baseline: 0 of" in " ".join(outcome.out.split())
    log = json.loads(mmdefense("scan", model, "--baseline", baseline, "--format", "sarif").out)
    assert {r["baselineState"] for r in log["runs"][0]["results"]} == {"unchanged"}
    page = mmdefense("scan", model, "--baseline", baseline, "--format", "html")
    assert (page.code, "known" in page.out) == (0, True)


def test_what_is_new_since_the_baseline_is_exit_1(place, mmdefense):
    folder = place.folder / "model"
    folder.mkdir()
    (folder / "setup.py").write_text("x = 1\n")
    baseline = reported(place, mmdefense, folder)
    (folder / "more.py").write_text("x = 1\n")
    outcome = mmdefense(
        "scan", folder, "--baseline", baseline, "--fail-on", "medium", "--format", "json"
    )
    assert outcome.code == 1
    states = {found["subject"]: found["known"] for found in json.loads(outcome.out)["findings"]}
    assert states == {"setup.py": True, "more.py": False}


def test_a_file_that_has_changed_is_looked_at_anew(place, mmdefense):
    folder = place.folder / "model"
    folder.mkdir()
    (folder / "setup.py").write_text("x = 1\n")
    baseline = reported(place, mmdefense, folder)
    arguments = ("scan", folder, "--baseline", baseline, "--fail-on", "medium")
    assert mmdefense(*arguments).code == 0
    (folder / "setup.py").write_text("import os\n")
    assert mmdefense(*arguments).code == 1


def test_findings_on_weights_are_known_though_they_were_trained_on(place, mmdefense):
    first, later = place.folder / "first.pt", place.folder / "later.pt"
    for path, row in ((first, 9.0), (later, 9.5)):
        weight = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        weight[3] = row
        torch.save({"head.weight": weight, "head.bias": torch.zeros(12)}, path)
    baseline = reported(place, mmdefense, first)
    assert mmdefense("scan", first, "--fail-on", "low").code == 1
    assert mmdefense("scan", later, "--fail-on", "low", "--baseline", baseline).code == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"findings": [{"id": "x"}]}', '{"runs": [{}]}'])
def test_what_is_no_baseline_is_one_line(place, mmdefense, text):
    baseline = place.folder / "baseline"
    baseline.write_text(text)
    outcome = mmdefense("scan", place.model, "--baseline", baseline)
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert str(baseline) in outcome.err


def config(place, text):
    path = place.folder / "scan.toml"
    path.write_text(text)
    return path


def test_options_come_from_a_file_and_the_command_line_wins(place, mmdefense):
    model = evil(place)
    baseline = reported(place, mmdefense, model)
    given = config(place, f"format = 'json'\nfail-on = 'low'\nseed = 3\nbaseline = '{baseline}'\n")
    outcome = mmdefense("scan", model, "--config", given)
    assert outcome.code == 0
    assert all(found["known"] for found in json.loads(outcome.out)["findings"])
    outcome = mmdefense("scan", "--format", "sarif", model, "--config", given)
    assert json.loads(outcome.out)["version"] == "2.1.0"


def test_flags_lists_and_required_options_come_from_a_file(place, mmdefense):
    given = config(
        place,
        f"data = '{place.data}'\nout = '{place.out}'\narch = 'commands:Net'\n"
        "defense = 'fine-tuning'\nset = ['steps=2', 'batch_size=8']\ndry-run = true\n",
    )
    outcome = mmdefense("purify", place.model, "--config", given)
    assert outcome.code == 0, outcome.err
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fail_on = 'low'", "has 'fail_on', and mmdefense scan has no such option; did you mean"),
        ("zzz = 1", "no such option; known are data, task, "),
        ("config = 'other.toml'", "no such option"),
        ("model = 'net.pt'", "no such option"),
        ("fail-on = ['low']", "fail-on of config"),
        ("fail-on = true", "must be one text or number"),
        ("accept-low-utility = 'yes'", "must be true or false, got 'yes'"),
        ("read = 'frames=3'", "must be a list of texts"),
        ("[scan]\nseed = 1", "no such option"),
        ("fail-on = ", "cannot be read as TOML"),
        ("seed = 'x'", "seed"),
        ("fail-on = 'never'", "--fail-on must be one of"),
    ],
)
def test_a_file_with_what_is_no_option_is_one_line(place, mmdefense, text, said):
    outcome = mmdefense("scan", place.model, "--config", config(place, text))
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert said in outcome.err


def test_a_config_that_is_not_there_is_one_line(place, mmdefense):
    outcome = mmdefense("scan", place.model, "--config", place.folder / "none.toml")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)


def test_several_models_are_scanned_one_after_the_other(place, mmdefense):
    outcome = mmdefense("scan", evil(place), place.model)
    assert outcome.code == 1
    assert [line for line in outcome.out.splitlines() if line.endswith(":")] == [
        f"{place.folder / 'evil.bin'}:",
        f"{place.model}:",
    ]
    assert mmdefense("scan", place.model, place.model).code == 0


@pytest.mark.parametrize("more", [("--format", "sarif"), ("--data", "data")])
def test_what_takes_one_model(place, mmdefense, more):
    outcome = mmdefense("scan", place.model, evil(place), *more)
    assert (outcome.code, outcome.out) == (2, "")
    assert "takes one MODEL, got 2" in outcome.err


NESTED = """
import sys
from pathlib import Path
import torch
import mmdefense as mmd
from mmdefense.sandbox import differentiates_in_child

class Nested(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, depth):
        ctx.depth = depth
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.depth:
            with torch.enable_grad():
                value = torch.ones((), requires_grad=True)
                Nested.apply(value, ctx.depth - 1).backward()
        return gradient, None

assert differentiates_in_child()
Nested.apply(torch.ones((), requires_grad=True), 100).backward()
assert not differentiates_in_child()
found = mmd.scan(sys.argv[1], sys.argv[2], arch=sys.argv[3], accept_low_utility=True, progress=None)
print(found.parts)
"""


def test_after_gradients_in_threads_the_behaviour_is_scanned_all_the_same(place):
    """Gradients so deep start threads, as any do where there is an accelerator."""
    command = [sys.executable, "-c", NESTED, str(place.model), str(place.data), "commands:Net"]
    path = os.pathsep.join([str(Path(commands.__file__).parent), *sys.path])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=place.folder,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "behaviour" in done.stdout
