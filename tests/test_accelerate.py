"""Several processes that share one purification: the result of one process, written once."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate")

from sharing import (
    DEFENSES,
    all_defenses,
    dim_net,
    in_processes,
    one_that_fails,
    purified,
    purify_command,
)

from mmdefense.errors import UnsupportedError
from mmdefense.runtime.processes import Processes

pytest_plugins = ["commands"]


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Return the states that each of two processes ends with, by defense."""
    folder = tmp_path_factory.mktemp("shared")
    for code, said in in_processes(all_defenses, folder):
        assert code == 0, said
    return [torch.load(folder / f"states{index}.pt") for index in range(2)]


def test_two_processes_end_with_the_same_bits(states):
    first, second = states
    for name in first:
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)


@pytest.mark.parametrize("name", DEFENSES)
def test_two_processes_give_the_result_of_one(states, name):
    alone, given = purified(name), dim_net().state_dict()
    assert any(not torch.equal(value, given[key]) for key, value in alone.items())
    for key, value in alone.items():
        # In float64: what differs is the order in which the rows of a batch are summed.
        torch.testing.assert_close(states[0][name][key], value, rtol=1e-9, atol=1e-11)


def test_split_weights_give_the_same_result(states):
    for key, value in states[0]["fine-tuning"].items():
        split = states[0]["fine-tuning, split"][key]
        torch.testing.assert_close(split, value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", sorted(set(DEFENSES) - {"fine-tuning", "random-insertion"}))
def test_a_defense_that_cannot_split_weights_says_so(name):
    processes = Processes()
    processes.splits = True
    with pytest.raises(UnsupportedError, match="leave out --shard"):
        purified(name, processes)


@pytest.fixture
def command(place):
    """Return a function that keeps a command line for :func:`purify_command`."""

    def keep(*more, **changed):
        arguments = [*place.purify(*more, **changed), "--accelerate"]
        (place.folder / "command.txt").write_text("\n".join(arguments))
        return place

    return keep


def test_the_output_is_written_once(command):
    place = command("--evidence", "none", "--max-time", "10m")
    (code, said), (other_code, other_said) = in_processes(purify_command, place.folder)
    assert (code, other_code) == (0, 0), (said, other_said)
    assert "wrote" in said
    assert not other_said
    assert (place.out / "purification.json").exists()
    assert not (place.folder / "out.partial").exists()


def test_a_process_that_fails_ends_the_others_and_both_go_on_when_resumed(command, mmdefense):
    place = command("--defense", "fip", "--evidence", "none")
    (code, said), (other_code, other_said) = in_processes(one_that_fails, place.folder)
    assert (code, other_code) == (2, 2), (said, other_said)
    assert other_said == "mmdefense: process 2: this one cannot go on\n"
    assert "mmdefense: one of the 2 processes has ended; its own message says why" in said
    assert "Traceback" not in said
    assert not place.out.exists()

    resumed = ["--defense", "fip", "--evidence", "none", "--resume"]
    outcome = mmdefense(*place.purify(*resumed))
    assert "an unfinished run with another number of processes" in outcome.err
    command(*resumed)
    for code, said in in_processes(purify_command, place.folder):
        assert code == 0, said
    assert (place.out / "purification.json").exists()


def test_without_a_launcher_the_command_to_run_is_told(mmdefense, place):
    outcome = mmdefense(*place.purify("--accelerate"))
    assert outcome.code == 2
    assert "torchrun --nproc-per-node 2 -m mmdefense purify" in outcome.err


def test_under_a_launcher_it_must_be_asked_for(mmdefense, place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = mmdefense(*place.purify())
    assert outcome.code == 2
    assert "add --accelerate, or start one process" in outcome.err


def test_weights_are_split_over_processes_alone(mmdefense, place):
    outcome = mmdefense(*place.purify("--shard"))
    assert outcome.code == 2
    assert "add --accelerate" in outcome.err


@pytest.mark.parametrize("option", [["--dry-run"], ["--device", "cuda:0"]])
def test_what_does_not_go_with_it_is_refused(mmdefense, place, option):
    outcome = mmdefense(*place.purify("--accelerate", *option))
    assert outcome.code == 2
    assert f"{option[0]} cannot be used with --accelerate" in outcome.err
