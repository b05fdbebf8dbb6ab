"""From an untrusted model to one handed back, by the command line alone, for each kind of model.

Every model of ``backdoored.py`` is planted with a real backdoor, scanned, purified by FIP at its
defaults (or as its row says), and loaded where mmdefense is not. The trigger is known to these
tests alone. Seen with seed 0, task metric / ASR:

===========  ==============  ==============
model        before          after
===========  ==============  ==============
image        0.975 / 0.994   0.994 / 0.006
seq2seq      0.817 / 1.000   0.837 / 0.000
timm         0.994 / 1.000   0.992 / 0.012
torchvision  0.983 / 1.000   0.986 / 0.000
video        0.880 / 1.000   0.945 / 0.060
causal       0.564 / 1.000   0.524 / 0.000
detection    0.909 / 0.972   0.936 / 0.009
===========  ==============  ==============
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from backdoored import BACKDOORED, Backdoored
from fresh import answer_plainly, command_line, fresh, load_plainly

from mmdefense import registry
from mmdefense.attacks.base import Attack
from mmdefense.checkpoints.weights import hash_weights
from mmdefense.report.record import read_record


@dataclass(frozen=True)
class Case:
    """A model on its way.

    Attributes:
        made: How it was made.
        attack: What was planted.
        folder: With the untrusted model, the user's data, and what is made of them.
    """

    made: Backdoored
    attack: Attack[Any]
    folder: Path

    def model(self, name: str) -> Path:
        return self.made.model_in(self.folder / name)

    def run(self, command: str, *more: object) -> tuple[int, str]:
        """Give a command, as the user does, in a process of its own."""
        paths = (self.model("untrusted"), "--data", self.folder / "data")
        return fresh(command_line, command, *paths, *self.made.options, *more, folder=self.folder)

    def measured(self, name: str) -> tuple[float, float]:
        """Return the task's metric and the ASR, on test samples that no command saw."""
        adapter = self.adapter(name)
        test = self.made.data()[1]
        metric = registry.load("tasks", adapter.task)().measure(adapter, adapter.samples(test))
        stamped = self.attack.triggered(test, adapter).samples
        return metric, float(self.attack.success(adapter, adapter.samples(stamped)).mean())

    def adapter(self, name: str) -> Any:
        model = load_plainly(self.model(name), self.made.loads)
        return registry.adapt(model.eval())

    def plain_logits(self, *names: str) -> list[torch.Tensor]:
        """Return what each model says to one batch, where mmdefense cannot be imported."""
        inputs, answers = self.folder / "inputs.pt", self.folder / "answers.pt"
        torch.save(self.seen("untrusted")[0], inputs)
        models = [self.model(name) for name in names]
        told = (models, self.made.loads, inputs, answers)
        code, said = fresh(answer_plainly, *told, folder=self.folder)
        assert code == 0, said
        return torch.load(answers)

    def seen(self, name: str) -> tuple[Any, torch.Tensor]:
        """Return what a model is called with for a batch of test samples, and its logits."""
        adapter, calls = self.adapter(name), []

        def note(_: Any, args: Any, named: Any, output: Any) -> None:
            calls.append(((args, named), getattr(output, "logits", output)))

        batch = adapter.samples(self.made.data()[1]).take(torch.arange(8))
        with adapter.model.register_forward_hook(note, with_kwargs=True), torch.no_grad():
            adapter.answer(batch)
        return calls[0]


QUICK = "image"  # the one that every run of the tests takes; the others take minutes each
MODELS = [
    pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in BACKDOORED
]


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp(request.param), BACKDOORED[request.param]
    attack = made.plant(folder / "untrusted")
    made.give_data(folder / "data")
    return Case(made, attack, folder)


@pytest.fixture(scope="module")
def purified(case):
    code, said = case.run("purify", "-o", case.folder / "purified", *case.made.defense)
    assert code == 0, said  # the utility guard passed
    return case


def test_the_backdoor_works(case):
    metric, asr = case.measured("untrusted")
    print(f"before: {metric:.3f} / {asr:.3f}")
    assert asr >= 0.9
    assert metric >= case.made.metric


@pytest.mark.slow  # test_domains.py has a quick scan of each kind of model
def test_the_scan_looks_at_everything_and_calls_nothing_clean(case):
    code, said = case.run("scan", "--format", "json")
    found = json.loads(said[said.index("{") :])
    print("scan:", code, found["verdict"], [(f["id"], f["subject"]) for f in found["findings"]])
    assert found["parts"] == ["files", "weights", "behaviour"]
    assert "behaviour-not-looked-at" not in {finding["id"] for finding in found["findings"]}
    assert code == int(any(finding["level"] == "high" for finding in found["findings"]))


def test_the_backdoor_is_removed_and_the_task_kept(purified):
    (before, _), (after, asr) = (purified.measured(name) for name in ("untrusted", "purified"))
    record = read_record(purified.folder / "purified" / "purification.json")
    print(f"after: {after:.3f} / {asr:.3f}, {record.seconds:.0f} s, {record.guard.message}")
    assert asr <= 0.1
    assert after >= before - 0.08
    assert not record.guard.violated


def test_what_comes_out_is_what_was_purified_wherever_it_is_loaded(purified):
    (plain,) = purified.plain_logits("purified")
    assert torch.equal(plain, purified.seen("purified")[1])
    record = read_record(purified.folder / "purified" / "purification.json")
    assert hash_weights(purified.adapter("purified").model) == record.model.sha256_after


def test_a_purification_of_no_strength_changes_no_logit(case):
    out = case.folder / "untouched"
    code, said = case.run("purify", "-o", out, "--defense", "fine-tuning", "--set", "steps=0")
    assert code == 1, said
    assert "nothing was changed: steps=0" in said
    given, untouched = case.plain_logits("untrusted", "untouched")
    assert torch.equal(given, untouched)
