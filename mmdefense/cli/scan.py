"""``mmdefense scan``: inspect a model before use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdefense.cli.arguments import (
    AcceptLowUtility,
    Arch,
    Channels,
    Classes,
    Config,
    Device,
    ImageSize,
    KeptIn,
    Models,
    Numbers,
    Quiet,
    Reading,
    Seed,
    Task,
    Weights,
    loading,
    opened,
    reading_options,
    say,
)
from mmdefense.errors import BadInputError

__all__ = ["scan"]


def scan(
    models: Models,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Clean samples for the behaviour scan, in the same forms as for purify.",
        ),
    ] = None,
    task: Task = "auto",
    arch: Arch = None,
    weights: Weights = None,
    format_: Annotated[
        str, typer.Option("--format", help="text, csv, json, sarif or html.")
    ] = "text",
    fail_on: Annotated[
        str,
        typer.Option(help="Exit with 1 on findings of this level or above: low, medium or high."),
    ] = "high",
    seed: Seed = 0,
    mean: Numbers = None,
    std: Numbers = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    classes: Classes = None,
    read: Reading = None,
    device: Device = "cpu",
    accept_low_utility: AcceptLowUtility = False,
    store: KeptIn = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An earlier report, JSON or SARIF: its findings are marked as known, and do not "
            "count for --fail-on.",
        ),
    ] = None,
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Scan the files and weights of models and, with clean data, their behaviour.

    No code that comes with a model is run.
    """
    with loading(quiet):
        from mmdefense import sandbox
        from mmdefense.findings import FAILING, reaches
        from mmdefense.pipeline.scan import scan as look_into
        from mmdefense.report.terminal import ProgressDisplay
        from mmdefense.runtime.processes import refuse_launcher
        from mmdefense.scanning.baseline import compared, read_baseline
        from mmdefense.scanning.formats import FORMATS

    refuse_launcher("scan")
    if format_ not in FORMATS:
        raise BadInputError(f"--format must be one of {', '.join(FORMATS)}, got {format_!r}")
    if len(models) > 1 and (format_ != "text" or data is not None):
        option = "--data" if data is not None else f"--format {format_}"
        raise BadInputError(f"{option} takes one MODEL, got {len(models)}; scan them one by one")
    level = next((level for level in FAILING if level == fail_on), None)
    if level is None:
        raise BadInputError(f"--fail-on must be one of {', '.join(FAILING)}, got {fail_on!r}")
    known = None if baseline is None else read_baseline(baseline)
    reading = reading_options(mean, std, image_size, channels, classes, read)
    kept, failed = opened(store), False
    sandbox.fresh()
    for model in models:
        with ProgressDisplay(quiet=quiet) as progress:
            record = look_into(
                model,
                data,
                task=task,
                arch=arch,
                weights=weights,
                reading=reading,
                device=device,
                seed=seed,
                progress=progress,
                accept_low_utility=accept_low_utility,
                store=kept,
            )
        if known is not None:
            record = compared(record, known)
        if len(models) > 1:
            say(f"{model}:")
        typer.echo(FORMATS[format_](record))
        failed |= reaches(record.new, level)
    raise typer.Exit(int(failed))
