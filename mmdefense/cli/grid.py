"""`mmdefense grid` and `mmdefense store`: measure victims x defenses, and inspect the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdefense.cli.arguments import (
    Quiet,
    TableFormat,
    aligned,
    check_form,
    key_values,
    loading,
    say,
    say_table,
)
from mmdefense.errors import BadInputError
from mmdefense.tabular import Value

if TYPE_CHECKING:
    from mmdefense.evaluation.cases import CleanData
    from mmdefense.evaluation.grid import Grid
    from mmdefense.store import Store

__all__ = ["grid_app", "store_app"]

_HELP = {"help_option_names": ["-h", "--help"]}

grid_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=_HELP,
    help="Measure victims x defenses x seeds, with plain fine-tuning as the baseline.",
)
store_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=_HELP,
    help="Inspect a store of victims, cells, purifications and scans: list, show, verify, clean.",
)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the store.")]
Spec = Annotated[Path | None, typer.Argument(metavar="SPEC.toml", help="The axes, as a file.")]
Cases = Annotated[
    list[str] | None,
    typer.Option(
        "--case",
        metavar="NAME[,KEY=VALUE...]",
        help="A victim, with overrides such as ratio=0.01; by default all victims.",
    ),
]
Defenses = Annotated[
    list[str] | None,
    typer.Option(
        "--defense",
        metavar="NAME[,KEY=VALUE...]",
        help="A defense with its settings; by default the five of the demo.",
    ),
]
Clean = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHARE[:KIND]",
        help="Fraction of the training set that the defenses get: seen or unseen by the "
        "victim, noisy, blurred, or other (images of unknown classes); by default as each case "
        "says. Repeat for more.",
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(min=1, help="Number of seeds, from 0; by default 3, or the zoo's one."),
]
Zoo = Annotated[
    bool,
    typer.Option(
        "--zoo",
        help="Load the victims from the zoo instead of training them: those of --case, by default "
        "all whose weights are here (`mmdefense zoo list`).",
    ),
]
Baselines = Annotated[
    bool | None,
    typer.Option(
        "--baselines/--no-baselines",
        help="Also run plain fine-tuning with the same budget as each defense; by default yes.",
    ),
]
Retune = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Also retune each purified model, and a clean twin of its victim, on N poisoned "
        "samples, to see whether the backdoor comes back.",
    ),
]
Views = Annotated[
    list[str] | None,
    typer.Option(
        "--views",
        help="How clean samples are augmented: standard, as is usual in the domain; insertions, "
        "which imitate local triggers; or none. Repeat for more.",
    ),
]


def _grid(
    spec: Path | None,
    cases: list[str] | None,
    defenses: list[str] | None,
    seeds: int | None,
    baselines: bool | None,
    views: list[str] | None,
    clean: list[str] | None,
    retune: int,
    zoo: bool,
) -> Grid:
    """Return the grid of a file, or of the options."""
    from mmdefense.evaluation.cases import described_case, named_cases
    from mmdefense.evaluation.demo import DEFENSES
    from mmdefense.evaluation.grid import VIEWS, Grid
    from mmdefense.evaluation.lineup import Lineup
    from mmdefense.evaluation.spec import read_spec
    from mmdefense.evaluation.zoo import zoo_named

    if spec is not None:
        if cases or defenses or seeds or baselines is not None or views or clean or retune or zoo:
            raise BadInputError(
                f"{spec} already defines the grid; leave out --case, --defense, --seeds, "
                "--baselines, --views, --clean, --retune and --zoo"
            )
        return read_spec(spec)
    chosen = [known for known in VIEWS if known in (views or ("standard",))]
    if unknown := [name for name in views or () if name not in VIEWS]:
        raise BadInputError(f"--views must be one of {', '.join(VIEWS)}, got {unknown[0]!r}")
    if zoo:
        victims = zoo_named(cases or ())
    else:
        described = [_with_settings(text) for text in cases or ()]
        victims = [described_case({"base": name, **given}) for name, given in described]
    lineup = [_with_settings(text) for text in defenses or DEFENSES]
    return Grid(
        cases=victims or named_cases(),
        defenses=[Lineup(defense=name, settings=given) for name, given in lineup],
        seeds=range(seeds or (1 if zoo else 3)),
        baselines=baselines is not False,
        views=chosen,
        clean=[_clean_data(text) for text in clean or [""]],
        retune=retune,
        zoo=zoo,
    )


def _with_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Return a name and the settings after it; a comma may also be part of a value."""
    name, *parts = text.split(",")
    settings: list[str] = []
    for part in parts:
        if "=" in part or not settings:
            settings.append(part)
        else:
            settings[-1] += f",{part}"
    return name, key_values(settings)


def _clean_data(text: str) -> CleanData:
    """Return fraction and kind of the clean data; if empty, each case's own apply."""
    from mmdefense.evaluation.cases import CleanData
    from mmdefense.settings import checked_settings

    share, _, kind = text.partition(":")
    given = {**key_values([f"share={share}"] if share else []), **({"kind": kind} if kind else {})}
    return CleanData(**checked_settings(CleanData, given))


@grid_app.command("run")
def run(
    out: Out,
    spec: Spec = None,
    cases: Cases = None,
    defenses: Defenses = None,
    seeds: Seeds = None,
    baselines: Baselines = None,
    views: Views = None,
    clean: Clean = None,
    retune: Retune = 0,
    zoo: Zoo = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads per process; the last bits of results depend on it.")
    ] = 1,
    device: Annotated[
        str, typer.Option(help="For example cpu, or cuda:0,cuda:1, assigned to workers in turn.")
    ] = "cpu",
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Address of a Ray cluster to run on, such as auto."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Retry cells that failed.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Measure the cells missing from the store, and print a Markdown table.

    After an interruption, run it again: finished cells are kept.
    """
    from dataclasses import replace

    with loading(quiet):
        import torch

        from mmdefense.evaluation.cluster import run_on_ray
        from mmdefense.evaluation.grid import forget_failures, work
        from mmdefense.evaluation.tables import markdown
        from mmdefense.evaluation.workers import run_workers
        from mmdefense.report.terminal import CellsDisplay, ProgressDisplay
        from mmdefense.runtime.processes import refuse_launcher
        from mmdefense.store import Store

    refuse_launcher("grid run")
    devices = device.split(",")
    grid = replace(
        _grid(spec, cases, defenses, seeds, baselines, views, clean, retune, zoo),
        device=devices[0],
    )
    cells, store = grid.planned(), Store(out)
    if retry_failed:
        forget_failures(store, cells)
    (out / "grid.json").write_text(
        json.dumps([[cell.identity.digest, cell.identity.name] for cell in cells]), "utf-8"
    )
    if ray is not None:
        with ProgressDisplay(quiet=quiet) as progress:
            run_on_ray(grid, out, ray, threads=threads, progress=progress)
    elif workers > 1:
        with CellsDisplay(quiet=quiet) as display:
            run_workers(grid, out, workers, display, devices=devices, threads=threads)
    else:
        torch.set_num_threads(threads)
        with ProgressDisplay(quiet=quiet) as progress:
            work(store, cells, progress)
    say(markdown(grid.measured(store)))
    failed = [entry for cell in cells if (entry := store.find(cell.identity)) and entry.error]
    for entry in failed:
        say(f"failed: {entry.name}: {entry.error}", err=True)
    if failed:
        say(
            f"{len(failed)} cells failed; `mmdefense store show {out} DIGEST` shows the traceback, "
            "--retry-failed retries them",
            err=True,
        )
        raise typer.Exit(1)


@grid_app.command("status")
def status(out: Out, form: TableFormat = "text") -> None:
    """Show how many cells of the last run are done, failed and running."""
    from mmdefense.report.terminal import in_training

    check_form(form)
    store = _opened(out)
    try:
        planned = json.loads((out / "grid.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{out} has no grid; `mmdefense grid run` makes one") from error
    entries = {entry.digest: entry for entry in store.entries("cell")}
    claimed = store.claimed()
    states = {
        digest: entries[digest].status
        if digest in entries
        else ("running" if digest in claimed else "to do")
        for digest, _ in planned
    }
    if form != "text":
        every: list[dict[str, Value]] = [
            {
                "digest": digest,
                "name": name,
                "state": states[digest],
                "error": entries[digest].error if digest in entries else "",
            }
            for digest, name in planned
        ]
        say_table(every, form)
        return
    reached = list(states.values())
    shown = [f"{reached.count(state)} {state}" for state in ("done", "failed", "running", "to do")]
    if training := len(claimed - states.keys()):
        shown.append(in_training(training))
    say(", ".join(shown))
    rows = [
        (states[digest], name, entries[digest].error if digest in entries else "")
        for digest, name in planned
        if states[digest] in {"running", "failed"}
    ]
    if rows:
        say(aligned(rows))


@grid_app.command("export")
def export(
    out: Out,
    form: Annotated[str, typer.Option("--format", help="csv, json, latex or parquet.")] = "csv",
    target: Annotated[
        Path | None, typer.Option("--to", help="The file; by default standard output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write every measured cell as a row with its rates, settings and digest."""
    from mmdefense.checkpoints.outputs import check_replaceable_file
    from mmdefense.checkpoints.runs import write_atomically
    from mmdefense.evaluation.export import FORMATS, exported

    if form not in FORMATS:
        raise BadInputError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if form == "parquet" and target is None:
        raise BadInputError("parquet is a binary format; name a file: --to FILE.parquet")
    store = _opened(out)
    if target is not None:
        check_replaceable_file(target, None, store.parts, force=force)
    data = exported(store, form)
    if target is None:
        typer.echo(data.decode(), nl=False)
    else:
        write_atomically(target, lambda file: file.write(data))


@grid_app.command("report")
def report(out: Out) -> None:
    """Write OUT/leaderboard.html, a page with sorting and filtering that works offline."""
    from mmdefense.evaluation.export import rows_of
    from mmdefense.report.leaderboard import write_leaderboard

    page = write_leaderboard(rows_of(_opened(out)), out / "leaderboard.html")
    say(f"wrote {page}")


Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="The beginning of a digest.")]


@store_app.command("ls")
def list_entries(folder: Folder, form: TableFormat = "text") -> None:
    """List the entries: digest, kind, state, time and name."""
    whole = form != "text"  # programs get full values
    rows: list[dict[str, Value]] = [
        {
            "digest": entry.digest if whole else entry.digest[:12],
            "kind": entry.kind,
            "status": entry.status,
            "created": entry.created if whole else entry.created[:19],
            "name": entry.name,
        }
        for entry in _opened(folder).entries()
    ]
    say_table(rows, form)


@store_app.command("show")
def show(folder: Folder, digest: Digest) -> None:
    """Print an entry as JSON: what it depends on, its content, or its error and traceback."""
    from dataclasses import asdict

    store = _opened(folder)
    entry = store.named(digest)
    content = store.content(entry) if entry.files else None
    typer.echo(json.dumps({**asdict(entry), "content": content}, indent=2))


@store_app.command("verify")
def verify(folder: Folder) -> None:
    """Check the SHA-256 of every entry's files; exit code 1 if one differs."""
    store = _opened(folder)
    faults = store.verify()
    for fault in faults:
        say(fault)
    say(f"{len(store.entries())} entries, {len(faults)} faults")
    if faults:
        raise typer.Exit(1)


@store_app.command("rm")
def remove(folder: Folder, digest: Digest) -> None:
    """Remove an entry, so that it is computed again."""
    store = _opened(folder)
    entry = store.named(digest)
    store.forget(entry)
    say(f"removed {entry.kind} {entry.name}")


@store_app.command("gc")
def clean_up(folder: Folder) -> None:
    """Remove files that no entry needs."""
    freed = _opened(folder).gc()
    say(f"removed {freed.files} files, {freed.size / 1e6:.1f} MB")


def _opened(folder: Path) -> Store:
    from mmdefense.store import Store

    return Store(folder, create=False)
