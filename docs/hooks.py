"""What the docs site takes from the code when it is built: the reference, settings and llms.txt."""

from __future__ import annotations

import ast
import base64
import csv
import dataclasses
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import griffe
from mkdocs.structure.files import File

from mmdefense import registry
from mmdefense.attacks.baddet import ObjectAttack
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.text_attack import TextAttack
from mmdefense.cli import catalogue
from mmdefense.defenses.base import Defense, TrainingDefense
from mmdefense.evaluation import zoo
from mmdefense.protocol import TaskAdapter
from mmdefense.scanning.sarif import HOMEPAGE
from mmdefense.settings import described_type

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CORE = "mmdefense"
_SUMMARY = "Find and remove backdoors in models that you did not train."
PACKAGES = {
    "adapters": ROOT / "adapters" / "mmdefense_adapters",
    "tasks": ROOT / "tasks" / "mmdefense_tasks",
} | {path.parent.name: path.parent for path in sorted((ROOT / CORE).glob("*/__init__.py"))}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the reference, llms.txt and figures of notebooks, which are in no folder."""
    for name, text in (reference() | gallery_figures()).items():
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, "llms.txt", content=llms_txt(config["nav"])))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what comes from the code, and let links out of the site lead to the repository."""
    linked = re.sub(
        r"(\]\(|^\[[^\]]+\]: )((?:\.\./)+[^)\s#]+)",
        lambda found: found[1] + outside(page.file.src_uri, found[2]),
        markdown,
        flags=re.MULTILINE,
    )
    return MARK.sub(lambda found: FILLED[found[1]](found[2]), linked)


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
    return f"{_BOOST}# {title}\n\n{about}\n\n" + "".join(f"::: {name}\n\n" for name in names)


_BOOST = "---\nsearch:\n  boost: 0.3\n---\n\n"  # a search finds what is written for readers first


_CORE = "What all packages build on: the protocol, the registry, settings, errors, the store."


_INDEX = f"""{_BOOST}# API reference

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
    """Return the first sentence of a page, or of its idea where it has one, as plain text."""
    text = reference()[path] if path.startswith("api/") else (DOCS / path).read_text()
    start = text.partition("\n## Idea\n")[2] or text
    prose = re.sub(r"^```.*?^```$", "", start, flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n", prose.strip())
    first = next(found for found in paragraphs if re.match(r"[\w*`\"]", found))
    plain = re.sub(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", " ".join(first.split()))
    return re.split(r"(?<=[.!?])\s", plain.replace("*", ""))[0]


def defense_settings(name: str) -> str:
    """Return what a defense needs and its settings: own ones, and those of every defense."""
    kind = registry.load("defenses", name)
    base = TrainingDefense if issubclass(kind, TrainingDefense) else Defense
    own, shared = _split(kind, base)
    call = f"[`{kind.__name__}`](../api/defenses.md#{kind.__module__}.{kind.__name__})"
    text = f"On the command line `--defense {name} --set NAME=VALUE`, in Python {call}.\n\n"
    if kind.requires is not TaskAdapter:
        needed = f"[`{kind.requires.__name__}`](../concepts.md#the-protocol)"
        text += f"The model's adapter must have the members of {needed}.\n\n"
    if own:
        text += f"{settings_table(kind, own)}\n\n"
    whose = "every defense that trains" if base is TrainingDefense else "every defense"
    folded = settings_table(kind, shared).replace("\n", "\n    ")
    return f'{text}??? note "Settings of {whose}"\n\n    {folded}\n'


def attack_settings(name: str) -> str:
    """Return the tasks of an attack, and its settings beside those that all of its kind have."""
    kind = registry.load("attacks", name)
    (base,) = [one for one in _POISONING.values() if issubclass(kind, one)]
    own, _ = _split(kind, base)
    call = f"[`{kind.__name__}`](api/attacks.md#{kind.__module__}.{kind.__name__})"
    text = f"In Python {call}; for {', '.join(f'`{task}`' for task in kind.tasks)}."
    return f"{text}\n\n{settings_table(kind, own)}" if own else text


def poisoning_settings(name: str) -> str:
    """Return the settings that all attacks of a kind share."""
    return settings_table(_POISONING[name], catalogue.settings(_POISONING[name]))


_POISONING = {"labels": LabelAttack, "objects": ObjectAttack, "texts": TextAttack}


def _split(kind: type, base: type) -> tuple[list[catalogue.Setting], list[catalogue.Setting]]:
    """Return the settings of a class that are not as in a base of it, new ones first, and the rest.

    Args:
        kind: The class of a defense or an attack.
        base: What it shares the other settings with.
    """
    inherited = {entry.name: entry.default for entry in dataclasses.fields(base)}
    every = catalogue.settings(kind)
    new = [one for one in every if one.name not in inherited]
    shared = [s for s in every if inherited.get(s.name, inherited) == getattr(kind, s.name)]
    return new + [one for one in every if one not in new and one not in shared], shared


def settings_table(kind: type, settings: Iterable[catalogue.Setting]) -> str:
    """Return settings of a dataclass with their defaults and bounds as a Markdown table."""
    hints = get_type_hints(kind, include_extras=True)
    lines = ['<div class="settings" markdown>', ""]
    lines += ["| setting | default | takes | what it is |", "|---|---|---|---|"]
    for one in settings:
        value = getattr(kind, one.name)
        parts = value if isinstance(value, tuple) else [value]
        default = ", ".join(f"`{_short(part)}`" for part in parts)
        cells = (f"`{one.name}`", default, allowed(hints[one.name]), one.about)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", "</div>"])


def allowed(hint: Any) -> str:
    """Return in words what an annotation takes, bounds included: ``0 to 1``, ``1 or more``."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounded = ", ".join(filter(None, map(_bound, inner[1:])))
        whole = "a whole number, " if inner[0] is int else ""
        return f"{whole}{bounded}" if bounded else allowed(inner[0])
    if origin in {Union, types.UnionType}:
        return ", or ".join(map(allowed, inner))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        return f"a list: {allowed(inner[0])}"
    return {bool: "`True`, `False`", types.NoneType: "`None`"}.get(hint) or described_type(hint)


def _short(default: Any) -> str:
    return f"{default:.4g}" if isinstance(default, float) else str(default)


def _bound(bound: Any) -> str:
    low, high = getattr(bound, "ge", None), getattr(bound, "le", None)
    above, below = getattr(bound, "gt", None), getattr(bound, "lt", None)
    if low is not None and high is not None:
        return f"{low} to {high}"
    ends = ((above, "above {}"), (low, "{} or more"), (below, "below {}"), (high, "{} or less"))
    return ", ".join(words.format(end) for end, words in ends if end is not None)


def figures(name: str) -> str:
    """Return what the published tables say about a defense: means over the victims of a domain."""
    rows = list(csv.DictReader((DOCS / "tables" / "five_domains.csv").open()))
    if name not in {row["defense"] for row in rows}:
        return "No table of this project has it yet."
    shown = dict.fromkeys(["before", "fine-tuning", name])
    lines = [
        "Task metric / ASR / RA in percent, the means over the victims of a domain, one seed. Read",
        "first how they were measured, and which settings have changed since: [results][five].",
        "",
        "| domain | victims | " + " | ".join(shown) + " |",
        "|---|--:|" + "--:|" * len(shown),
    ]
    domains = dict.fromkeys(row["victim"].partition(",")[0] for row in rows)
    for domain in domains:
        of = [row for row in rows if row["victim"].partition(",")[0] == domain]
        means = [_mean([row for row in of if row["defense"] == one]) for one in shown]
        count = len({row["victim"] for row in of})
        lines.append(f"| {domain} | {count} | " + " | ".join(means) + " |")
    return "\n".join([*lines, "", "[five]: ../results.md#five-domains-with-the-fields-views"])


def _mean(rows: list[dict[str, str]]) -> str:
    keys = ("task_metric", "asr", "ra")
    return " / ".join(f"{fmean(float(row[key]) for row in rows):.1f}" for key in keys)


def victims(_: str) -> str:
    """Return a table of the victims of the zoo, from their cards."""
    lines = [
        "| victim | attack | twin | trained on | ACC / ASR / RA | KB |",
        "|---|---|---|---|--:|--:|",
    ]
    for name, (case, _seed) in zoo.zoo_cases().items():
        found = zoo.find_card(name, zoo.SHIPPED)
        if found is None:
            cells = [case.attack or "none", "", case.data, "to build", ""]
        else:
            card = found[0]
            rates = (card.rates.acc, card.rates.asr, card.rates.ra)
            shown = " / ".join(f"{100 * rate:.1f}" for rate in rates if rate is not None)
            twin = f"`{card.twin}`" if card.twin else ""
            cells = [card.attack, twin, case.data, shown, str(round(card.size / 1000))]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def first_figure(name: str) -> str:
    """Return the picture of the first plot of a notebook of the gallery."""
    return f"![The first plot of the notebook](gallery/{name}.png)"


def gallery_figures() -> dict[str, bytes]:
    """Return the first plot of each notebook of the gallery as PNG, by path."""
    found = {}
    for path in sorted((ROOT / "gallery").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        pictures = (output["data"]["image/png"] for output in outputs if _is_picture(output))
        found[f"gallery/{path.stem}.png"] = base64.b64decode(next(pictures))
    return found


def _is_picture(output: Mapping[str, Any]) -> bool:
    return "image/png" in output.get("data", {})


_KINDS = "settings|figures|attack|poisoning|victims|notebook"
MARK = re.compile(rf"^<!-- ({_KINDS}): ([\w-]+) -->$", re.MULTILINE)
FILLED = {
    "settings": defense_settings,
    "figures": figures,
    "attack": attack_settings,
    "poisoning": poisoning_settings,
    "victims": victims,
    "notebook": first_figure,
}


class Docstrings(griffe.Extension):
    """Read the docstrings as they are written here: with roles of Sphinx, and one example each."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Make code of roles, ``C`` of ``:class:`~a.b.C` ``, and name the part of the example."""
        if obj.docstring:
            text = re.sub(r":\w+:`~[^`]*?(\w+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r":\w+:`", "`", text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
