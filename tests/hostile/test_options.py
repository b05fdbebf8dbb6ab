"""Options that cannot be, a row each: exit code 2, one line, nothing written."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial

import pytest
from commands import CLASSES, small_images, write_images

from mmdefense import registry
from mmdefense.errors import BadInputError
from mmdefense.pipeline.purification import configured
from mmdefense.settings import checked_settings, fields_of

FAR = str(2**64)

PURIFY = [
    (
        ("--seed", FAR),
        "seed of FineTuning must be a whole number that is finite and fits in 64 bits",
    ),
    (("--seed", str(2**32)), "seed must lie in [0, 4294967295]"),
    (("--seed", "-1"), "seed must lie in [0, 4294967295], got -1"),
    (("--seed", "1e3"), "--seed"),
    (("--seed", ""), "--seed"),
    (("--image-size", "100000"), "image_size must be at least 1 and at most 8192, got 100000"),
    (("--image-size", "0"), "--image-size"),
    (("--image-size", FAR), "finite and fits in 64 bits"),
    (("--channels", "100000"), "channels must be at least 1 and at most 4096"),
    (("--channels", "-1"), "--channels"),
    (("--device", "meta"), "device 'meta' is not usable here"),
    (("--device", ""), "device '' is not usable here"),
    (("--device", "cuda:99"), "device 'cuda:99' is not usable here"),
    (("--mean", "0.5", "--std", "0"), "std must be finite and above 0"),
    (("--mean", "0.5", "--std", "-1"), "std must be finite and above 0"),
    (("--mean", "0.5", "--std", "inf"), "std of image-classification must be a list"),
    (("--mean", "nan", "--std", "1"), "mean of image-classification must be a list"),
    (("--mean", "1e400", "--std", "1"), "mean of image-classification must be a list"),
    (("--mean", "", "--std", "1"), "--mean must be comma-separated numbers"),
    (("--arch", "sys:exit"), "arch 'sys:exit' cannot be built: SystemExit"),
    (("--arch", "sys:exit(0)"), "cannot be built: SystemExit"),
    (("--arch", "os:getcwd"), "must return a torch.nn.Module, got str"),
    (("--arch", "os"), "arch must be module:callable"),
    (("--arch", ""), "--arch module:callable"),
    (("--arch", ":Net"), "cannot be built"),
    (("--arch", f"commands:Net({'(' * 500}"), "arch must be module:callable"),
    (("--arch", f"commands:Net({'-' * 20_000}1)"), ""),
    (("--task", "nothing"), "unknown task 'nothing'"),
    (("--task", ""), "unknown task ''"),
    (("--defense", ""), "unknown defense ''"),
    (("--weights", "nothing"), "nothing"),
    (("--max-time", "0"), "--max-time must be a duration such as 90s"),
    (("--max-time", "0s"), "--max-time must be more than 0"),
    (("--max-time", "-1s"), "--max-time must be a duration such as 90s"),
    (("--max-time", f"{'9' * 400}h"), "--max-time must be more than 0 and less than a year"),
    (("--max-utility-drop", "nan"), "max_utility_drop"),
    (("--max-utility-drop", "inf"), "max_utility_drop"),
    (("--max-utility-drop", "-1"), "max_utility_drop must lie in [0, 1], got -1.0"),
    (("--evidence", "much"), "much"),
    (("--classes", "nowhere.txt"), "does not exist"),
    (("--classes", "."), "is not a regular file"),
    (("--classes", "/dev/zero"), "is not a regular file"),
    (("--read", "steps"), "must be KEY=VALUE"),
    (("--read", "nothing=1"), "has no option 'nothing'"),
    (("--read", "image_size=nan"), "image_size"),
    (("--read", f"channels={FAR}"), "channels"),
    (("--read", "order=5"), "order"),
    (("--read", "split=test"), "has no option 'split'"),
    (("--set", "=1"), "has no setting ''"),
    (("--set", "lr=1e400"), "lr of FineTuning must be a number that is finite"),
    (("--set", "lr=1e300"), "lr must be at most 1e+30"),
    (("--set", "lr=-1"), "lr must be at least 0, got -1"),
    (("--set", "momentum=2"), "momentum must lie in [0, 1], got 2"),
    (("--set", "momentum=-1"), "momentum must lie in [0, 1], got -1"),
    (("--set", "batch_size=0"), "batch_size must lie in [1, 65536], got 0"),
    (
        ("--set", f"steps={FAR}"),
        "a whole number that is finite and fits in 64 bits",
    ),
    (("--set", f"steps={2**62}"), "steps must be at most 4.29497e+09"),
    (("--set", f"steps=0x{'f' * 5000}"), "steps of FineTuning must be a whole number"),
    (("--set", f"steps={'9' * 5000}"), "steps of FineTuning must be a whole number"),
    (("--set", f"steps={'[' * 5000}"), "steps of FineTuning must be a whole number"),
    (("--set", "holdout=0"), "holdout must lie in (0, 1)"),
    (("--set", "seed=-1"), "seed must lie in"),
    (("--nothing",), "no such option"),
    (("more",), "unexpected extra argument"),
    (("--data", ""), "data"),
    (("--data", "."), "which is an input"),
    (("--data", "/dev/null"), "none found"),
    (("-o", ""), ""),
    (("-o", "net.safetensors"), ""),
    (("-o", "net.safetensors/out"), ""),
]
"""Options behind a sound purification, of which the last counts, and words of the line."""


def one_line(outcome, words=""):
    from test_bad_input import BEFORE

    assert outcome.code == 2, outcome
    lines = [line for line in outcome.err.splitlines() if not BEFORE.fullmatch(line)]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("mmdefense: ")
    assert words in lines[0]
    assert lines[0].isprintable()
    assert len(lines[0]) < 1500
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("options", "words"), PURIFY, ids=[" ".join(row[0])[:40] for row in PURIFY]
)
def test_purify(options, words, place, mmdefense, monkeypatch):
    monkeypatch.chdir(place.folder)
    before = place.model.read_bytes()
    one_line(mmdefense(*place.purify(), *options), words)
    assert place.files() == []
    assert place.model.read_bytes() == before


def evaluation(place, *more):
    return [
        "evaluate",
        str(place.model),
        "--data",
        str(place.data),
        "--arch",
        "commands:Net",
        *more,
    ]


EVALUATE = [
    (("-o", "nosuchdir/x.json"), "the folder of nosuchdir/x.json does not exist"),
    (("-o", "."), "output ."),
    (("--split", "both"), "split must be 'train' or 'test', got 'both'"),
    (("--split", ""), "split must be 'train' or 'test'"),
    (("--attack", "nothing"), "unknown attack 'nothing'"),
    (("--attack", ""), "unknown attack ''"),
    (("--attack", "badnets", "--target", "-1"), "target"),
    (("--attack", "badnets", "--target", FAR), "target"),
    (("--attack", "badnets", "--target", str(CLASSES)), "target"),
    (("--attack", "badnets", "--target", "nan"), "target must be a class"),
    (("--attack", "badnets", "--target", ""), "target must be a class"),
    (("--attack", "badnets", "--set", "size=-1"), "size"),
    (("--attack", "badnets", "--set", "size=0"), "size"),
    (("--attack", "badnets", "--set", "size=1000000"), "size"),
    (("--attack", "badnets", "--set", "ratio=nan"), "ratio"),
    (("--attack", "badnets", "--set", "seed=-1"), "seed must lie in"),
    (("--attack", "blended", "--set", "alpha=nan"), "alpha"),
    (("--attack", "blended", "--set", "alpha=-1"), "alpha"),
    (("--attack", "wanet", "--set", "grid=0"), "grid"),
    (("--attack", "wanet", "--set", "grid=-5"), "grid"),
    (("--target", "1"), "without an attack or a trigger"),
    (("--trigger", "nowhere.png"), "does not exist"),
    (("--trigger", "."), "is not a regular file"),
    (("--trigger", "/dev/zero"), "is not a regular file"),
    (("--trigger", "net.safetensors"), "net.safetensors"),
    (("--attack", "input-aware", "--trigger", "nowhere.safetensors"), "does not exist"),
    (("--retune", "5"), "give --attack or --trigger"),
    (("--attack", "badnets", "--retune", "0"), "at least 1 poisoned sample, got 0"),
    (("--attack", "badnets", "--retune", "-1"), "at least 1 poisoned sample, got -1"),
    (("--attack", "badnets", "--retune", FAR), "retune must be at most"),
    (("--attack", "badnets", "--retune", "few"), "--retune"),
    (("--attack", "badnets", "--clean-twin", "nowhere"), "--retune 5"),
    (("--attack", "badnets", "--retune", "2", "--clean-twin", "nowhere"), "nowhere"),
    (("--attack", "badnets", "--retune", "2", "--clean-twin", ""), "got ''"),
    (("--record", "nowhere"), "nowhere"),
    (("--record", "net.safetensors"), "net.safetensors"),
]


@pytest.mark.parametrize(
    ("options", "words"), EVALUATE, ids=[" ".join(row[0])[:40] for row in EVALUATE]
)
def test_evaluate(options, words, place, mmdefense, monkeypatch):
    monkeypatch.chdir(place.folder)
    one_line(mmdefense(*evaluation(place, *options)), words)
    assert place.files() == []


OTHERS = [
    ((), "Usage: "),
    (("purify",), "missing argument 'MODEL'"),
    (("purify", "m"), "missing option"),
    (("purifi",), "no such command 'purifi'"),
    (("scan", "nowhere"), "nowhere"),
    (("scan", ""), "''"),
    (("scan", "net.safetensors", "--seed", FAR), "seed must lie in"),
    (("scan", "net.safetensors", "--seed", "-1"), "seed must lie in"),
    (("scan", "net.safetensors", "--format", "xml"), "--format must be one of"),
    (("scan", "net.safetensors", "--fail-on", "never"), "--fail-on must be one of"),
    (("report", "nowhere"), "nowhere"),
    (("report", "net.safetensors"), "net.safetensors"),
    (("report",), "missing argument"),
    (("report", "a", "b"), ""),
    (("list", "things"), "must be one of defenses"),
    (("list", "defenses", "nothing"), "unknown defense 'nothing'"),
    (("list", "data", "nothing"), "unknown name 'nothing'"),
    (("demo", "-o", "out", "--seed", FAR), "seed must lie in"),
    (("demo", "-o", "out", "--task", "nothing"), "nothing"),
    (("demo", "-o", "net.safetensors"), "net.safetensors"),
    (("demo",), "missing option"),
    (("grid", "run", "-o", "out", "--seeds", "0"), "--seeds"),
    (("grid", "run", "-o", "out", "--case", "nothing"), "nothing"),
    (("grid", "run", "-o", "out", "--case", "digits-clean", "--defense", "nothing"), "nothing"),
    (("grid", "run", "-o", "out", "--views", "nothing"), "--views must be one of"),
]


@pytest.mark.parametrize(("arguments", "words"), OTHERS, ids=[" ".join(r[0])[:40] for r in OTHERS])
def test_other_commands(arguments, words, place, mmdefense, monkeypatch):
    monkeypatch.chdir(place.folder)
    outcome = mmdefense(*arguments)
    if not arguments:
        assert outcome.code == 2
        assert words in outcome.err
        return
    one_line(outcome, words)
    assert place.files() == []


def test_an_option_that_is_not_utf8(place, mmdefense, monkeypatch):
    monkeypatch.chdir(place.folder)
    one_line(mmdefense(*place.purify("--defense", os.fsdecode(b"\xff\x1b[2J"))), r"\udcff\x1b[2J")
    assert place.files() == []


def test_labels_of_the_data_beyond_the_model(place, mmdefense):
    images, labels = small_images(3)
    write_images(place.data, images, labels + 999_000)
    one_line(mmdefense(*place.purify()), "labels must lie in 0..2")
    assert place.files() == []


ABSURD = [0, -1, 2**64, 2**31, -(2**63), float("nan"), float("inf"), -float("inf"), 1e300, "", ()]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("defenses", "attacks") for name in registry.names(kind)],
)
def test_every_setting_is_taken_or_refused(kind, name):
    known = registry.load(kind, name)
    make = (
        partial(configured, name)
        if kind == "defenses"
        else lambda given: known(**checked_settings(known, given))
    )
    for entry in fields_of(known):
        for value in ABSURD:
            with suppress(BadInputError):
                make({entry.name: value})
