"""The container image, as far as it can be tried without Docker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Instruction:
    name: str
    value: str


def stages() -> list[list[Instruction]]:
    """Return the instructions of the Dockerfile by stage, each on one line."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    found: list[list[Instruction]] = []
    for line in lines:
        name, _, value = line.partition(" ")
        if not line or line.startswith("#"):
            continue
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, " ".join(value.split())))
    return found


BUILD, IMAGE = stages()


def copied(stage) -> list[str]:
    """Return what a stage copies out of the checkout."""
    pairs = (one.value.split() for one in stage if one.name == "COPY")
    return [name for *names, _ in pairs for name in names if not name.startswith("-")]


def test_everything_that_the_package_is_built_from_is_in_the_image():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {package.partition("/")[0] for package in packages}
    needed |= {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    assert needed <= set(copied(BUILD))


def test_only_what_is_copied_gets_into_the_context():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == set(copied(BUILD))
    assert all((ROOT / name).exists() for name in copied(BUILD))


def test_the_image_runs_mmdefense_and_not_as_root():
    last = {one.name: one.value for one in IMAGE}
    assert int(last["USER"]) > 0
    assert last["ENTRYPOINT"] == '["mmdefense"]'
    order = [one.name for one in IMAGE]
    assert order.index("USER") > max(n for n, name in enumerate(order) if name in {"RUN", "COPY"})


@pytest.mark.slow
def test_the_steps_of_the_build_make_an_environment_that_scans(tmp_path):
    """Run the steps as a script, with the folders of the image below a temporary one.

    Extras are left out, and so is the choice of the CPU build: it is at another address than other
    packages, which a test must not need.
    """
    source, made = tmp_path / "source", tmp_path / "opt" / "mmdefense"
    source.mkdir()
    for name in copied(BUILD):
        there = ROOT / name
        if there.is_dir():
            shutil.copytree(there, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(there, source / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"EXTRAS": ""}
    for one in BUILD:
        if one.name == "RUN":
            command = re.sub(r"(?<=[ /])/(opt|source)\b", rf"{tmp_path}/\1", f" {one.value}")
            command = re.sub(r"file:///(opt|source)\b", rf"file://{tmp_path}/\1", command)
            command = re.sub(r"\bpython -m venv", f"{shutil.which('python')} -m venv", command)
            subprocess.run(["bash", "-ec", command], cwd=source, env=environment, check=True)
    shutil.rmtree(source)  # the second stage has it no more
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for arguments, code in ((["--version"], 0), (["scan", "evil.pkl"], 1)):
        done = subprocess.run(
            [made / "bin" / "mmdefense", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == code, done.stderr
    assert "do not load this model" in done.stdout
    assert not (made / "bin" / "uv").exists()
