"""Looks at a page with a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium, which is not on the PATH"
)

_QUIET = ("--no-first-run", "--disable-background-networking", "--disable-sync")
_SAID = """<script>addEventListener("load", () => {
  const widths = (name, width) => [...document.querySelectorAll(name)].map(width);
  document.body.dataset.seen = JSON.stringify({
    images: widths("img", image => image.complete ? image.naturalWidth : 0),
    drawings: widths("svg", drawing => drawing.getBoundingClientRect().width),
  });
})</script>"""


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page.

    Attributes:
        complaints: Lines of its console.
        images: Own width of each image in pixels; zero where it is broken.
        drawings: Width of each drawing on the page, in pixels.
    """

    complaints: list[str]
    images: list[int]
    drawings: list[float]


def chromium(page: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Open a page; what the console says goes to ``stderr``."""
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
        *("--disable-component-update", "--disable-dev-shm-usage", *_QUIET),
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        *more,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def shown(html: str, folder: Path) -> Seen:
    """Return what a browser makes of a page: of the console as it is, of the rest with a script."""
    plain, asked = folder / "plain.html", folder / "asked.html"
    plain.write_text(html, encoding="utf-8")
    complaints = chromium(plain, folder, "--dump-dom").stderr.splitlines()
    unlocked = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", html)
    asked.write_text(unlocked.replace("</body>", f"{_SAID}</body>"), encoding="utf-8")
    found = re.search(r'data-seen="([^"]*)"', chromium(asked, folder, "--dump-dom").stdout)
    assert found is not None
    seen = json.loads(unescape(found[1]))
    return Seen([line for line in complaints if "CONSOLE" in line], **seen)
