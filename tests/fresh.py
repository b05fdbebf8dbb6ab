"""Processes of their own for what a user does, and for one who has never heard of mmdefense.

They are forked from a server that has imported PyTorch and Transformers and nothing else, for to
start these takes longer than all that the tests do with them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers", "transformers.modeling_utils"])


def fresh(target: Callable[..., None], *arguments: object, folder: Path) -> tuple[int, str]:
    """Call a function of this module in a process of its own; return exit code and what it said."""
    said = folder / "said.txt"
    process = CONTEXT.Process(target=_described, args=(target, arguments, said))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, said.read_text()


def _described(target: Callable[..., None], arguments: tuple[object, ...], said: Path) -> None:
    assert "mmdefense" not in sys.modules
    with said.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(stream), "w", 1) for stream in (1, 2))
    target(*arguments)


def command_line(*arguments: object) -> None:
    """Do what ``python -m mmdefense`` does."""
    sys.argv = ["mmdefense", *map(str, arguments)]
    runpy.run_module("mmdefense", run_name="__main__", alter_sys=True)


def answer_plainly(models: list[Path], loads: str, inputs: Path, answers: Path) -> None:
    """Write the logits of each model where mmdefense cannot be imported."""
    import torch

    for name in ("mmdefense", "mmdefense_adapters", "mmdefense_tasks"):
        sys.modules[name] = None  # type: ignore[assignment]  # an import of it now fails
    args, named = torch.load(inputs)
    with torch.no_grad():
        outputs = [load_plainly(model, loads).eval()(*args, **named) for model in models]
    torch.save([getattr(output, "logits", output) for output in outputs], answers)


def load_plainly(model: Path, loads: str) -> Any:
    """Load a model as one does without mmdefense.

    Args:
        model: A folder of Transformers, or a file with a state dict.
        loads: The name of an ``AutoModelFor...``, or ``module:call`` that builds a module.
    """
    module, _, call = loads.rpartition(":")
    if not module:
        import transformers

        return getattr(transformers, call).from_pretrained(model)
    from safetensors.torch import load_file

    made = eval(call, vars(importlib.import_module(module)))
    made.load_state_dict(load_file(model))
    return made
