"""The site of the documents: what its navigation has, and what it takes from the code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Interval
from commands import tool
from mkdocs.config import load_config
from scripts import load_script

from mmdefense import registry
from mmdefense.cli import catalogue
from mmdefense.scanning.sarif import HOMEPAGE
from mmdefense.settings import Positive, Share

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


HOOKS = load_script(DOCS / "hooks.py")
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


def test_every_defense_has_a_page_with_its_settings():
    for name in registry.names("defenses"):
        page = (DOCS / "defenses" / f"{name}.md").read_text()
        assert f"\n`{name}`" in page
        assert "\n## Idea\n" in page
        assert "\n## Formula\n" in page
        assert HOOKS.MARK.findall(page) == [("settings", name), ("figures", name)]
        assert f"({name}.md)" in (DOCS / "defenses" / "index.md").read_text()


def test_the_page_of_attacks_has_every_attack():
    marks = HOOKS.MARK.findall((DOCS / "attacks.md").read_text())
    assert sorted(n for kind, n in marks if kind == "attack") == registry.names("attacks")


@pytest.mark.parametrize("page", sorted(WRITTEN))
def test_everything_that_a_page_asks_for_can_be_written(page):
    for kind, name in HOOKS.MARK.findall((DOCS / page).read_text()):
        assert HOOKS.FILLED[kind](name)


@dataclass(frozen=True)
class Settings:
    """Settings of every kind.

    Attributes:
        share: One. Left out.
        count: Some of ``|N|``.
    """

    share: Share = 0.1
    count: Annotated[int, Interval(ge=1, lt=9)] | None = None
    mode: Literal["a", "b"] = "a"
    sides: tuple[Positive, ...] = (0.123456, 2.0)
    on: bool = True


def test_settings_are_shown_with_default_bounds_and_meaning():
    rows = HOOKS.settings_table(Settings, catalogue.settings(Settings)).splitlines()[4:-2]
    assert rows == [
        "| `share` | `0.1` | 0 to 1 | One. |",
        r"| `count` | `None` | a whole number, 1 or more, below 9, or `None` | Some of \|N\|. |",
        "| `mode` | `a` | `a`, `b` |  |",
        "| `sides` | `0.1235`, `2` | a list: above 0 |  |",
        "| `on` | `True` | `True`, `False` |  |",
    ]


def test_figures_are_means_over_the_victims_of_a_domain():
    rows = HOOKS.figures("fip").splitlines()
    assert next(row for row in rows if row.startswith("| clips")).count("/") == 6
    assert HOOKS.figures("no-such-defense") == "No table of this project has it yet."


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
