"""Python that comes with a model, read as a syntax tree and never imported."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from mmdefense.findings import Finding, Rule

__all__ = ["CODE", "MAX_PYTHON", "scan_notebook", "scan_path_file", "scan_python"]

CODE = Rule(
    id="code-python",
    level="medium",
    measured="Python in the model's folder",
    reference="a model folder holds data",
    meaning="It is run with trust_remote_code, or by hand.",
    blind_spot="what it does: only names are checked, not behaviour.",
)
STARTED = Rule(
    id="code-run-at-start",
    level="high",
    measured="lines and files that Python runs at startup",
    reference="a model folder holds data",
    meaning="Python runs it automatically if it is on the path, as in site-packages.",
    blind_spot="where the file will be installed.",
)

MAX_PYTHON = 1 << 19
"""Most bytes of Python to parse; the longest file of Transformers has 300,000. Our choice."""

_CALLS = {
    *("eval", "exec", "compile", "__import__", "system", "popen", "Popen", "check_output", "call"),
    *("run_path", "import_module", "urlopen", "urlretrieve", "spawn", "fork", "execv", "execve"),
    *("b64decode", "CDLL", "create_connection", "check_call", "getoutput"),
}
_MODULES = {"subprocess", "socket", "ctypes", "pty", "marshal", "pickle", "requests", "urllib"}
_AT_START = {"sitecustomize.py", "usercustomize.py"}
_IMPORT_LINE = re.compile(r"^import[ \t]", re.MULTILINE)
_SHELL = ("!", "%%bash", "%%sh", "%%cmd", "%%system", "%system", "%sx")
_BINARY = re.compile(r"[\x00-\x08\x0e-\x1f]")


def scan_python(source: str | bytes, subject: str, name: str) -> Iterator[Finding]:
    """Yield a finding on Python code, higher if it starts processes or uses the network.

    Args:
        source: Its text.
        subject: Where it was found.
        name: Name of the file.
    """
    if name in _AT_START:
        yield STARTED.found(subject, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, LookupError):
        yield CODE.found(subject, "Python that cannot be parsed", level="high")
        return
    wanted = sorted(set(_calls(tree)))
    if wanted:
        yield CODE.found(subject, f"names {', '.join(wanted)}", level="high")
    else:
        yield CODE.found(subject, "Python")


def _calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if name in _CALLS and not _is_method_of_model(node):
                yield str(name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [module] if module else [alias.name for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in _MODULES)


def _is_method_of_model(node: ast.Call) -> bool:
    """Return whether it is a method such as ``model.eval()``, not a built-in function."""
    name = getattr(node.func, "attr", None)
    return name in {"eval", "compile", "call"} and isinstance(node.func, ast.Attribute)


def scan_notebook(content: Any, subject: str) -> Iterator[Finding]:
    """Yield the findings on the code of a notebook.

    Args:
        content: The notebook's JSON.
        subject: Where it was found.
    """
    cells = content.get("cells", ()) if isinstance(content, Mapping) else ()
    for number, cell in enumerate(cells if isinstance(cells, list) else ()):
        if not isinstance(cell, Mapping) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        text = "".join(map(str, source)) if isinstance(source, list) else str(source)
        lines = text.splitlines()
        if any(line.lstrip().startswith(_SHELL) for line in lines):
            yield CODE.found(f"{subject}!cell {number}", "shell commands")
        python = "\n".join("" if line.lstrip().startswith(("!", "%")) else line for line in lines)
        if python.strip():
            yield from scan_python(python[:MAX_PYTHON], f"{subject}!cell {number}", "")


def scan_path_file(head: bytes, subject: str) -> Iterator[Finding]:
    """Yield whether a file called ``.pth`` is one of Python's path files, and whether it runs code.

    Args:
        head: Its first bytes.
        subject: Where it was found.

    References:
        The documentation of Python's module ``site``: a line that starts with ``import`` is run.
    """
    text = head.decode("utf-8", "replace").removeprefix("\ufeff")
    end = min((found.start() for found in (_BINARY.search(text),) if found), default=len(text))
    readable = text[:end].partition("\ufffd")[0]
    line = _IMPORT_LINE.search(readable)
    if line:
        yield STARTED.found(subject, readable[line.start() :].splitlines()[0][:80])
    elif readable == text and any(line.startswith(("/", ".")) for line in text.splitlines()):
        yield STARTED.found(subject, f"adds {text.strip()!r:.80}", level="medium")
