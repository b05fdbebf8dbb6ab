"""YAML as plain values and tags, from its events: no object is built, and no alias is copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmdefense.errors import BadInputError, one_line

__all__ = ["MAX_DEPTH", "MAX_YAML", "Tagged", "parse_yaml"]

MAX_YAML, MAX_DEPTH = 1 << 20, 250
"""Most bytes to parse, and most levels of nesting. Our choice."""
_PLAIN = {
    *("str", "int", "float", "bool", "null", "map", "seq", "binary", "timestamp", "set", "omap"),
    *("pairs", "merge", "value"),
}


@dataclass(frozen=True)
class Tagged:
    """A value with a tag that asks the reader for more than plain data.

    Attributes:
        tag: The full tag.
        value: The tagged value.
    """

    tag: str
    value: Any


def parse_yaml(data: bytes) -> list[Any]:
    """Return the documents of a YAML file; scalars are texts, and false and null are None.

    Args:
        data: Its bytes.

    Raises:
        BadInputError: If it is not YAML, or nested too deeply.
        OverflowError: If it is too large to parse.
        ImportError: If PyYAML is not installed.
    """
    import yaml

    if len(data) > MAX_YAML:
        raise OverflowError(f"{len(data)} bytes of YAML")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    builder = _Builder()
    try:
        for event in yaml.parse(data, Loader=loader):
            builder.take(event)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInputError(f"it must be YAML: {one_line(error)}") from error
    return builder.documents


class _Builder:
    """Builds values from events."""

    def __init__(self) -> None:
        self.documents: list[Any] = []
        self._open: list[Any] = []
        self._keys: list[Any] = []
        self._anchors: dict[str, Any] = {}

    def take(self, event: Any) -> None:
        """Take one event of ``yaml.parse``."""
        import yaml

        if isinstance(event, yaml.ScalarEvent):
            self._add(self._tagged(event, _scalar(event)), event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            self._add(self._anchors.get(event.anchor), None)
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            if len(self._open) >= MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            held: Any = [] if isinstance(event, yaml.SequenceStartEvent) else {}
            self._add(self._tagged(event, held), event.anchor)
            self._open.append(held)
            self._keys.append(None)
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            self._open.pop()
            self._keys.pop()

    def _tagged(self, event: Any, value: Any) -> Any:
        tag = event.tag
        if tag is None or tag == "!" or tag.removeprefix("tag:yaml.org,2002:") in _PLAIN:
            return value
        return Tagged(tag, value)

    def _add(self, value: Any, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = value
        if not self._open:
            self.documents.append(value)
            return
        held = self._open[-1]
        if isinstance(held, list):
            held.append(value)
        elif self._keys[-1] is None:
            self._keys[-1] = [value]
        else:
            (key,) = self._keys[-1]
            self._keys[-1] = None
            _put(held, key, value)


def _put(held: dict[Any, Any], key: Any, value: Any) -> None:
    """Add a pair to a map; duplicate names and keys that are not strings are kept too."""
    name = key if isinstance(key, str) else f"?{len(held)}"
    while name in held:
        name = f"{name}?"
    held[name] = value if isinstance(key, str) else [key, value]


def _scalar(event: Any) -> Any:
    is_plain = event.tag is None and event.style is None
    empty = {"", "~", "null", "Null", "NULL", "false", "False", "FALSE", "no", "off"}
    return None if is_plain and event.value in empty else event.value
