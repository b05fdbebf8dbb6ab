"""The site of the documents: what its navigation has, and what it takes from the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from commands import tool
from mkdocs.config import load_config

from mmdefense.scanning.sarif import HOMEPAGE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load_hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
NAV = load_config(str(ROOT / "mkdocs.yml")).nav
WRITTEN = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_every_page_is_in_the_navigation_once():
    listed = [path for _, _, path in HOOKS.pages(NAV)]
    assert sorted(listed) == sorted(WRITTEN | HOOKS.reference().keys())


def test_llms_txt_has_every_page_with_what_it_is_about():
    rows = re.findall(r"^- \[(.+)\]\((\S+)\.html\): (\S.*)$", HOOKS.llms_txt(NAV), re.MULTILINE)
    assert {f"{path}.md" for _, path, _ in rows} == WRITTEN | HOOKS.reference().keys()


def test_reference_has_every_module_that_names_what_is_public():
    text = "\n".join(HOOKS.reference().values())
    named = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    for package in ("mmdefense", "adapters/mmdefense_adapters", "tasks/mmdefense_tasks"):
        for path in (ROOT / package).rglob("*.py"):
            dotted = ".".join(path.relative_to((ROOT / package).parent).with_suffix("").parts)
            public = "\n__all__ = [" in path.read_text() and path.stem != "__init__"
            assert (dotted in named) == public, dotted


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("../../mmdefense/defenses/clp.py", f"{HOMEPAGE}/blob/main/mmdefense/defenses/clp.py"),
        ("../../recipes", f"{HOMEPAGE}/tree/main/recipes"),
        ("../concepts.md", "../concepts.md"),
    ],
)
def test_links_out_of_the_site_lead_to_the_repository(target, expected):
    assert HOOKS.outside("howto/add_a_defense.md", target) == expected


@pytest.mark.slow
def test_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    code, said = tool("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path))
    assert code == 0, said
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]* src=[\"']?(\w+:|//)|<link[^>]* href=[\"']?(\w+:|//)",
            page.read_text(),
        )
        assert not loaded, page
