"""Scan the text files of a model folder, each by the type that its name says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mmdefense.errors import BadInputError
from mmdefense.findings import Finding, Rule
from mmdefense.scanning.configs import MAX_JSON, UNREADABLE, parse_config, scan_values
from mmdefense.scanning.gguf import MAGIC, gguf_texts
from mmdefense.scanning.python import MAX_PYTHON, scan_notebook, scan_path_file, scan_python
from mmdefense.scanning.templates import scan_template

__all__ = ["TOO_LARGE", "is_text", "is_unknown", "scan_text"]

TOO_LARGE = Rule(
    id="file-too-large",
    level="medium",
    measured="the size of a text",
    reference="the size of such texts in known models",
    meaning="It was not inspected, since parsing it could exhaust the machine.",
    blind_spot="everything inside.",
)
SCRIPT = Rule(
    id="file-script",
    level="medium",
    measured="the kind of the file",
    reference="a model folder holds data",
    meaning="It is for running or installing software, and no model needs it.",
    blind_spot="what it does: it was not inspected.",
)
PAGE = Rule(
    id="file-page-with-script",
    level="low",
    measured="whether a page or a drawing holds scripts",
    reference="text and pictures",
    meaning="A browser that opens it runs them.",
    blind_spot="what they do.",
)

_CONFIGS = {".json", ".yaml", ".yml", ".toml", ".ipynb"}
_TEMPLATES = {".jinja", ".jinja2", ".j2"}
_LIKE_TEMPLATES = {".template", ".tmpl", ".tpl"}
_PYTHON = {".py", ".pyw", ".pyi"}
_PAGES = {".html", ".htm", ".svg", ".xhtml", ".xml"}
_SCRIPTS = {
    *(".sh", ".bash", ".zsh", ".fish", ".csh", ".command", ".ps1", ".psm1", ".bat", ".cmd", ".vbs"),
    *(".js", ".mjs", ".cjs", ".ts", ".wsf", ".hta", ".scpt", ".rb", ".pl", ".php", ".lua", ".r"),
    *(".so", ".pyd", ".dll", ".dylib", ".exe", ".com", ".scr", ".msi", ".jar", ".class", ".apk"),
    *(".pyx", ".pyo", ".pyz", ".pyzw", ".egg", ".whl", ".deb", ".rpm", ".dmg", ".pkg", ".lnk"),
    *(".url", ".desktop", ".reg", ".inf", ".wasm", ".c", ".cc", ".cpp", ".cu", ".rs", ".go"),
}
_PLAIN = {
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".log", ".cfg", ".ini", ".jsonl", ".ndjson", ".bpe"),
    *(".vocab", ".merges", ".codes", ".cff", ".bib", ".license", ".gitattributes", ".gitignore"),
    *(".tex", ".conf", ".sha256", ".md5", ".sig"),
}
_PLAIN_NAMES = {
    *("readme", "license", "licence", "notice", "copying", "changelog", "authors", "citation"),
    *("use_policy", ".gitattributes", ".gitignore", "merges", "vocab", "source", "version"),
}
_READ = {".safetensors", ".zip", ".npz", ".npy", ".tar", ".gz", ".bz2", ".xz", ".lzma", ".z"}
_ACTIVE = re.compile(rb"<script|javascript:|\bon\w+\s*=|<iframe|<foreignobject", re.IGNORECASE)
_HEAD, _MOST_PAGE = 1 << 16, 1 << 26


def is_text(name: str) -> bool:
    """Return whether :func:`scan_text` scans a file of this name."""
    suffix = _suffix(name)
    kinds = _CONFIGS | _TEMPLATES | _LIKE_TEMPLATES | _PYTHON | _PAGES | _SCRIPTS
    return suffix in kinds or suffix in {".pth", ".gguf"}


def is_unknown(name: str, head: bytes) -> bool:
    """Return whether a file has no type that a scan reads, judging by its name and its start.

    Args:
        name: Name of the file; archives and pickles are recognised elsewhere.
        head: Its first bytes.
    """
    suffix = _suffix(name)
    base = PurePosixPath(name).name.lower()
    if is_text(name) or suffix in _READ or not head:
        return False
    is_plain = suffix in _PLAIN or base in _PLAIN_NAMES or base.split(".")[0] in _PLAIN_NAMES
    return not (is_plain and b"\0" not in head)


def _suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.suffix.lower() or (path.name.lower() if path.name.startswith(".") else "")


def scan_text(
    file: IO[bytes], subject: str, name: str, folder: Path | None = None
) -> Iterator[Finding]:
    """Yield the findings on a text file; none for any other file.

    Args:
        file: A seekable binary file.
        subject: Its name in the findings.
        name: Its own name, without the folders above it.
        folder: Its folder, if it is not inside an archive.
    """
    suffix = _suffix(name)
    size = file.seek(0, 2)
    file.seek(0)
    if suffix == ".pth":
        yield from scan_path_file(file.read(_HEAD), subject)
    elif suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC:
        file.seek(0)
        yield from _gguf(file, subject)
    elif suffix in _SCRIPTS:
        yield SCRIPT.found(subject, f"a {suffix} file")
    elif suffix in _CONFIGS | _TEMPLATES | _LIKE_TEMPLATES | _PYTHON | _PAGES:
        most = {**dict.fromkeys(_PYTHON, MAX_PYTHON), **dict.fromkeys(_PAGES, _MOST_PAGE)}
        if size > most.get(suffix, MAX_JSON):
            yield TOO_LARGE.found(subject, f"not inspected: {size} bytes")
            return
        file.seek(0)
        yield from _parsed(file.read(), subject, name, suffix, folder)


def _parsed(
    data: bytes, subject: str, name: str, suffix: str, folder: Path | None
) -> Iterator[Finding]:
    if suffix in _PYTHON:
        yield from scan_python(data, subject, PurePosixPath(name).name)
    elif suffix in _TEMPLATES | _LIKE_TEMPLATES:
        is_template = suffix in _TEMPLATES
        yield from scan_template(data.decode("utf-8", "replace"), subject, is_template=is_template)
    elif suffix in _PAGES:
        if found := _ACTIVE.search(data):
            yield PAGE.found(subject, found[0].decode("latin-1"))
    else:
        content = _read(data, subject, suffix)
        if isinstance(content, Finding):
            yield content
            return
        if suffix == ".ipynb":
            yield from scan_notebook(content, subject)
        yield from scan_values(content, subject, folder)


def _read(data: bytes, subject: str, suffix: str) -> Any:
    """Return the values of a configuration, or a finding if it cannot be read."""
    try:
        return parse_config(data, suffix)
    except BadInputError as error:
        return UNREADABLE.found(subject, str(error))
    except OverflowError as error:
        return TOO_LARGE.found(subject, f"not inspected: {error}")
    except ImportError:
        return TOO_LARGE.found(subject, "not inspected: PyYAML is not installed")


def _gguf(file: IO[bytes], subject: str) -> Iterator[Finding]:
    try:
        for name, text in gguf_texts(file):
            is_template = "chat_template" in name
            if is_template or "{{" in text or "{%" in text:
                yield from scan_template(text, f"{subject}!{name}", is_template=is_template)
    except BadInputError as error:
        yield UNREADABLE.found(subject, str(error))
