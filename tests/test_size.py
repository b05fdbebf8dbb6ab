"""No file and no function grows beyond what a reader can hold in mind."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("mmdefense", "tasks", "adapters", "recipes", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
FILE_LINES = 600
BODY_LINES = 80


def long_functions(source: str) -> Iterator[str]:
    """Yield the name of each function whose body, its docstring apart, is too long."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            body = node.body[documented:]
            if body and body[-1].end_lineno - body[0].lineno + 1 > BODY_LINES:
                yield node.name


def test_files_and_their_functions_are_short():
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
    assert len(sources) > 100
    assert [path for path, text in sources.items() if len(text.splitlines()) > FILE_LINES] == []
    assert {
        path: found for path, text in sources.items() if (found := list(long_functions(text)))
    } == {}


def test_a_long_function_is_found_and_its_docstring_not_counted():
    docstring = '    """' + "words\n" * 2 * BODY_LINES + '    """\n'
    line = "    pass\n"
    assert list(long_functions("def fits():\n" + docstring + line * BODY_LINES)) == []
    assert list(long_functions("def long():\n" + line * (BODY_LINES + 1))) == ["long"]
