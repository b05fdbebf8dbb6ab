"""The cells of a store as rows of plain values: CSV, JSON, LaTeX, Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mmdefense.evaluation.grid import cell_of
from mmdefense.libraries import needed
from mmdefense.store import Store
from mmdefense.tabular import Table

__all__ = ["FORMATS", "cells_table", "exported", "rows_of"]


def rows_of(store: Store) -> list[dict[str, Any]]:
    """Return a row for each cell that is done; rates are fractions, or None if not measured.

    ``record`` is the JSON file with all measurements, as a path within the store.
    """
    rows = []
    for entry in store.entries("cell"):
        if entry.status != "done":
            continue
        cell = cell_of(store, entry)
        row, case = cell.row, cell.case
        rates = {
            f"{name}_{when}": getattr(part, name)
            for when, part in (("before", row.before), ("after", row.after))
            for name in ("acc", "asr", "ra")
        }
        rows.append(
            {
                "task": case.get("task"),
                "case": row.victim,
                "data": case.get("data"),
                "net": case.get("model"),
                "attack": case.get("attack") or "none",
                "defense": row.defense,
                "views": cell.views,
                "clean": case.get("clean"),
                "kind": cell.kind,
                "seed": cell.seed,
                **rates,
                "der": row.after.der,
                "asr_retuned": row.after.retuned,
                "asr_retuned_twin": row.retuned_twin,
                "seconds": row.seconds,
                "guard_violated": row.violated,
                "note": row.note,
                "settings": json.dumps(row.settings, sort_keys=True),
                "device": cell.versions.get("device"),
                "digest": entry.digest,
                "record": store.content_path(entry),
            }
        )
    return rows


def cells_table(store: Store) -> Table:
    """Return the cells of a store that are done as a table; see :func:`rows_of`."""
    return Table(rows_of(store), f"Cells of {store.folder}")


def exported(store: Store, form: str) -> bytes:
    """Return the cells of a store in one of :data:`FORMATS`.

    Raises:
        UnsupportedError: If a library that the format needs is not installed.
    """
    return FORMATS[form](cells_table(store))


def _latex(table: Table) -> bytes:
    shown = [
        "case",
        "defense",
        "views",
        "seed",
        "acc_after",
        "asr_after",
        "ra_after",
        "der",
        "asr_retuned",
    ]
    text: str = (
        table.to_pandas()
        .reindex(columns=shown)
        .to_latex(index=False, escape=True, float_format="%.3f")
    )
    return text.encode()


def _parquet(table: Table) -> bytes:
    with needed("Parquet files"):
        import pyarrow  # noqa: F401
    data: bytes = table.to_pandas().to_parquet(index=False)
    return data


FORMATS: Mapping[str, Callable[[Table], bytes]] = {
    "csv": lambda table: table.to_csv().encode(),
    "json": lambda table: table.to_json().encode(),
    "latex": _latex,
    "parquet": _parquet,
}
"""The formats and the functions that write them."""
