"""The command line: parses arguments, calls the library, and returns exit codes.

Exit codes: 0 ok; 1 the utility bound was violated, nothing was changed, an evaluation found a
working trigger, a scan has findings at the --fail-on level, or a file differs from its record or
signature; 2 bad input; 3 not supported, or a library is missing; 70 a bug in mmdefense; 130
interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from mmdefense import __version__
from mmdefense.cli.arguments import (
    AcceptFindings,
    AcceptLowUtility,
    Arch,
    Channels,
    Classes,
    Config,
    Data,
    Device,
    ImageSize,
    KeptIn,
    Model,
    Numbers,
    Quiet,
    Reading,
    Seed,
    Settings,
    TableFormat,
    Task,
    Weights,
    check_form,
    chosen_attack,
    completed,
    duration,
    key_values,
    loading,
    opened,
    reading_options,
    say,
    say_table,
)
from mmdefense.cli.grid import grid_app, store_app
from mmdefense.cli.help import with_groups
from mmdefense.cli.list import doctor, list_
from mmdefense.cli.scan import scan
from mmdefense.cli.sign import sign, verify
from mmdefense.cli.zoo import zoo_app
from mmdefense.errors import BadInputError, MMDefenseError, UnsupportedError, one_line, printable
from mmdefense.notes import notes_written

if TYPE_CHECKING:
    from mmdefense.analysis.gather import Level
    from mmdefense.checkpoints.hub import HubTarget
    from mmdefense.defenses.base import Defense
    from mmdefense.pipeline.jobs import Source
    from mmdefense.report.record import PurificationRecord
    from mmdefense.runtime.processes import Processes

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Find and remove backdoors in models that you did not train.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(grid_app, name="grid")
app.add_typer(store_app, name="store")
app.add_typer(zoo_app, name="zoo")


_UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]
"""click's usage error, which some versions of typer vendor under another name."""


def main() -> None:
    """Run the command line, with one-line error messages instead of tracebacks."""
    try:
        with notes_written():
            sys.exit(app(prog_name="mmdefense", standalone_mode=False))
    except _UsageError as error:
        _refuse_usage(error)
    except typer.Abort:
        sys.exit(130)
    except UnsupportedError as error:
        _fail(error, 3)
    except ImportError as error:  # an optional library that no reader reported
        from mmdefense.libraries import missing

        _fail(missing("this command", error), 3)
    except (MMDefenseError, OSError) as error:
        _fail(error, 2)
    except Exception as error:  # a bug in mmdefense: still one line, with how to get the traceback
        kind = type(error).__name__
        kept = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        _fail(
            f"internal error: {kind}: {one_line(error)}; rerun with mmdefense --debug for "
            f"the traceback{kept}",
            70,
        )


def _fail(message: object, code: int) -> NoReturn:
    if os.environ.get("MMDEFENSE_DEBUG"):
        raise  # only called from the handlers in main
    number = int(os.environ.get("RANK", "0"))  # rank of a process started by a launcher
    of = f"process {number + 1}: " if number else ""
    typer.echo(f"mmdefense: {of}{printable(str(message))}", err=True)
    sys.exit(code)


def _refuse_usage(error: typer.BadParameter) -> NoReturn:
    """Explain a usage error in one line; without a command, list the commands."""
    said, command = error.format_message().strip(), "mmdefense"
    if "\n" in said:
        say(said, err=True)
        sys.exit(2)
    if error.ctx is not None:
        command = error.ctx.command_path
    _fail(f"{said[:1].lower()}{said[1:].rstrip('.')}; see {command} --help", 2)


def _say_version(asked: bool) -> None:
    if asked:
        say(f"mmdefense {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if debug:
        os.environ["MMDEFENSE_DEBUG"] = "1"


@app.command()
def purify(
    context: typer.Context,
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")],
    defense: Annotated[
        str,
        typer.Option(
            help="A defense, from `list defenses`; auto tries several.",
            autocompletion=completed("defenses"),
        ),
    ] = "fip",
    task: Task = "auto",
    arch: Arch = None,
    weights: Weights = None,
    settings: Settings = None,
    seed: Seed = 0,
    max_utility_drop: Annotated[
        float, typer.Option(help="Largest allowed drop of the task metric on held-out data.")
    ] = 0.02,
    max_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time limit, such as 90s, 30m or 2h; the best model so far is kept.",
        ),
    ] = None,
    evidence: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="Evidence to compute: none; fast, at most 15 % of the purification's time; "
            "or full. The output lists what was left out.",
        ),
    ] = "fast",
    mean: Numbers = None,
    std: Numbers = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    classes: Classes = None,
    read: Reading = None,
    device: Device = "cpu",
    accept_low_utility: AcceptLowUtility = False,
    accept_findings: AcceptFindings = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    accelerate: Annotated[
        bool,
        typer.Option(
            "--accelerate", help="Share the work between the processes started by torchrun."
        ),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Also shard the weights over these processes, to fine-tune large models.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done and estimate the time.")
    ] = False,
    store: KeptIn = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the output to the Hugging Face hub."),
    ] = None,
    config: Config = None,
    quiet: Quiet = False,
    form: TableFormat = "text",
) -> None:
    """Purify a model with a little clean data, and write it with its evidence to a new folder."""
    begun = time.monotonic()
    with loading(quiet):
        from mmdefense.analysis.gather import check_level
        from mmdefense.pipeline.jobs import Source, assist, partial_folder, purify_files
        from mmdefense.pipeline.purification import configured
        from mmdefense.report.terminal import ProgressDisplay
        from mmdefense.runtime.deadline import Deadline

    check_form(form)
    given = {"seed": seed, "max_utility_drop": max_utility_drop, **key_values(settings)}
    chosen = configured(defense, given)
    reading = reading_options(mean, std, image_size, channels, classes, read)
    processes, device = _processes(context, accelerate, shard, device, dry_run)
    source = Source(
        model=model,
        data=data,
        task=task,
        arch=arch,
        weights=weights,
        reading=reading,
        device=device,
        accept_low_utility=accept_low_utility,
        accept_findings=accept_findings,
        also_read=() if classes is None else (classes,),
    )
    limit, level = duration(max_time), check_level(evidence)
    if dry_run:
        _show_plan(source, chosen, level)
        return
    if not processes.is_main:
        assist(source, chosen, processes)
        return
    target = _hub_target(push_to_hub, source, force)
    command = shlex.join(["mmdefense", *sys.argv[1:]])
    try:
        with ProgressDisplay(quiet=quiet) as progress:
            purified = purify_files(
                source,
                chosen,
                out,
                resume=resume,
                force=force,
                progress=progress,
                max_seconds=None if limit is None else Deadline(begun + limit),
                evidence=level,
                command=command,
                processes=processes,
                kept=opened(store),
            )
    except KeyboardInterrupt:
        kept = partial_folder(out)
        way_on = f"progress saved to {kept}; rerun the same command with --resume"
        say(
            f"mmdefense: interrupted; {way_on if kept.exists() else 'no progress to save'}",
            err=True,
        )
        raise typer.Exit(130) from None
    _say_what_was_done(purified, out, form)
    finding = purified.guard.violated or bool(purified.unchanged)
    if target is not None:
        said = "not pushed to the hub" if finding else f"pushed to {target.upload(out)}"
        say(said, err=form != "text")
    raise typer.Exit(int(finding))


@app.command()
def evaluate(
    model: Model,
    data: Data,
    task: Task = "auto",
    arch: Arch = None,
    weights: Weights = None,
    split: Annotated[str, typer.Option(help="train or test, if the data is split.")] = "test",
    attack: Annotated[
        str | None,
        typer.Option(help="An attack, from `list attacks`.", autocompletion=completed("attacks")),
    ] = None,
    trigger: Annotated[
        Path | None,
        typer.Option(
            help="An image whose alpha channel is the mask, or an npz with pattern and mask; "
            "for an --attack that learns its trigger, a safetensors file with the learnt "
            "trigger."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="The attacker's target: a class, by number or name, or a text. Default: the "
            "attack's own."
        ),
    ] = None,
    settings: Settings = None,
    mean: Numbers = None,
    std: Numbers = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    classes: Classes = None,
    read: Reading = None,
    device: Device = "cpu",
    retune: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Also fine-tune a copy on clean samples plus N poisoned ones, to see whether "
            "the backdoor comes back; needs --attack or --trigger.",
        ),
    ] = None,
    clean_twin: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A similar model that never had the backdoor, retuned for comparison.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the measurements as JSON."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="An output of purify for this model (as the given or the purified one); the "
            "measurements are added to its record and page.",
        ),
    ] = None,
    accept_low_utility: AcceptLowUtility = False,
    accept_findings: AcceptFindings = False,
    form: TableFormat = "text",
    config: Config = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model on clean data and, if a trigger or an attack is given, with the trigger."""
    with loading(quiet):
        from mmdefense.checkpoints.outputs import EVALUATION_MARK, check_replaceable_file
        from mmdefense.checkpoints.runs import write_atomically
        from mmdefense.pipeline.evaluating import Retune, evaluate_files
        from mmdefense.pipeline.sources import Source
        from mmdefense.report.terminal import ProgressDisplay
        from mmdefense.runtime.processes import refuse_launcher

    refuse_launcher("evaluate")
    check_form(form)
    reading = reading_options(mean, std, image_size, channels, classes, read)
    source = Source(
        model=model,
        data=data,
        task=task,
        arch=arch,
        weights=weights,
        split=split,
        reading=reading,
        device=device,
        accept_low_utility=accept_low_utility,
        accept_findings=accept_findings,
        also_read=() if classes is None else (classes,),
    )
    choice = chosen_attack(attack, trigger, target, settings)
    asked = None
    if retune is not None or clean_twin is not None:
        asked = Retune(retune or 0, clean_twin)
    if out is not None:
        read_too = [path for path in (trigger, record, clean_twin) if path is not None]
        check_replaceable_file(out, EVALUATION_MARK, [*source.inputs(), *read_too])
    command = shlex.join(["mmdefense", *sys.argv[1:]])
    with ProgressDisplay(quiet=quiet or not sys.stderr.isatty()) as progress:
        found = evaluate_files(
            source, choice, retune=asked, record=record, command=command, progress=progress
        )
    if out is not None:
        write_atomically(out, lambda file: file.write(found.to_json().encode()))
    if form != "text":
        say_table(found.table().rows, form)
    else:
        for line in found.lines():
            say(line)
    if record is not None and form == "text":
        say(f"recorded in {record}, as of the {' and the '.join(found.recorded_as)}")
    raise typer.Exit(int(found.finding))


app.command("scan")(scan)


@app.command()
def report(
    outs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="One or more outputs of purify.")
    ],
    page: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The file to write. Default: inside OUT, if only one.",
        ),
    ] = None,
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="html, a page; cyclonedx, the model's bill of materials (ML-BOM); csv or json, "
            "one row per OUT.",
        ),
    ] = "html",
) -> None:
    """Rebuild the page of an output from its record, or compare several on one page."""
    from mmdefense.checkpoints.outputs import check_replaceable_file
    from mmdefense.checkpoints.runs import write_atomically
    from mmdefense.report.bom import write_bom
    from mmdefense.report.compare import compare, comparison_table, rebuild
    from mmdefense.report.statement import differing

    forms = ("html", "cyclonedx", "csv", "json")
    if format_ not in forms:
        raise BadInputError(f"--format must be one of {', '.join(forms)}, got {format_!r}")
    if format_ == "cyclonedx" and len(outs) > 1:
        raise BadInputError(f"--format cyclonedx takes one OUT, got {len(outs)}")

    faults = [f"{out}: {fault}" for out in outs for fault in differing(out)]
    if format_ in {"csv", "json"}:
        table = comparison_table(outs)
        text = table.to_csv() if format_ == "csv" else table.to_json()
        if page is None:
            typer.echo(text, nl=False)
            raise typer.Exit(int(bool(faults)))
        check_replaceable_file(page, None)
        write_atomically(page, lambda file: file.write(text.encode()))
    elif format_ == "cyclonedx":
        page = write_bom(outs[0], page)
    elif len(outs) == 1:
        page = rebuild(outs[0], page)
    elif page is None:
        raise BadInputError("to compare several outputs, name the page to write: -o PAGE")
    else:
        compare(outs, page)
    for fault in faults:
        say(f"mmdefense: {fault}", err=True)
    say(f"wrote {page}")
    raise typer.Exit(int(bool(faults)))


app.command("sign")(sign)
app.command("verify")(verify)
app.command("list")(list_)
app.command("doctor")(doctor)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")],
    task: Annotated[str, typer.Option(help="A task, from `list tasks`.")] = "image-classification",
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    form: TableFormat = "text",
    quiet: Quiet = False,
) -> None:
    """Plant a real backdoor in a small model, remove it with several defenses, and compare."""
    with loading(quiet):
        from rich.console import Console

        from mmdefense.evaluation.demo import run_demo
        from mmdefense.report.tables import results_table
        from mmdefense.report.terminal import ProgressDisplay

    check_form(form)
    with ProgressDisplay(quiet=quiet) as progress:
        record = run_demo(out, task=task, seed=seed, force=force, progress=progress)
    if form != "text":
        say_table(record.table().rows, form)
        return
    console = Console()
    if not console.is_terminal:  # do not wrap lines in a log
        console = Console(width=110)
    console.print(results_table(record.rows, record.title, record.metric))
    say(f"wrote {out}/report.html")


with_groups(app)


def _say_what_was_done(purified: PurificationRecord, out: Path, form: str) -> None:
    from mmdefense.pipeline.jobs import partial_folder
    from mmdefense.report.compare import comparison_table

    if form != "text":
        say_table(comparison_table([out]).rows, form)
        return
    if purified.scan is not None:
        say(f"the given model: {purified.scan.verdict.text}")
    if purified.unchanged:
        say(f"nothing was changed: {purified.unchanged}")
        say(f"wrote {out}/report.html and the unchanged model")
    else:
        say(f"{purified.guard.message}\nwrote {out}/report.html and the purified model")
    if purified.choice is not None:
        say("\n".join(purified.choice.why))
    if partial_folder(out).exists():
        say("to continue, rerun the command with more time, --resume and --force")


def _processes(
    context: typer.Context, accelerate: bool, shard: bool, device: str, dry_run: bool
) -> tuple[Processes, str]:
    """Return the processes of this command, and the device of this one.

    Raises:
        BadInputError: If the options do not match how the command was launched.
    """
    from mmdefense.runtime.processes import Processes, joined, launched

    if not accelerate:
        if shard:
            raise BadInputError("--shard splits weights over several processes; add --accelerate")
        if launched() > 1:
            raise BadInputError(
                f"this is one of {launched()} processes, which would all write the same output; "
                "add --accelerate, or start one process"
            )
        return Processes(), device
    if dry_run or device != "cpu":
        refused = "--dry-run" if dry_run else "--device"
        raise BadInputError(
            f"{refused} cannot be used with --accelerate, which assigns a device to each process"
        )
    return context.with_resource(joined(splits=shard))


def _show_plan(source: Source, defense: Defense, evidence: Level) -> None:
    from mmdefense.pipeline.planning import plan

    for line in plan(source, defense, evidence).lines():
        say(line)


def _hub_target(repo: str | None, source: Source, force: bool) -> HubTarget | None:
    from mmdefense.checkpoints.hub import HubTarget

    return None if repo is None else HubTarget(repo, given=str(source.model), force=force)
