"""Check what JSON, YAML and TOML files of a model request: their own code, objects, other files.

Nothing is built from them: they are parsed to plain values, and these are checked.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdefense.checkpoints.configs import content_faults
from mmdefense.checkpoints.faults import CODE_KEYS, leads_outside
from mmdefense.checkpoints.names import DATA, is_dangerous
from mmdefense.errors import BadInputError, one_line
from mmdefense.findings import Finding, Level, Rule
from mmdefense.scanning.templates import MAX_TEMPLATE, scan_template
from mmdefense.scanning.yaml_values import MAX_DEPTH, Tagged, parse_yaml

__all__ = ["parse_config", "scan_values"]

REMOTE_CODE = Rule(
    id="config-remote-code",
    level="medium",
    measured="whether a configuration asks to run code that comes with the model",
    reference="classes of the installed library",
    meaning="With trust_remote_code, loading runs that Python; mmdefense never does.",
    blind_spot="what the code does; a library that has the class itself may ignore the request.",
)
SHARD = Rule(
    id="config-shard-outside",
    level="high",
    measured="the shard paths in the index",
    reference="the model's own folder",
    meaning="Loading would read a file that is not part of the model.",
    blind_spot="what that file holds.",
)
UNREADABLE = Rule(
    id="config-unreadable",
    level="medium",
    measured="whether the file parses as the type that its name says",
    reference="JSON, YAML or TOML",
    meaning="It is damaged, or written for a more lenient reader.",
    blind_spot="its content.",
)
LOADER = Rule(
    id="config-loader",
    level="high",
    measured="configuration fields that become arguments of library functions",
    reference="fields that shape a network and load nothing",
    meaning="In some version of a library it imports a module, loads a file or contacts the hub; "
    "mmdefense passes none of it on.",
    blind_spot="library fields that this scan does not check.",
)
SIZE = Rule(
    id="config-size",
    level="high",
    measured="counts and patterns in a configuration",
    reference="the weights beside it, and the time that a pattern takes to match",
    meaning="Building the model would take more memory or time than any real model.",
    blind_spot="sizes that show only when the model is built; the loader checks those.",
)
FORM = Rule(
    id="config-malformed",
    level="medium",
    measured="the type of a configuration field",
    reference="what the library writes there",
    meaning="A library would fail on it or misread it.",
    blind_spot="whether another reader accepts it.",
)
BUILDS = Rule(
    id="config-builds-objects",
    level="medium",
    measured="class names, function names and tags in a configuration",
    reference="plain values",
    meaning="A reader that builds objects from it calls what it names: Hydra, jsonpickle and the "
    "full YAML loaders do.",
    blind_spot="what the class does; whether any reader builds it.",
)

_RULES = {"loader": LOADER, "size": SIZE, "form": FORM}
MAX_JSON, MAX_VALUES = 40 << 20, 4_000_000
MAX_TOML = 1 << 20
"""Most bytes and values (counted by separators) of a file to parse; the largest tokenizers have
33 million bytes and 3 million values. Our choice."""
_MOST, _MOST_NAMES = 20, 1000
_TARGETS = {"_target_", "class_path", "py/object", "py/function", "py/type", "py/reduce", "py/repr"}
_ASKED = _TARGETS | CODE_KEYS
_PLAIN_TAGS = {
    *("none", "bool", "str", "unicode", "bytes", "int", "long", "float", "complex", "list"),
    *("tuple", "dict"),
}
_DOTTED = re.compile(r"[A-Za-z_][\w.]*\.\w+")


def parse_config(data: bytes, suffix: str) -> Any:
    """Return a configuration as plain values.

    Args:
        data: Its bytes.
        suffix: The suffix of its name, which says its type.

    Raises:
        BadInputError: If it is not valid.
        OverflowError: If it is too large to parse.
    """
    if suffix in {".yaml", ".yml"}:
        return parse_yaml(data)
    try:
        if suffix == ".toml":
            if len(data) > MAX_TOML:
                raise OverflowError(f"{len(data)} bytes of TOML")
            return _shallow(tomllib.loads(data.decode("utf-8")))
        values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
        if values > MAX_VALUES:
            raise OverflowError(f"about {values} values of JSON")
        return _shallow(json.loads(data.decode("utf-8-sig")))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"it must be {suffix[1:].upper()}: {one_line(error)}") from error


def _shallow(content: Any) -> Any:
    """Return plain values unless they are nested too deeply.

    How deep a parser goes differs between versions of Python, and what reads the values recurses.

    Raises:
        ValueError: If they are nested more than ``MAX_DEPTH`` deep.
    """
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        groups = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for group in groups for each in group if isinstance(each, (dict, list))]
        if not level:
            return content
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


def scan_values(content: Any, subject: str, folder: Path | None = None) -> Iterator[Finding]:
    """Yield the findings on the values of a configuration, at any depth.

    Args:
        content: Plain values; see :func:`parse_config`.
        subject: Where they were found.
        folder: Folder of the file, to see whether the code that it requests is in it.
    """
    name = subject.split("!")[-1].rpartition("/")[2]
    found = 0
    for where, key, value in _walk(content):
        for finding in _scan_value(key, value, where, subject, folder):
            found += 1
            if found <= _MOST:
                yield finding
    for fault in content_faults(name, content, folder)[:_MOST]:
        yield _RULES[fault.kind].found(subject, fault.text)
    if name == "model_index.json" and isinstance(content, Mapping):
        yield from _parts(content, subject)
    if name.endswith(".index.json"):
        yield from _shards(content, name, subject)


def _walk(content: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield each value once, with the chain of names above it and the last of these."""
    waiting: list[tuple[Any, Any]] = [(content, None)]
    seen: set[int] = set()
    while waiting:
        held, where = waiting.pop()
        if isinstance(held, Tagged):
            yield where, "", held
            held = held.value
        if not isinstance(held, (dict, list)) or id(held) in seen:
            continue
        seen.add(id(held))
        named = held.items() if isinstance(held, dict) else enumerate(held)
        for name, value in named:
            if isinstance(value, (dict, list, Tagged)):
                waiting.append((value, (name, where)))
            is_asked = isinstance(name, str) and (name in _ASKED or name == "type")
            if is_asked or (isinstance(value, str) and ("{" in value or len(value) > MAX_TEMPLATE)):
                yield (name, where), str(name), value


def _dotted(where: Any) -> str:
    names: list[str] = []
    while where is not None and len(names) < 50:
        name, where = where
        names.append(str(name))
    return ".".join(reversed(names))


def _is_template(where: Any) -> bool:
    """Return whether any name above a text says that it is a template."""
    while where is not None:
        name, where = where
        if isinstance(name, str) and "chat_template" in name.lower():
            return True
    return False


def _scan_value(
    key: str, value: Any, where: Any, subject: str, folder: Path | None
) -> Iterator[Finding]:
    if isinstance(value, Tagged):
        yield from _tag(value, subject)
    elif isinstance(value, str):
        is_template = _is_template(where)
        if is_template or "{{" in value or "{%" in value:
            yield from scan_template(value, subject, is_template=is_template)
    if key in CODE_KEYS and value:
        shown = f"{_dotted(where)} = {_text(value):.300}"
        level = _code_level(value, folder)
        yield REMOTE_CODE.found(subject, f"asks to run its own code: {shown}", level=level)
    elif key in _TARGETS and value:
        yield from _target(f"{key}: ", value, subject)
    elif key == "type" and subject.endswith("modules.json") and not _is_own(value):
        yield from _target("type: ", value, subject)


def _is_own(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("sentence_transformers.")


def _code_level(value: Any, folder: Path | None) -> Level:
    """Return "high" if the code comes from another repository, or is not in the folder."""
    waiting = [value]
    for _ in range(_MOST_NAMES):
        if not waiting:
            return "medium"
        held = waiting.pop()
        if isinstance(held, (dict, list)):
            waiting += held.values() if isinstance(held, dict) else held
        elif isinstance(held, str) and "." in held and not _is_in_folder(held, folder):
            return "high"
    return "high"


def _is_in_folder(name: str, folder: Path | None) -> bool:
    module = name.rpartition(".")[0]
    if "--" in name or folder is None:
        return "--" not in name
    return "\0" not in module and os.path.isfile(folder / f"{module}.py")


def _text(value: Any) -> str:
    """Return a value as text; a value that contains itself is cut there."""
    try:
        return json.dumps(value, default=str)
    except (ValueError, RecursionError):
        return repr(value)


def _target(shown: str, value: Any, subject: str) -> Iterator[Finding]:
    """Yield each name in a configuration that a reader would call."""
    text = value if isinstance(value, str) else _text(value)
    names = _DOTTED.findall(text)
    high = any(is_dangerous(*name.rsplit(".", 1)) for name in names)
    yield BUILDS.found(subject, f"{shown}{text:.200}", level="high" if high else "medium")


def _parts(content: Mapping[str, Any], subject: str) -> Iterator[Finding]:
    """Yield each part of a Diffusers pipeline whose library and class name a dangerous callable."""
    for name, part in content.items():
        is_named = isinstance(part, list) and len(part) == 2
        if is_named and all(isinstance(one, str) for one in part) and is_dangerous(*part):
            yield from _target(f"{name:.80}: ", ".".join(part), subject)


def _tag(tagged: Tagged, subject: str) -> Iterator[Finding]:
    """Yield each YAML tag that asks its reader to build an object."""
    tag = tagged.tag.removeprefix("tag:yaml.org,2002:")
    kind, _, name = tag.partition("python/")
    if kind == "" and name in _PLAIN_TAGS:
        return
    if name:
        is_data = name.partition(":")[2] in DATA
        level: Level = "medium" if is_data else "high"
        yield BUILDS.found(subject, f"the tag {tag:.200}", level=level)
    else:
        yield from _target("the tag ", tag, subject)


def _shards(content: Any, name: str, subject: str) -> Iterator[Finding]:
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    named = {str(shard) for shard in shards.values()} if isinstance(shards, Mapping) else set()
    for shard in sorted(filter(leads_outside, named))[:_MOST]:
        yield SHARD.found(subject, f"{name} names the shard {shard!r:.200} outside the folder")
