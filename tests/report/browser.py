"""Looks at a page with a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

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


_MEASURED = """<script>addEventListener("load", () => {
  const wide = document.documentElement.clientWidth;
  const sized = text => {
    const { a, b } = text.getScreenCTM();
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b);
  };
  const out = [...document.querySelectorAll("body *")].filter(element => {
    const box = element.getBoundingClientRect();
    return box.width > 1 && box.right > wide + 1 && !element.closest(".results, .images.scroll");
  });
  parent.postMessage({
    wide,
    page: document.documentElement.scrollWidth,
    beyond: out.map(element => element.outerHTML.slice(0, 80)),
    text: [...document.querySelectorAll("svg:not(#plot) text")].map(sized),
  }, "*");
})</script>"""
_FRAME = """<body><iframe src="inner.html" width="{width}" height="800" style="border: 0"></iframe>
<script>addEventListener("message", event => {{
  document.body.dataset.seen = JSON.stringify(event.data);
}})</script></body>"""


def measured(html: str, folder: Path, width: int) -> dict[str, Any]:
    """Return how a page lies in a window of a width in pixels, as narrow as on a phone.

    ``page`` is the width that it takes, ``beyond`` what leaves the window at its right where
    nothing scrolls, and ``text`` the height of each letter in a drawing, in pixels.
    """
    inner, outer = folder / "inner.html", folder / "outer.html"
    unlocked = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", html)
    inner.write_text(unlocked.replace("</body>", f"{_MEASURED}</body>"), encoding="utf-8")
    outer.write_text(_FRAME.format(width=width), encoding="utf-8")
    told = chromium(
        outer, folder, "--dump-dom", "--hide-scrollbars", "--virtual-time-budget=5000"
    ).stdout
    found = re.search(r'data-seen="([^"]*)"', told)
    assert found is not None
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert seen["wide"] == width
    return seen
