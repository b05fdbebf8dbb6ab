"""What ``--help`` shows: commands and options in groups, and an example of each command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["EXAMPLES", "OPTIONS", "with_groups"]

COMMANDS = {
    "Models": ("purify", "scan", "evaluate"),
    "Evidence": ("report", "sign", "verify"),
    "Experiments": ("demo", "grid", "store", "zoo"),
    "About": ("list", "doctor"),
}
OPTIONS = {
    "Model and data": (
        *("--data", "--task", "--arch", "--weights", "--split", "--mean", "--std"),
        *("--image-size", "--channels", "--classes", "--read"),
    ),
    "Bounds": (
        *("--max-utility-drop", "--max-time", "--accept-low-utility", "--accept-findings"),
        *("--fail-on", "--baseline"),
    ),
    "Run": (
        *("--seed", "--device", "--resume", "--accelerate", "--shard", "--dry-run", "--store"),
        *("--workers", "--threads", "--ray", "--retry-failed", "--config"),
    ),
    "Output": (
        *("--out", "--force", "--format", "--json", "--to", "--evidence", "--record"),
        *("--push-to-hub", "--quiet"),
    ),
}
"""Options by group, in this order; options not listed come first, as the command's own."""
EXAMPLES = {
    "": "mmdefense scan model.safetensors --arch my_models:SignNet --data images",
    "purify": "mmdefense purify model.safetensors --arch my_models:SignNet --data images "
    "-o purified",
    "scan": "mmdefense scan my-vit --data images --fail-on medium",
    "evaluate": "mmdefense evaluate my-vit --data images --attack badnets --target stop",
    "report": "mmdefense report purified fine-tuned -o comparison.html",
    "sign": "mmdefense sign purified --key key.pem",
    "verify": "mmdefense verify purified --key key.pub",
    "list": "mmdefense list defenses fip",
    "doctor": "mmdefense doctor --json",
    "demo": "mmdefense demo --task point-cloud-classification -o out/clouds",
    "grid": "mmdefense grid run -o out/grid --case digits-badnets --defense fip",
    "grid run": "mmdefense grid run -o out/grid --case digits-badnets --defense fip --workers 2",
    "grid status": "mmdefense grid status -o out/grid",
    "grid export": "mmdefense grid export -o out/grid --format csv --to cells.csv",
    "grid report": "mmdefense grid report -o out/grid",
    "store": "mmdefense store ls out/grid",
    "store ls": "mmdefense store ls out/grid --json",
    "store show": "mmdefense store show out/grid 1f0c",
    "store verify": "mmdefense store verify out/grid",
    "store rm": "mmdefense store rm out/grid 1f0c",
    "store gc": "mmdefense store gc out/grid",
    "zoo": "mmdefense zoo list",
    "zoo list": "mmdefense zoo list --json",
    "zoo build": "mmdefense zoo build digits-badnets -o out/zoo",
    "zoo verify": "mmdefense zoo verify digits-badnets",
}


def _group_of(groups: Mapping[str, Iterable[str]], names: Iterable[str], other: str) -> str:
    return next((group for group, held in groups.items() if set(names) & set(held)), other)


def _write(formatter: Any, sections: Mapping[str, list[tuple[str, str]]]) -> None:
    for title, rows in sections.items():
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


def _write_options(command: Any, context: Any, formatter: Any) -> None:
    sections: dict[str, list[tuple[str, str]]] = {
        title: [] for title in ("Arguments", "Options", *OPTIONS, "Help")
    }
    for parameter in command.get_params(context):
        row = parameter.get_help_record(context)
        if row is None:
            continue
        title = "Arguments"
        if parameter.param_type_name == "option":
            title = "Help" if "--help" in parameter.opts else ""
            title = title or _group_of(OPTIONS, parameter.opts, "Options")
        sections[title].append(row)
        if "--format" in parameter.opts and _takes_json(command):
            sections[title].append(("--json", "The same as --format json."))
    _write(formatter, sections)


def _write_example(context: Any, formatter: Any) -> None:
    path = " ".join(context.command_path.split()[1:])
    if path in EXAMPLES:
        formatter.write_paragraph()
        formatter.write(f"Example:\n  {EXAMPLES[path]}\n")


def _takes_json(command: Any) -> bool:
    return any("--format" in parameter.opts for parameter in command.params)


class _Command(TyperCommand):
    """A command with grouped options, an example, and ``--json`` where it has ``--format``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if _takes_json(self):
            args = ["--format=json" if word == "--json" else word for word in args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_example(ctx, formatter)


class _Group(TyperGroup):
    """A group with its commands in groups, and an example."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(self, ctx, formatter)
        names = self.list_commands(ctx)
        limit = formatter.width - 6 - max(map(len, names))
        sections: dict[str, list[tuple[str, str]]] = {t: [] for t in (*COMMANDS, "Commands")}
        for name in names:
            command = self.get_command(ctx, name)
            if command is not None:
                title = _group_of(COMMANDS, [name], "Commands") if not ctx.parent else "Commands"
                sections[title].append((name, command.get_short_help_str(limit)))
        _write(formatter, sections)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        _write_example(ctx, formatter)


def with_groups(app: typer.Typer) -> None:
    """Group the help of an app and its subcommands; call it after all are registered."""
    app.info.cls = _Group
    for command in app.registered_commands:
        command.cls = _Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            with_groups(group.typer_instance)
