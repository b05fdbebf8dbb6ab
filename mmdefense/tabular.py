"""A table of results as data: CSV, JSON, a pandas frame, and a table in a notebook."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from mmdefense.errors import printable
from mmdefense.libraries import needed

__all__ = ["Table", "Value"]

Value: TypeAlias = str | float | int | bool | None

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of plain values, each of the same columns.

    Attributes:
        rows: The value of each column by its name. A column that a row lacks, and a number that is
            not finite, become None.
        title: What the table is of.

    Example:
        >>> table = Table([{"defense": "fip", "acc": 0.97}, {"defense": "tsbd", "asr": 0.02}])
        >>> print(table.to_csv(), end="")
        defense,acc,asr
        fip,0.97,
        tsbd,,0.02
        >>> table
        defense  acc   asr
        fip      0.97
        tsbd           0.02
    """

    rows: Sequence[Mapping[str, Value]]
    title: str = ""

    def __post_init__(self) -> None:
        columns = dict.fromkeys(name for row in self.rows for name in row)
        rows = tuple({name: _finite(row.get(name)) for name in columns} for row in self.rows)
        object.__setattr__(self, "rows", rows)

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows[0]) if self.rows else []

    def to_csv(self) -> str:
        """Return CSV with a line of names; None is empty.

        Text that a spreadsheet would take for a formula gets an apostrophe in front: names come
        from models that are not trusted.
        """
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {name: _harmless(value) for name, value in row.items()} for row in self.rows
            )
        return text.getvalue()

    def to_json(self) -> str:
        """Return a list of objects, one for each row."""
        return json.dumps(list(self.rows), indent=1) + "\n"

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame``.

        Raises:
            UnsupportedError: If pandas is not installed.
        """
        with needed("a data frame", "pandas"):
            import pandas as pd
        return pd.DataFrame(list(self.rows), columns=self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        cells = [self.columns, *([_shown(value) for value in row.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )
        return "\n".join(line for line in (self.title, *lines) if line)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(_shown(value))}</td>' for value in row.values())}</tr>"
            for row in self.rows
        )
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _harmless(value: Value) -> Value:
    starts = isinstance(value, str) and value.startswith(_FORMULA)
    return f"'{value}" if starts else value


def _shown(value: Value) -> str:
    """Return a value on one line, without what could steer a terminal."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))
