"""Shared parts of the command line: options, their parsing, and printed tables."""

from __future__ import annotations

import ast
import difflib
import re
import shutil
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdefense.errors import BadInputError, one_line, printable
from mmdefense.files import read_bytes
from mmdefense.notes import Note
from mmdefense.tabular import Table, Value

if TYPE_CHECKING:
    from mmdefense.pipeline.evaluating import AttackChoice
    from mmdefense.store import Store

__all__ = [
    "AcceptFindings",
    "AcceptLowUtility",
    "Arch",
    "Channels",
    "Classes",
    "Config",
    "Data",
    "Device",
    "ImageSize",
    "Model",
    "Models",
    "Numbers",
    "Quiet",
    "Reading",
    "Seed",
    "Settings",
    "TableFormat",
    "Task",
    "Weights",
    "aligned",
    "check_form",
    "chosen_attack",
    "completed",
    "duration",
    "key_values",
    "loading",
    "opened",
    "reading_options",
    "say",
    "say_table",
]

FORMS = ("text", "csv", "json")
"""Formats of printed tables."""


def _not_empty(text: str | None) -> str | None:
    """Reject an empty string, which as a path would mean the current folder."""
    if text == "":
        raise BadInputError("MODEL and --data must name a folder, a file or an id, got ''")
    return text


def _none_empty(texts: list[str]) -> list[str]:
    for text in texts:
        _not_empty(text)
    return texts


def _configured(context: typer.Context, file: Path | None) -> Path | None:
    """Use the options in a file as the defaults of a command.

    Raises:
        BadInputError: If it cannot be read, or the command has no such option.
    """
    if file is None:
        return None
    try:
        held = tomllib.loads(read_bytes(file).decode("utf-8"))
    except ValueError as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"config {file} cannot be read as TOML: {one_line(error)}") from error
    options = {
        name.removeprefix("--"): parameter
        for parameter in context.command.params
        for name in parameter.opts
        if name.startswith("--") and name not in {"--config", "--help"}
    }
    for key, value in held.items():
        if key not in options:
            near = difflib.get_close_matches(key, options, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(options)}"
            raise BadInputError(
                f"config {file} has {key!r}, and {context.command_path} has no such option; {hint}"
            )
        _check_value(value, options[key], f"{key} of config {file}")
    context.default_map = {str(options[key].name): value for key, value in held.items()}
    return file


def _check_value(value: Any, option: Any, what: str) -> None:
    """Reject values that an option could not take on the command line."""
    single = isinstance(value, str | int | float) and not isinstance(value, bool)
    if option.is_flag:
        fits, needed = isinstance(value, bool), "true or false"
    elif option.multiple:
        fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
        needed = 'a list of texts such as ["KEY=VALUE"]'
    else:
        fits, needed = single, "one text or number, as on the command line"
    if not fits:
        raise BadInputError(f"{what} must be {needed}, got {value!r:.80}")


def completed(kind: str) -> Callable[[str], list[str]]:
    """Return a shell completer for names, including plug-ins, which it does not load."""

    def complete(incomplete: str) -> list[str]:
        names = {entry.name for entry in entry_points(group=f"mmdefense.{kind}")}
        return sorted(name for name in names if name.startswith(incomplete))

    return complete


def _hushed(quiet: bool) -> bool:
    if quiet:
        warnings.simplefilter("ignore", Note)
    return quiet


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=_hushed,
        help="Show no progress and no notes; results and errors are still printed.",
    ),
]
TableFormat = Annotated[str, typer.Option("--format", help="text, csv or json.")]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        is_eager=True,  # it sets the defaults of the other options
        callback=_configured,
        help="A TOML file with options of this command, for example fail-on = 'medium' or "
        "seed = 1; the command line takes precedence.",
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face folder or id, a state dict, or a checkpoint.",
        callback=_not_empty,
    ),
]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="One or more models: Hugging Face folder or id, state dict, or checkpoint.",
        callback=_none_empty,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="Samples in a format of the task: one folder per class with images, clips or "
        "clouds, COCO, VOC, texts, an archive, a data set id, or a name from `list data`.",
        callback=_not_empty,
    ),
]
Task = Annotated[
    str,
    typer.Option(
        help="The task, from `list tasks`; auto infers it from the model.",
        autocompletion=completed("tasks"),
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:CALLABLE",
        help="A callable that builds the model for a state dict, for example 'my_net:Net', "
        "'nets/my_net.py:Net' or 'my_net:Net(width=8)'.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Which weights in a training checkpoint, such as state_dict_ema; needed if more "
        "than one set fits.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting; repeat for more. `list defenses NAME` shows them.",
    ),
]
Numbers = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Per-channel normalisation of the inputs.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="PIXELS", help="Resize images or frames to a square of this side."),
]
Channels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Channels of the images or frames; by default as in the model or the data."
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The model's class names in label order, if the model has none: one per line, or "
        "JSON.",
    ),
]
Reading = Annotated[
    list[str] | None,
    typer.Option(
        "--read",
        metavar="KEY=VALUE",
        help="Any other reading option, such as frames=16, points=512, pair=en,de or "
        "max_length=64; repeat for more.",
    ),
]
Device = Annotated[str, typer.Option(help="For example cpu, cuda or cuda:1.")]
AcceptLowUtility = Annotated[
    bool,
    typer.Option(
        "--accept-low-utility",
        help="Continue even if the model performs too poorly on this data to be measured.",
    ),
]
KeptIn = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="STORE",
        help="A store of results: reuse earlier results from it, and add new ones.",
    ),
]
AcceptFindings = Annotated[
    bool,
    typer.Option(
        "--accept-findings",
        help="Continue even if the scan of the model's files has high-level findings.",
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.")]


@contextmanager
def loading(quiet: bool = False) -> Iterator[None]:
    """Show on a terminal that libraries are being loaded, which takes seconds."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("loading PyTorch"):
        yield


def opened(store: Path | None) -> Store | None:
    """Return the store of a folder; None if none was given."""
    from mmdefense.store import Store

    return None if store is None else Store(store)


def reading_options(
    mean: str | None,
    std: str | None,
    image_size: int | None,
    channels: int | None,
    classes: Path | None,
    more: list[str] | None,
) -> dict[str, Any]:
    """Return the given reading options by name."""
    from mmdefense.class_names import read_class_names

    named = {
        "mean": _numbers("--mean", mean),
        "std": _numbers("--std", std),
        "image_size": image_size,
        "channels": channels,
        "classes": None if classes is None else read_class_names(classes),
    }
    given = {name: value for name, value in named.items() if value is not None}
    return given | key_values(more)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        numbers = None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInputError(
            f"{option} must be comma-separated numbers, such as 0.5,0.5,0.5, got {text!r}"
        ) from None
    return numbers


_YEAR = 365 * 24 * 3600.0
_MOST_BITS = 10_000  # Python refuses to print larger integers


def duration(text: str | None) -> float | None:
    """Return the seconds of a duration such as ``90s``, ``30m`` or ``2h``."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise BadInputError(f"--max-time must be a duration such as 90s, 30m or 2h, got {text!r}")
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
    if not 0 < seconds < _YEAR:
        raise BadInputError(f"--max-time must be more than 0 and less than a year, got {text!r}")
    return seconds


def key_values(settings: list[str] | None) -> dict[str, Any]:
    """Return ``key=value`` settings by name."""
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, sign, value = setting.partition("=")
        if not sign:
            raise BadInputError(f"--set and --read must be KEY=VALUE, got {setting!r}")
        parsed[name] = _literal(value)
    return parsed


def _literal(text: str) -> Any:
    """Parse a text as a Python literal, or return it unchanged."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if isinstance(value, int) and value.bit_length() > _MOST_BITS else value


def chosen_attack(
    name: str | None, trigger: Path | None, target: str | None, settings: list[str] | None
) -> AttackChoice | None:
    """Return the attack to evaluate; None if none was given."""
    from mmdefense.pipeline.evaluating import AttackChoice

    if name is None and trigger is None and target is None and not settings:
        return None
    return AttackChoice(name=name, trigger=trigger, target=target, settings=key_values(settings))


def say(text: str, *, err: bool = False) -> None:
    """Print lines, with terminal control sequences (which files may contain) escaped.

    Args:
        text: One or more lines.
        err: Whether to print to standard error.
    """
    typer.echo("\n".join(map(printable, text.split("\n"))), err=err)


def say_table(rows: Sequence[Mapping[str, Value]], form: str) -> None:
    """Print rows as CSV or JSON, or as text in aligned columns without their names.

    Raises:
        BadInputError: If the format is unknown.
    """
    check_form(form)
    if form == "text":
        cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
        if cells:
            say(aligned(cells))
    else:
        table = Table(rows)
        typer.echo(table.to_csv() if form == "csv" else table.to_json(), nl=False)


def check_form(form: str) -> None:
    """Check the value of ``--format``.

    Raises:
        BadInputError: If it is unknown.
    """
    if form not in FORMS:
        raise BadInputError(f"--format must be one of {', '.join(FORMS)}, got {form!r}")


def aligned(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Return rows as text, one line each, with aligned columns.

    On a terminal the last column is wrapped to its width; elsewhere lines are not wrapped, so that
    they can be searched.
    """
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    edge = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    start = len(indent) + sum(width + 2 for width in widths)
    lines = []
    for *cells, last in rows:
        head = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        text = [last]
        if edge > start + 20:
            text = textwrap.wrap(last, edge - start, break_on_hyphens=False) or [""]
        lines += [f"{indent}{head}{text[0]}".rstrip(), *(" " * start + more for more in text[1:])]
    return "\n".join(lines)
