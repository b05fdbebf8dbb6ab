"""What the docs site takes from the code when it is built: the reference, settings and llms.txt."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

from mmdefense.scanning.sarif import HOMEPAGE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CORE = "mmdefense"
_SUMMARY = "Find and remove backdoors in models that you did not train."
PACKAGES = {
    "adapters": ROOT / "adapters" / "mmdefense_adapters",
    "tasks": ROOT / "tasks" / "mmdefense_tasks",
} | {path.parent.name: path.parent for path in sorted((ROOT / CORE).glob("*/__init__.py"))}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the reference and llms.txt, which are in no folder."""
    for name, text in reference().items():
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "llms.txt", content=llms_txt(config["nav"])))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside the site lead to the repository."""
    return re.sub(
        r"(\]\(|^\[[^\]]+\]: )((?:\.\./)+[^)\s#]+)",
        lambda found: found[1] + outside(page.file.src_uri, found[2]),
        markdown,
        flags=re.MULTILINE,
    )


def outside(page: str, target: str) -> str:
    """Return the address of a linked file in the repository, or the link as it is in the site.

    Args:
        page: Path of the page, from the folder of the documents.
        target: The link, relative to the page.
    """
    there = (DOCS / page).parent.joinpath(target).resolve()
    if there.is_relative_to(DOCS):
        return target
    kind = "tree" if there.is_dir() else "blob"
    return f"{HOMEPAGE}/{kind}/main/{there.relative_to(ROOT)}"


def reference() -> dict[str, str]:
    """Return the pages of the API reference by path: a page for each package."""
    core = [name for name in modules(ROOT / CORE) if name.count(".") == 1]
    pages = {"api/index.md": _INDEX, "api/core.md": _page("Protocol and registry", _CORE, core)}
    for name, folder in PACKAGES.items():
        about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        pages[f"api/{name}.md"] = _page(name.capitalize(), about, modules(folder))
    return pages


def modules(folder: Path) -> Iterator[str]:
    """Yield the dotted names of the public modules below a folder: those that have ``__all__``."""
    for path in sorted(folder.rglob("*.py")):
        if path.stem != "__init__" and re.search(r"^__all__ = \[", path.read_text(), re.MULTILINE):
            first, *rest = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(rest if first in {"adapters", "tasks"} else [first, *rest])


def _page(title: str, about: str, names: Iterable[str]) -> str:
    return f"# {title}\n\n{about}\n\n" + "".join(f"::: {name}\n\n" for name in names)


_CORE = "What all packages build on: the protocol, the registry, settings, errors, the store."


_INDEX = """# API reference

What `import mmdefense` has; the other pages have the modules of each package. All of it is written
from the docstrings, which give shapes in the [letters](../concepts.md#letters) of the concepts.

::: mmdefense
    options:
      show_root_heading: false
      heading_level: 2
"""


def llms_txt(nav: list[Any]) -> str:
    """Return a list of all pages for language models, as https://llmstxt.org describes it.

    Args:
        nav: The navigation of the site.
    """
    sections: dict[str, str] = {}
    for section, title, path in pages(nav):
        line = f"- [{title}]({path.removesuffix('.md')}.html): {about(path)}\n"
        sections[section] = sections.get(section, "") + line
    listed = "".join(f"\n## {name or 'Overview'}\n\n{rows}" for name, rows in sections.items())
    return f"# mmdefense\n\n> {_SUMMARY}\n{listed}"


def pages(nav: list[Any], section: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield section, title and path of each page of a navigation."""
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, Mapping) else ("", entry)
        if isinstance(value, list):
            yield from pages(value, title)
        else:
            yield section, title or section, value


def about(path: str) -> str:
    """Return the first sentence of a page's first paragraph, as plain text."""
    text = reference()[path] if path.startswith("api/") else (DOCS / path).read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n", prose)
    first = next(found for found in paragraphs if re.match(r"[\w*`\"]", found))
    plain = re.sub(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", " ".join(first.split()))
    return re.split(r"(?<=[.!?])\s", plain.replace("*", ""))[0]


class SphinxRoles(griffe.Extension):
    """Make code of the roles of Sphinx in docstrings: ``:class:`~a.b.C` `` is ``C``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the roles in the docstring of an object."""
        if obj.docstring:
            shorter = re.sub(r":\w+:`~[^`]*?(\w+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r":\w+:`", "`", shorter)
