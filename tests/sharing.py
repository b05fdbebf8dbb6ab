"""Work that several processes do together, each a process of this machine."""

from __future__ import annotations

import os
import socket
import sys

import torch
from commands import fitted_net, small_images
from fresh import CONTEXT
from torch import nn

from mmdefense import registry
from mmdefense.data.labelled import LabelledSamples
from mmdefense.registry import adapt
from mmdefense.runtime.run import copy_state

SHORT = {"steps": 4, "batch_size": 7, "max_utility_drop": 1.0, "holdout": 0.3}
SEARCH = {"screening": 0, "search_steps": 10, "levels": (0.5,), "rounds": 1, "tau": 0.01}
UNLEARNING = {"unlearn_epochs": 2, "unlearn_lr": 0.01, "unlearn_batch_size": 8}
DEFENSES = {
    "fine-tuning": SHORT,
    "fine-pruning": SHORT | {"max_pruning_drop": 0.5},
    "fip": SHORT,
    "fast-fip": SHORT,
    "tsbd": SHORT | UNLEARNING,
    "baeraser": SHORT | SEARCH,
    "random-insertion": SHORT,
    "ft-sam": SHORT,
    "nad": SHORT | {"teacher_steps": 3},
    "distillation": SHORT,
    "nft": SHORT,
    "fst": SHORT,
    "i-bau": SHORT | {"ascents": 2, "iterations": 2},
    "sau": SHORT | {"ascents": 2},
    "neural-cleanse": SHORT | {"search_steps": 3, "tau": 0.01, "anomaly": -100.0},
    "awm": SHORT,
}


_DIM = 0.3
"""What images are multiplied by, so that a trigger outshines them, and a search finds one."""


def dim_net():
    """Return a net in float64 that is right about dim images."""
    net = fitted_net().double()
    with torch.no_grad():
        net.conv.weight /= _DIM
    return net


def purified(name, processes=None, net=None):
    """Return the state of a small model in float64 after a short purification."""
    images, labels = small_images()
    images = images.double() / 255 * _DIM
    adapter = adapt(net or dim_net(), example=images[:1])
    defense = registry.load("defenses", name)(**DEFENSES[name])
    result = defense.purify(adapter, LabelledSamples(images, labels), processes=processes)
    return copy_state(result.model)


def normalised_net():
    """Return a net with BatchNorm and Dropout, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv, head = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(36, 3)
        return nn.Sequential(
            conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), head
        ).double()


def in_processes(target, folder, count=2):
    """Call ``target(folder)`` in processes that find each other; return exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        CONTEXT.Process(target=_started, args=(target, folder, rank, count, port))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return [(code, (folder / f"said{n}.txt").read_text()) for n, code in enumerate(codes)]


def _started(target, folder, rank, count, port):
    with (folder / f"said{rank}.txt").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", 1) for stream in (1, 2))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    target(folder)


def all_defenses(folder):
    """Purify by each defense that trains, and keep the states that this process ends with."""
    from mmdefense.runtime.processes import joined

    with joined() as (processes, _):
        found = {name: purified(name, processes) for name in DEFENSES}
        processes.splits = True
        found["fine-tuning, split"] = purified("fine-tuning", processes)
        processes.splits = False
        for name in ("fine-tuning", "fip"):
            found[f"{name}, BatchNorm"] = purified(name, processes, normalised_net())
    torch.save(found, folder / f"states{processes.index}.pt")


def purify_command(folder):
    """Run the command line that the test has left beside."""
    from mmdefense.cli.app import main

    sys.argv = ["mmdefense", *(folder / "command.txt").read_text().split("\n")]
    main()


def one_that_fails(folder):
    """Purify, where the second process ends after its first update with an error."""
    from mmdefense.errors import BadInputError
    from mmdefense.kernels import loop

    if os.environ["RANK"] == "1":
        genuine = loop._TrainingState.after

        def after(course, done, *, last):
            if done == 2:
                raise BadInputError("this one cannot go on")
            genuine(course, done, last=last)

        loop._TrainingState.after = after
    purify_command(folder)
