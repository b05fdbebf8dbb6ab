"""Measure the kernels against plain versions of the same work, side by side in one run.

    python recipes/bench.py -o out/bench    # what `make bench` does: minutes on two cores
    python recipes/bench.py --smoke         # does it run at all: seconds

What it shows: for each row of `bench.md` and `bench.json` the ratio of two times, measured in turn
(A B A B ...), as the median over the repetitions and the least and the greatest of them; the aim;
and whether both sides computed the same.

Measured: see "Speed" in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdefense.data.batch import Samples, split
from mmdefense.data.labelled import LabelledSamples
from mmdefense.defenses.base import viewed
from mmdefense.defenses.fip import FIP, FastFIP
from mmdefense.defenses.tsbd import TSBD
from mmdefense.evaluation.cases import named_cases
from mmdefense.evaluation.peak import peak_growth
from mmdefense.evaluation.victims import Victim, train_victim
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.loop import mean_score, train
from mmdefense.kernels.pruning_curve import head_activations, pruning_curve
from mmdefense.kernels.units import (
    parameters_by_name,
    prune,
    rank,
    select_sub_weights,
    weight_change,
    zero,
)
from mmdefense.runtime.run import Event, Run
from mmdefense_adapters.torch_classifier import TorchClassifier
from mmdefense_tasks.image_classification import load_digits
from mmdefense_tasks.victims import PreActResNet18, SmallResNet


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How large everything is.

    Attributes:
        device: Where it runs.
        repeats: Repetitions of each row.
        wide: Filters of the first stage of the PreActResNet18 that is pruned and ranked.
        narrow: The same of the nets that are trained.
        nets: The nets that are trained.
        weighed: Net and defense whose peak memory is measured.
        images: Images that a pruning curve is measured on.
        batch: Samples per update.
        steps: Updates of one run; the clock starts at the first sign of progress, after 20.
        victim_steps: Updates that plant the backdoor.
        budgets: Updates that FIP and Fast FIP are tried with, ascending.
        flags: The arguments that lead to this setting.
    """

    device: torch.device
    repeats: int = 5
    wide: int = 64
    narrow: int = 16
    nets: tuple[str, ...] = ("SmallResNet", "PreActResNet18")
    weighed: tuple[str, str] | None = ("PreActResNet18", "FIP")
    images: int = 128
    batch: int = 64
    steps: int = 60
    victim_steps: int = 300
    budgets: tuple[int, ...] = (20, 40, 60, 80, 100, 150, 200, 250)
    flags: tuple[str, ...] = ()


SMOKE: dict[str, Any] = {
    "repeats": 1,
    "wide": 4,
    "narrow": 4,
    "nets": ("SmallResNet",),
    "weighed": None,
    "images": 32,
    "batch": 8,
    "steps": 40,
    "victim_steps": 10,
    "budgets": (5,),
    "flags": ("--smoke",),
}
"""The settings of a run of seconds."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio.

    Attributes:
        what: The work, and what it is set against.
        model: The net.
        aim: What the median should reach: ``">= 25"`` or ``"<= 2.1"``.
        ratios: One a repetition; none where a side never reached its goal.
        check: How equal the results were.
        memory: Peak memory beside that of the other side, where it was measured.
    """

    what: str
    model: str
    aim: str
    ratios: list[float]
    check: str
    memory: str = ""

    def cells(self) -> list[str]:
        """Return the cells of its line in the table."""
        measured, verdict = "never", "no"
        if self.ratios:
            median = statistics.median(self.ratios)
            measured = f"{median:.2f} ({min(self.ratios):.2f} to {max(self.ratios):.2f})"
            sign, bound = self.aim.split()
            verdict = "yes" if (median >= float(bound)) == (sign == ">=") else "no"
        return [self.what, self.model, measured, self.aim, verdict, self.check, self.memory]


# %% Clocks


def synchronised(device: torch.device) -> float:
    """Return the time in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call."""
    begin = synchronised(device)
    work()
    return synchronised(device) - begin


def ratios(slow: Callable[[], float], fast: Callable[[], float], repeats: int) -> list[float]:
    """Return slow over fast, one a repetition; the two alternate."""
    return [slow() / fast() for _ in range(repeats)]


class StepClock:
    """Times the updates of a stage by its signs of progress, each of which waits for the device."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.marks: list[tuple[int, float]] = []

    def __call__(self, event: Event) -> None:
        """Note the time of a sign of progress."""
        if event.stage == self.stage:
            self.marks.append((event.step, time.perf_counter()))

    @property
    def seconds(self) -> float:
        """Seconds per update, the first of them left out."""
        (first, begin), (last, end) = self.marks[0], self.marks[-1]
        return (end - begin) / (last - first)


# %% The pruning curve against evaluating the net at each step


def fresh(net: Callable[..., nn.Module], width: int, setting: Setting) -> TorchClassifier:
    """Return a net for the digits with random weights, the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net(classes=10, channels=1, width=width).to(setting.device)
    return TorchClassifier(model, example=load_digits()[1].inputs[:1])


def pruning_row(setting: Setting) -> Row:
    """Prune the features of a PreActResNet18 in 20 steps, most dormant first."""
    adapter = fresh(PreActResNet18, setting.wide, setting)
    samples = adapter.samples(load_digits()[1].subset(torch.arange(setting.images)))
    fit_head(adapter, samples)
    order = [unit for _, unit in rank([head_activations(adapter, samples)], descending=False)]
    counts = [len(order) * step // 20 for step in range(20)]
    fork, group = adapter.fork(), [adapter.head_group()]

    def at_once() -> Tensor:
        return pruning_curve(adapter, samples, order, counts)

    def again_and_again() -> Tensor:
        fork.model.load_state_dict(adapter.model.state_dict())
        curve = []
        for start, stop in pairwise([0, *counts]):
            prune(fork.model, group, [(0, unit) for unit in order[start:stop]])
            curve.append(mean_score(fork, samples))
        return torch.tensor(curve, dtype=torch.float64)

    found, expected = at_once(), again_and_again()
    return Row(
        what="the net evaluated at each of 20 steps / the pruning curve from one pass",
        model=f"PreActResNet18, width {setting.wide}, {setting.images} images of 16x16",
        aim=">= 25",
        ratios=ratios(
            lambda: timed(again_and_again, setting.device),
            lambda: timed(at_once, setting.device),
            setting.repeats,
        ),
        check=f"equal at {int((found - expected < 1e-6).sum())} of 20 points",
    )


def fit_head(adapter: TorchClassifier, samples: Samples[Any]) -> None:
    """Fit the output layer by least squares, so that the curve starts near 1 and falls."""
    everything = samples.take(torch.arange(len(samples)))
    with mode(adapter.model, train=False):
        features = adapter.embedding(everything).double()
    weight, _ = adapter.head_weights()
    wanted = torch.eye(len(weight), device=weight.device, dtype=torch.float64)[everything.labels]
    with torch.no_grad():
        weight.copy_((torch.linalg.pinv(features) @ wanted).T)


# %% TSBD's ranking and reinitialisation against lists of floats


def ranking_row(setting: Setting) -> Row:
    """Zero 70 % of the weights of the 15 % of units that changed most, by tensors and by lists."""
    adapter = fresh(PreActResNet18, setting.wide, setting)
    groups, given = list(adapter.unit_groups()), parameters_by_name(adapter.model)
    noise = torch.Generator(setting.device).manual_seed(0)
    change = {
        name: torch.rand(value.shape, generator=noise, device=setting.device) * value.abs()
        for name, value in given.items()
    }
    weights = dict(adapter.model.named_parameters())

    def restored() -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(weights.values()), list(given.values()))

    def by_tensors() -> float:
        restored()
        return timed(lambda: reinitialise(adapter.model, change, groups), setting.device)

    def by_lists() -> float:
        restored()
        return timed(lambda: reinitialise_by_lists(weights, change, groups), setting.device)

    by_tensors()
    found = parameters_by_name(adapter.model)
    by_lists()
    same = all(torch.equal(found[name], value) for name, value in weights.items())
    zeros = sum(int((value == 0).sum()) for value in found.values())
    return Row(
        what="TSBD's ranking and reinitialisation by lists of floats / by tensors",
        model=f"PreActResNet18, width {setting.wide}",
        aim=">= 50",
        ratios=ratios(by_lists, by_tensors, setting.repeats),
        check=f"{'bit-identical' if same else 'DIFFERENT'}, {zeros} weights zeroed",
    )


RATIO, SUB_RATIO = 0.15, 0.7


def reinitialise(model: nn.Module, change: dict[str, Tensor], groups: Sequence[Any]) -> None:
    """Zero weights in place, as TSBD does."""
    order = rank(weight_change(change, groups), descending=True)
    chosen = order[: int(RATIO * len(order))]
    zero(model, select_sub_weights(change, groups, chosen, SUB_RATIO))


def reinitialise_by_lists(
    weights: dict[str, nn.Parameter], change: dict[str, Tensor], groups: Sequence[Any]
) -> None:
    """Do the same in plain Python, for nets whose units are the rows of one weight each."""
    names = [next(iter(group.axes)) for group in groups]
    rows = [change[name].flatten(1).tolist() for name in names]
    scored = [(sum(row), -g, -u) for g, unit in enumerate(rows) for u, row in enumerate(unit)]
    scored.sort(reverse=True)
    chosen = [(-g, -u) for _, g, u in scored[: int(RATIO * len(scored))]]
    pool = sorted((value for g, u in chosen for value in rows[g][u]), reverse=True)
    threshold = pool[int(SUB_RATIO * len(pool)) - 1]
    for g, u in chosen:
        weight = weights[names[g]].data[u]
        kept = [
            0.0 if moved >= threshold else value
            for moved, value in zip(rows[g][u], weight.flatten().tolist(), strict=True)
        ]
        weight.copy_(torch.tensor(kept).view_as(weight))


# %% One step of a defense against a step of plain fine-tuning


IDLE_STEPS = 10
"""Updates of an equality check; many more would turn rounding into differences in earnest."""


@dataclass(frozen=True)
class Step:
    """A defense whose steps are timed, all of it, in its own loop.

    Attributes:
        defense: As it is timed.
        idle: The same with its terms computed and given no weight.
        stage: The name of its training stage.
        aim: Steps of plain fine-tuning that one of its steps may cost.
    """

    defense: FIP | TSBD
    idle: FIP | TSBD
    stage: str
    aim: str


def steps_of(setting: Setting) -> dict[str, Step]:
    """Return what is timed, by name; without utility guard, for the nets are untrained."""
    common: Any = {"steps": setting.steps, "batch_size": setting.batch, "lr": 0.01, "restarts": 0}
    tsbd = TSBD(ratio=0.0, unlearn_epochs=1, max_utility_drop=1.0, **common)
    each = FIP(trace="true", fade=0.0, max_utility_drop=1.0, **common)
    fifth = replace(each, trace_every=5)
    idle: Any = {"eta_f": 1e-12, "eta_r": 0.0, "steps": IDLE_STEPS}
    return {
        "activeness-aware step": Step(
            tsbd, replace(tsbd, mix=0.0, steps=IDLE_STEPS), "fine-tune", "<= 2.1"
        ),
        "FIP step, Tr(F) in each": Step(each, replace(each, **idle), "purify", "<= 3.2"),
        "FIP step, Tr(F) in every 5th": Step(fifth, replace(fifth, **idle), "purify", "<= 1.5"),
    }


def purify(
    defense: FIP | TSBD, stage: str, adapter: TorchClassifier, clean: LabelledSamples
) -> tuple[nn.Module, StepClock]:
    """Return the net after the defense, and the clock of its updates."""
    clock = StepClock(stage)
    return defense.purify(adapter, clean, progress=clock).model, clock


def fine_tune(
    defense: FIP | TSBD, stage: str, adapter: TorchClassifier, clean: LabelledSamples
) -> tuple[nn.Module, StepClock]:
    """Train plainly on what the defense trains on: same samples, batches, views and rates."""
    clock, fork = StepClock(stage), adapter.fork()
    fit = split(adapter.samples(clean), defense.holdout, defense.seed)[0]
    fit = viewed(fork, fit, defense.views)
    train(fork, fit, defense.training(fork), Run(defense.seed, clock), stage=stage)
    return fork.model, clock


def net_and_clean(name: str, setting: Setting) -> tuple[TorchClassifier, LabelledSamples]:
    """Return what the steps are timed on."""
    net = SmallResNet if name == "SmallResNet" else PreActResNet18
    adapter = fresh(net, setting.narrow, setting)
    return adapter, load_digits()[0].subset(torch.arange(4 * setting.batch))


def step_rows(net: str, setting: Setting) -> Iterator[Row]:
    """Yield a row for each defense."""
    data = net_and_clean(net, setting)
    for name, step in steps_of(setting).items():
        far = distance(
            purify(step.idle, step.stage, *data)[0], fine_tune(step.idle, step.stage, *data)[0]
        )
        yield Row(
            what=f"{name} / step of plain fine-tuning",
            model=f"{net}, width {setting.narrow}, batch {setting.batch} of 16x16",
            aim=step.aim,
            ratios=[
                purify(step.defense, step.stage, *data)[1].seconds
                / fine_tune(step.defense, step.stage, *data)[1].seconds
                for _ in range(setting.repeats)
            ],
            check=f"{far:.0e} apart after {IDLE_STEPS} steps with its term at no weight",
            memory=memory_cell(name, setting) if (net, name[:3]) == setting.weighed else "",
        )


def distance(left: nn.Module, right: nn.Module) -> float:
    """Return ``||left - right|| / ||right||`` over all weights."""
    one, other = (nn.utils.parameters_to_vector(net.parameters()).detach() for net in (left, right))
    return float((one - other).norm() / other.norm())


# %% Peak memory


def memory_cell(name: str, setting: Setting) -> str:
    """Return by how much FIP and plain fine-tuning grow at their peaks, as one cell."""
    ask = fresh_growth if setting.device.type == "cpu" else growth
    own, plain = (ask(side, name, setting) / 2**20 for side in ("defense", "plain"))
    return f"{own:.0f} MiB against {plain:.0f}, {own / max(plain, 1):.1f} times"


def fresh_growth(side: str, name: str, setting: Setting) -> int:
    """Return :func:`growth` in a process that has done nothing else."""
    command = [sys.executable, __file__, *setting.flags, "--device", "cpu"]
    command += ["--memory-of", side, name]
    # Large pieces go back to the system when they are freed: a peak is then what was in use.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(command, check=True, capture_output=True, env=settings)
    return int(ran.stdout)


def growth(side: str, name: str, setting: Setting) -> int:
    """Return the bytes that a run adds at its peak, net and samples included."""
    run_side(side, name, replace(setting, **SMOKE))  # loads what is loaded at first use
    return peak_growth(lambda: run_side(side, name, setting), setting.device)


def run_side(side: str, name: str, setting: Setting) -> None:
    """Run one side of a row of steps once."""
    step = steps_of(setting)[name]
    run = purify if side == "defense" else fine_tune
    run(step.defense, step.stage, *net_and_clean(setting.nets[-1], setting))


# %% Time until the backdoor is gone: Fast FIP against FIP


def time_row(setting: Setting) -> Row:
    """Time each with the fewest updates that reach ASR <= 5 % and ACC within 2 points.

    They are found by trying budgets on the test set: a judgement after the fact, no defense's own.
    """
    case = named_cases(["digits-badnets"])[0]
    training = replace(case.training, steps=setting.victim_steps)
    victim = train_victim(replace(case, training=training), Run(0))
    victim.adapter.model.to(setting.device)
    budgets = {kind: first_success(kind, victim, setting.budgets) for kind in (FIP, FastFIP)}

    def seconds(kind: type[FIP | FastFIP]) -> float:
        return kind(steps=budgets[kind][0] or 0).purify(victim.adapter, victim.clean).seconds

    reached = all(steps for steps, _ in budgets.values())
    return Row(
        what="FIP / Fast FIP, seconds to ASR <= 5 % and ACC within 2 points",
        model=f"SmallResNet, {case.name}, seed 0",
        aim=">= 3",
        ratios=ratios(lambda: seconds(FIP), lambda: seconds(FastFIP), setting.repeats)
        if reached
        else [],
        check="; ".join(f"{kind.__name__} {said}" for kind, (_, said) in budgets.items()),
    )


def first_success(
    kind: type[FIP | FastFIP], victim: Victim, budgets: Sequence[int]
) -> tuple[int | None, str]:
    """Return the smallest budget of updates that is enough, if one is, and what it reaches."""
    said = ""
    for steps in budgets:
        rates = victim.after(kind(steps=steps).purify(victim.adapter, victim.clean).adapter)
        assert rates.acc is not None
        assert rates.asr is not None
        assert victim.before.acc is not None
        said = f"{steps} steps: ACC {rates.acc:.1%}, ASR {rates.asr:.1%}"
        if rates.asr <= 0.05 and rates.acc >= victim.before.acc - 0.02:
            return steps, said
    return None, f"never, {said}"


# %% The table


def machine(setting: Setting) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    cuda = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(setting.device) if cuda else "cpu",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repetitions": setting.repeats,
        "seed": 0,
    }


HEADINGS = ("ratio of", "net", "median (least to greatest)", "aim", "met", "check", "peak memory")


def write(rows: Sequence[Row], setting: Setting, folder: Path) -> str:
    """Write ``bench.json`` and ``bench.md``, and return the latter."""
    about = machine(setting)
    lines = [", ".join(f"{name} {value}" for name, value in about.items()) + ".", ""]
    table = [list(HEADINGS), ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    lines += [f"| {' | '.join(cells)} |" for cells in table]
    text = "\n".join(lines) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "rows": [asdict(row) for row in rows]}
    (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(text, encoding="utf-8")
    return text


def all_rows(setting: Setting) -> Iterator[Row]:
    """Yield one row after the other, as it is measured."""
    yield pruning_row(setting)
    yield ranking_row(setting)
    for net in setting.nets:
        yield from step_rows(net, setting)
    yield time_row(setting)


def main() -> None:
    """Measure all rows, and write them."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("out/bench"), help="the folder")
    parser.add_argument("--device", type=torch.device, default=torch.device(usual))
    parser.add_argument("--repeats", type=int, default=5, help="of each side of a row")
    parser.add_argument("--smoke", action="store_true", help="small: that it runs, no more")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(device=options.device, repeats=options.repeats)
    setting = replace(setting, **SMOKE) if options.smoke else setting
    if options.memory_of:
        side, name = options.memory_of
        print(growth(side, name, setting))
        return
    rows: list[Row] = []
    for row in all_rows(setting):
        rows.append(row)
        text = write(rows, setting, options.out)  # at once: a run that is cut off keeps its rows
    print(text)


if __name__ == "__main__":
    main()
