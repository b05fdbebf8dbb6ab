"""What is published: the metadata, and a wheel that works without the checkout."""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from commands import tool

import mmdefense
from mmdefense.scanning.sarif import HOMEPAGE

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ("vendor.citation-file-format", "CITATION.cff"),
        ("vendor.github-workflows", ".github/workflows/release.yml"),
    ],
)
def test_files_for_others_are_valid(schema, name):
    code, said = tool("check-jsonschema", "--builtin-schema", schema, str(ROOT / name))
    assert code == 0, said


def test_version_and_address_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(url.startswith(HOMEPAGE) for url in project["urls"].values())
    assert (CITATION["version"], CITATION["repository-code"]) == (mmdefense.__version__, HOMEPAGE)
    assert re.search(rf"url = {{{HOMEPAGE}}}", (ROOT / "README.md").read_text())


def test_links_of_the_readme_work_on_the_package_index():
    targets = re.findall(
        r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(targets) > 8
    assert not [a + b for a, b in targets if not (a + b).startswith(("https://", "#"))]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build the distributions, the wheel out of the source distribution as ``build`` does it."""
    folder = tmp_path_factory.mktemp("dist")
    code, said = tool("uv", "build", "--out-dir", str(folder), str(ROOT))
    assert code == 0, said
    return folder


@pytest.mark.slow
def test_the_distributions_are_what_the_index_takes(dist):
    wheel, source = sorted(dist.glob("mmdefense-*"), key=lambda path: path.suffix != ".whl")
    code, said = tool("uv", "tool", "run", "twine", "check", "--strict", str(wheel), str(source))
    assert code == 0, said
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    known = f"mmdefense-{mmdefense.__version__}.dist-info"
    assert tops == {"mmdefense", "mmdefense_adapters", "mmdefense_tasks", known}
    needed = ("py.typed", "report/templates/page.html.j2", "evaluation/zoo.toml")
    assert {f"mmdefense/{name}" for name in needed} <= set(names)


MODEL = """
import numpy as np
from safetensors.torch import save_file
import torch
from torch import nn

class SignNet(nn.Sequential):
    def __init__(self):
        pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), *pooled, nn.Linear(32, 3))

if __name__ == "__main__":
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = 80 * labels[:, None, None, None] + random.integers(0, 60, (60, 8, 8, 3))
    images = images.astype("uint8")
    np.savez("images.npz", images=images, labels=labels)
    net = SignNet()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    for _ in range(200):
        loss = nn.functional.cross_entropy(net(inputs), torch.from_numpy(labels))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    save_file(net.state_dict(), "model.safetensors")
"""


@pytest.mark.slow
def test_the_wheel_alone_scans_and_purifies(dist, tmp_path, monkeypatch):
    """The core without extras, in an environment and a folder that know nothing of the checkout."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (wheel,) = dist.glob("*.whl")
    python = tmp_path / "environment" / "bin" / "python"
    for words in (
        ("venv", "--quiet", "--python", sys.executable, str(tmp_path / "environment")),
        (
            "pip",
            "install",
            "--quiet",
            "--python",
            str(python),
            "-c",
            ROOT / "constraints.txt",
            wheel,
        ),
    ):
        code, said = tool("uv", *map(str, words))
        assert code == 0, said
    place = tmp_path / "place"
    place.mkdir()
    (place / "my_models.py").write_text(MODEL)
    model = ("model.safetensors", "--arch", "my_models:SignNet", "--data", "images.npz")
    for words in (
        ("my_models.py",),
        ("-m", "mmdefense", "doctor"),
        ("-m", "mmdefense", "scan", *model),
        (
            "-m",
            "mmdefense",
            "purify",
            *model,
            "--defense",
            "fine-tuning",
            "--set",
            "steps=5",
            "-o",
            "out",
        ),
        ("-m", "mmdefense", "evaluate", "out/model.safetensors", *model[1:]),
        ("-m", "mmdefense", "report", "out"),
    ):
        code, said = tool(str(python), *words, folder=place)
        assert code == 0, said
    code, said = tool(
        str(python), "-c", "import mmdefense as m; print(m.__version__, m.__file__)", folder=place
    )
    assert said.split() == [
        mmdefense.__version__,
        str(next(python.parents[1].glob("lib/*/site-packages/mmdefense/__init__.py"))),
    ]
