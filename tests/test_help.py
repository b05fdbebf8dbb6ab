"""Help in groups with an example each, --json, and completion in the shell."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
import typer

from mmdefense.cli.app import app
from mmdefense.cli.help import COMMANDS, EXAMPLES, OPTIONS


def every_command():
    """Return each command by its path, the empty one for all, groups included."""
    found = {"": typer.main.get_command(app)}
    for name, command in found[""].commands.items():
        found[name] = command
        found |= {f"{name} {below}": c for below, c in getattr(command, "commands", {}).items()}
    return found


ALL = every_command()


def test_each_command_has_an_example_and_a_group():
    assert set(EXAMPLES) == set(ALL)
    assert sorted(sum(COMMANDS.values(), ())) == sorted(ALL[""].commands)


def test_the_groups_name_options_that_there_are():
    there = {name for command in ALL.values() for p in command.params for name in p.opts}
    assert {name for names in OPTIONS.values() for name in names} - there == {"--json"}


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_is_shown_whole_and_parses(path, mmdefense):
    example = EXAMPLES[path]
    shown = mmdefense(*path.split(), "--help")
    assert shown.code == 0
    assert shown.out.endswith(f"\nExample:\n  {example}\n")
    program, *words = shlex.split(example)
    assert (program, " ".join(words).startswith(path)) == ("mmdefense", True) or not path
    context, command = None, ALL[""]
    while hasattr(command, "commands"):
        context = command.make_context("mmdefense", words, parent=context)
        _, command, words = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
    command.make_context("mmdefense", words, parent=context)


def test_options_stand_in_their_groups(mmdefense):
    shown = mmdefense("purify", "--help").out
    titles = ["Arguments:", "Options:", *(f"{title}:" for title in OPTIONS), "Help:", "Example:"]
    places = [shown.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert shown.index("--arch") > shown.index("\nModel and data:")
    for option in ("--defense", "--set"):
        assert shown.index("\nOptions:") < shown.index(option) < shown.index("\nModel and data:")


def test_json_is_short_for_its_format(mmdefense):
    short, long = mmdefense("list", "tasks", "--json"), mmdefense("list", "tasks", "--format=json")
    assert (short.code, short.out) == (0, long.out)
    assert {row["kind"] for row in json.loads(short.out)} == {"tasks"}
    assert mmdefense("sign", "out", "--json").code == 2  # it prints no table


def test_purify_gives_its_result_as_json(place, mmdefense):
    done = mmdefense(*place.purify("--evidence", "none", "--quiet", "--json"))
    assert (done.code, done.err) == (0, "")
    (row,) = json.loads(done.out)
    assert (row["output"], row["defense"]) == ("out", "fine-tuning")
    assert mmdefense("report", place.out, "--json").out == done.out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("mmdefense pu", ["purify"]),
        ("mmdefense grid ru", ["run"]),
        ("mmdefense purify --max-u", ["--max-utility-drop"]),
        ("mmdefense purify --defense ft-", ["ft-sam"]),
        ("mmdefense evaluate --attack badn", ["badnets"]),
        ("mmdefense scan --task vid", ["video-classification"]),
    ],
)
def test_the_shell_completes(words, found):
    asked = {
        "_MMDEFENSE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "mmdefense"]
    done = subprocess.run(
        command, env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == found, done.stderr
