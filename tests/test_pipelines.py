"""The GitHub action and the pre-commit hook: valid files, whose steps do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import tool

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
PAGE = (ROOT / "docs" / "howto" / "scan_in_a_pipeline.md").read_text()
WORKFLOW, PRE_COMMIT = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
STEPS = {step.get("name") or step.get("id"): step for step in ACTION["runs"]["steps"]}
# What an earlier or a foreign step gives to a later one.
GIVEN = {"steps.python.outputs.python-path": "python3"}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("vendor.github-actions", (ROOT / "action.yml").read_text()),
        ("vendor.github-workflows", WORKFLOW),
    ],
    ids=["action", "workflow"],
)
def test_the_files_for_github_are_valid(tmp_path, schema, text):
    (tmp_path / "file.yml").write_text(text)
    code, said = tool("check-jsonschema", "--builtin-schema", schema, str(tmp_path / "file.yml"))
    assert code == 0, said


def test_the_files_for_pre_commit_are_valid(tmp_path):
    (tmp_path / "config.yaml").write_text(PRE_COMMIT)
    code, said = tool("pre-commit", "validate-config", str(tmp_path / "config.yaml"))
    assert (code, "WARNING" in said) == (0, False), said
    code, said = tool("pre-commit", "validate-manifest", str(ROOT / ".pre-commit-hooks.yaml"))
    assert (code, "WARNING" in said) == (0, False), said


def test_the_page_names_what_there_is():
    (job,) = yaml.safe_load(WORKFLOW)["jobs"].values()
    given = job["steps"][-1]["with"]
    inputs = ACTION["inputs"]
    assert given.keys() <= inputs.keys()
    assert {name for name, its in inputs.items() if its.get("required")} <= given.keys()
    table = "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE))
    assert set(re.findall(r"`([\w-]+)`", table)) == inputs.keys()
    (repo,) = yaml.safe_load(PRE_COMMIT)["repos"]
    assert [hook["id"] for hook in repo["hooks"]] == [HOOK["id"]]


def test_no_input_is_put_into_a_script():
    for step in STEPS.values():
        assert "${{" not in step.get("run", "")


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Return a function that runs a step of the action as GitHub's runner does."""
    temp = tmp_path / "runner"
    programs = temp / "mmdefense" / "bin"
    programs.mkdir(parents=True)
    for name, command in (
        ("python", sys.executable),
        ("mmdefense", f"{sys.executable} -m mmdefense"),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    output = tmp_path / "output"
    output.touch()
    monkeypatch.chdir(tmp_path)

    def value(text, inputs):
        """Return a value of the file with its expressions replaced."""

        def given(found):
            if found[1] in GIVEN:
                return GIVEN[found[1]]
            if found[1] == "steps.scan.outputs.exit-code":
                return output.read_text().strip().rpartition("=")[2]
            name = found[1].removeprefix("inputs.")
            return inputs.get(name, ACTION["inputs"][name].get("default", ""))

        return re.sub(r"\$\{\{ ([\w.-]+) \}\}", given, text)

    def run(name, inputs, **more):
        step = STEPS[name]
        assert step["shell"] == "bash"
        script = tmp_path / "step.sh"
        script.write_text(step["run"])
        its = {key: value(text, inputs) for key, text in step["env"].items()}
        github = {
            "RUNNER_TEMP": str(temp),
            "GITHUB_OUTPUT": str(output),
            "GITHUB_ACTION_PATH": str(ROOT),
        }
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | github | its | more,
        )

    return run


@pytest.fixture
def evil(tmp_path):
    folder = tmp_path / "models" / "$(touch injected) net"
    folder.mkdir(parents=True)
    (folder / "evil\n::error::.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return folder.relative_to(tmp_path)


def test_a_model_with_findings_fails_after_its_log_was_written(runner, evil):
    inputs = {"model": str(evil)}
    scanned = runner("Scan", inputs)
    assert scanned.returncode == 0, scanned.stderr
    assert "error: pickle-import" in scanned.stdout
    assert "do not load this model" in scanned.stdout
    assert not [line for line in scanned.stdout.splitlines() if line.startswith("::")]
    assert not Path("injected").exists()
    log = json.loads(Path("mmdefense.sarif").read_text())
    (place,) = log["runs"][0]["results"][0]["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"].startswith("models/")
    assert runner("Fail on findings", inputs).returncode == 1


def test_what_the_inputs_say_is_passed_on(runner, evil):
    inputs = {"model": str(evil), "sarif-file": "known.sarif"}
    runner("Scan", inputs)
    Path("scan.toml").write_text("seed = 1\n")
    inputs |= {"baseline": "known.sarif", "config": "scan.toml", "fail-on": "low"}
    inputs |= {"sarif-file": "new.sarif"}
    assert runner("Scan", inputs).returncode == 0
    assert "unchanged" in Path("new.sarif").read_text()
    assert runner("Fail on findings", inputs).returncode == 0


@pytest.mark.parametrize("inputs", [{"model": "nowhere"}, {"model": "models", "fail-on": "never"}])
def test_bad_input_ends_the_action_at_once(runner, evil, inputs):
    scanned = runner("Scan", inputs)
    assert (scanned.returncode, scanned.stdout) == (2, "")
    assert scanned.stderr.startswith("mmdefense: ")


def test_mmdefense_is_installed_into_an_environment_of_its_own(runner, tmp_path):
    """The installation itself needs an index of packages; its commands are looked at."""
    programs = tmp_path / "programs"
    programs.mkdir()
    stub = '#!/bin/sh\necho "$(basename "$0")" "$@" >> "$LOG"\n'
    for path in (
        programs / "python3",
        *(tmp_path / "runner/mmdefense/bin" / n for n in ("pip", "uv")),
    ):
        path.write_text(stub)
        path.chmod(0o755)
    log = tmp_path / "log"
    search = f"{programs}{os.pathsep}{os.environ['PATH']}"
    step = "Install mmdefense with the CPU build of PyTorch"
    inputs = {"extras": "timm,huggingface", "packages": "einops  open-clip"}
    done = runner(step, inputs, LOG=str(log), PATH=search)
    assert done.returncode == 0, done.stderr
    assert runner(step, {}, LOG=str(log), PATH=search).returncode == 0
    place = tmp_path / "runner" / "mmdefense"
    install = f"uv pip install --quiet --torch-backend cpu --python {place}"
    assert log.read_text().splitlines() == [
        f"python3 -m venv {place}",
        "pip install --quiet uv",
        f"{install} mmdefense[timm,huggingface] @ file://{ROOT} einops open-clip",
        f"python3 -m venv {place}",
        "pip install --quiet uv",
        f"{install} mmdefense @ file://{ROOT}",
    ]


def test_pre_commit_refuses_a_file_that_runs_code(tmp_path, monkeypatch):
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "cache"))
    tmp_path = tmp_path / "repository"
    tmp_path.mkdir()
    local = HOOK | {
        "language": "system"
    }  # the hook as it is, with the mmdefense of this environment
    config = {"repos": [{"repo": "local", "hooks": [local]}]}
    (tmp_path / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "notes.txt").write_text("no model\n")
    assert tool("git", "init", "-q", folder=tmp_path)[0] == 0
    tool("git", "add", "-A", folder=tmp_path)
    assert "Skipped" in tool("pre-commit", "run", "--all-files", folder=tmp_path)[1]
    np.save(tmp_path / "good.npy", np.zeros(3))
    (tmp_path / "Evil.PKL").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    tool("git", "add", "-A", folder=tmp_path)
    code, said = tool("pre-commit", "run", "--all-files", folder=tmp_path)
    assert code == 1
    assert "Evil.PKL:" in said
    assert "posix.system" in said or "os.system" in said
    assert "good.npy:" in said
