"""`mmdefense list` and `mmdefense doctor`: what is available, and what is missing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from mmdefense.cli.arguments import TableFormat, aligned, loading, say, say_table
from mmdefense.errors import BadInputError

__all__ = ["doctor", "list_"]


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="defenses, attacks, adapters, tasks, data or cases; by default all.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show one of them with its settings.")
    ] = None,
    form: TableFormat = "text",
) -> None:
    """List all named components, including plug-ins, or the settings of one of them."""
    with loading():
        from mmdefense.cli.catalogue import KINDS, details, known

    if kind not in {None, *KINDS}:
        raise BadInputError(f"KIND must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind is not None and name is not None:
        about, option, settings = details(kind, name)
        if form != "text":
            say_table(
                [
                    {"name": s.name, "default": s.default, "kind": s.kind, "about": s.about}
                    for s in settings
                ],
                form,
            )
            return
        say(about)
        if settings:
            say(f"\nSettings, each {option} NAME=VALUE:")
        rows = [(s.name, s.default or "-", s.kind, s.about) for s in settings]
        if rows:
            say(aligned(rows, indent="  "))
        return
    if form != "text":
        every = [
            {"kind": one, "name": held, "about": about}
            for one in ([kind] if kind else KINDS)
            for held, about in known(one)
        ]
        say_table(every, form)
        return
    for one in [kind] if kind else KINDS:
        if kind is None:
            say(f"{one}:")
        say(aligned(list(known(one)), indent="" if kind else "  "))


def doctor(form: TableFormat = "text") -> None:
    """Show what this installation has and what is missing."""
    from mmdefense.cli.doctor import examine

    if form == "text":
        rows = [
            (found.subject, f"{found.state}; {found.remedy}" if found.remedy else found.state)
            for found in examine()
        ]
        say(aligned(rows))
    else:
        say_table([asdict(found) for found in examine()], form)
