"""`mmdefense zoo`: list, build and verify small networks with a known backdoor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdefense.cli.arguments import Device, Quiet, TableFormat, check_form, loading, say, say_table
from mmdefense.tabular import Value

if TYPE_CHECKING:
    from mmdefense.metrics.backdoor import Rates

__all__ = ["zoo_app"]

zoo_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Small networks with a known backdoor and their clean twins: list, build, verify.",
)

Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Of victims.")]
Folder = Annotated[
    Path | None,
    typer.Option(help="Their folder; by default those shipped with the repository, then out/zoo."),
]


@zoo_app.command("list")
def list_victims(folder: Folder = None, form: TableFormat = "text") -> None:
    """List the victims: name, task, attack, ACC / ASR / RA, bytes, and the file or "to build".

    ACC is the metric of the task: mAP@50 for detection, BLEU for language.
    """
    from mmdefense.evaluation.zoo import find_card, zoo_cases

    check_form(form)
    rows: list[dict[str, Value]] = []
    for name, (case, _) in zoo_cases().items():
        found = find_card(name, folder)
        row: dict[str, Value] = {"name": name, "task": case.task, "attack": case.attack or "none"}
        if form == "text":
            row["rates"] = _in_percent(found[0].rates) if found else ""
        else:
            row |= {key: getattr(found[0].rates, key) if found else None for key in _RATES}
        row["bytes"] = found[0].size if found else None
        row["weights"] = str(found[1]) if found else "to build" if form == "text" else None
        rows.append(row)
    say_table(rows, form)


@zoo_app.command("build")
def build(
    names: Names = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the files.")] = Path(
        "out/zoo"
    ),
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Train victims and write weights and cards; by default those that are missing.

    Interrupted training is resumed.
    """
    with loading(quiet):
        import torch

        from mmdefense.evaluation.zoo import build_victim, find_card, zoo_cases
        from mmdefense.report.terminal import ProgressDisplay

    torch.set_num_threads(1)  # the last bits of results depend on it
    missing = [name for name in zoo_cases() if find_card(name) is None]
    for name in names or missing:
        with ProgressDisplay(quiet=quiet) as progress:
            card = build_victim(name, out, progress, device)
        say(f"{name}  {_in_percent(card.rates)}  {out / name}.safetensors")


@zoo_app.command("verify")
def verify(names: Names = None, folder: Folder = None, device: Device = "cpu") -> None:
    """Hash the files and measure ACC, ASR and RA again; exit code 1 if something differs.

    By default all victims that are present. A rate may differ by one point, because processors
    round differently.
    """
    from mmdefense.evaluation.zoo import find_card, verify_victim, zoo_cases

    here = [name for name in zoo_cases() if find_card(name, folder) is not None]
    faults = 0
    for name in names or here:
        found = verify_victim(name, folder, device=device)
        now = "not measured" if found.rates is None else _in_percent(found.rates)
        verdict = "differs" if found.faults else "agrees"
        say(f"{name}  card {_in_percent(found.card.rates)}  now {now}  {verdict}")
        for fault in found.faults:
            say(f"  {fault}")
        faults += bool(found.faults)
    say(f"{len(names or here)} victims, {faults} that differ")
    if faults:
        raise typer.Exit(1)


_RATES = ("acc", "asr", "ra")


def _in_percent(rates: Rates) -> str:
    """Return ACC / ASR / RA, as far as they were measured."""
    known = [value for key in _RATES if (value := getattr(rates, key)) is not None]
    return " / ".join(f"{100 * value:.1f}" for value in known)
