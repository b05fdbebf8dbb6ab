"""The notebooks of the gallery: small, with what they show, and they run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from scripts import load_script

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "gallery"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


SCRIPT = load_script(FOLDER / "execute.py")


@each
def test_notebook_is_valid_small_and_as_the_script_writes_it(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 150_000
    kept = nbformat.writes(notebook)
    SCRIPT.strip(notebook)
    assert nbformat.writes(notebook) == kept


@each
def test_notebook_shows_plots_no_warnings_and_no_path_of_a_machine(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not re.search(r"/(home|root|Users|tmp|work|usr|mnt|private|var)/", path.read_text())
    assert "\nassert " in "\n" + cells[-1].source


@each
def test_page_of_the_gallery_has_the_notebook(path):
    page = (ROOT / "docs" / "gallery.md").read_text()
    assert f"(../gallery/{path.name})" in page
    assert f"<!-- notebook: {path.stem} -->" in page


@pytest.mark.slow
@each
def test_notebook_runs(path, tmp_path):
    """Its last cell holds what it measured to bounds."""
    SCRIPT.execute(path, tmp_path)
