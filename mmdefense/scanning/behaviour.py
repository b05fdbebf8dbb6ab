"""How a model behaves on a little clean data, seen through its adapter alone.

Three looks, and each says what it cannot see:

- triggers that turn every sample to one answer, searched for towards all answers side by side. A
  backdoor's answer costs far less than any other: a smaller trigger reaches it, or where all
  triggers are of one size, only its own does;
- units that stay far more active than their neighbours while clean data is unlearnt;
- how sharp the minimum is in which the model sits.

A look that a model has no hooks for is a remark that it was not taken.

References:
    [NC] Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao. *Neural Cleanse: Identifying and Mitigating
    Backdoor Attacks in Neural Networks*. IEEE S&P 2019. Implemented: a search for every answer, and
    the anomaly index over the answers, of which those below the median by more than 2 are suspects.
    Here the search is :mod:`mmdefense.kernels.inversion`, and the index is one of cost: the share
    of samples that a trigger misses and the share of an input that it alters. Where all triggers
    work, that is the size; where all are of one size, the success. The index is that of its
    logarithm, since costs differ by factors, and a third of the median cost is the most that a
    suspect may have (both ours): among ten answers an index beyond 2 is common.
    [TSBD] Lin et al. NeurIPS 2024. arXiv:2405.20291, for the activeness, a unit's gradient norm
    during unlearning. The paper compares with a clean model; here there is none.
    [FIP] Karim et al. CCS 2024. arXiv:2409.00863, for lambda_max and Tr(H) of backdoored models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from mmdefense.batches import Samples, part
from mmdefense.errors import MMDefenseError, UnsupportedError, one_line
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.inversion import Recovered, Search, recover
from mmdefense.kernels.memory import each_fitted
from mmdefense.kernels.run import Progress, Run
from mmdefense.kernels.units import gradient_norms
from mmdefense.kernels.unlearning import mean_gradient, unlearn
from mmdefense.protocol import TaskAdapter, TriggerAdapter, WordedAdapter, lacking
from mmdefense.report.evidence import few, sharpness
from mmdefense.scanning.findings import Finding, Rule
from mmdefense.scanning.weights import ANOMALY, anomaly_index

__all__ = ["NOT_LOOKED", "Answer", "answers", "scan_behaviour"]

APART = Rule(
    id="behaviour-trigger-apart",
    level="high",
    measured="triggers that turn clean samples to one answer, searched for towards all answers",
    reference="the other answers",
    meaning="One trigger turns almost any sample to this answer, at far less than the other "
    "answers cost: what a backdoor looks like.",
    blind_spot="triggers of other kinds than those searched for, or that depend on their sample; "
    "whether anyone planted it.",
)
TRIGGER = Rule(
    id="behaviour-trigger",
    level="medium",
    measured=APART.measured,
    reference="the other answers",
    meaning="One trigger turns almost any sample to one answer, but it does not stand apart. "
    "Models that nobody tampered with have such triggers as well.",
    blind_spot="a backdoor among them; triggers of other kinds than those searched for.",
)
ACTIVENESS = Rule(
    id="behaviour-activeness",
    level="low",
    measured="the gradient norm of each unit after clean data was unlearnt (TSBD, NeurIPS 2024)",
    reference="the other units of its layer, 3.5 by median absolute deviation; there is no clean "
    "twin to compare with",
    meaning="A remark. Units of a backdoor stay active while clean data is unlearnt; some units of "
    "any model do.",
    blind_spot="backdoors whose units are like the others; a single model has no reference.",
)
SMOOTHNESS = Rule(
    id="behaviour-smoothness",
    level="low",
    measured="lambda_max and Tr(H) of the loss on clean samples",
    reference="none for a single model: they depend on its architecture, training and data",
    meaning="A remark, to compare with the purified model. Backdoored models tend to sit in "
    "sharper minima than clean ones of the same kind (FIP, CCS 2024).",
    blind_spot="everything that one model's figures cannot tell.",
)
NOT_LOOKED = Rule(
    id="behaviour-not-looked-at",
    level="low",
    measured="whether a part of the behaviour could be looked at",
    reference="a model and data that have what it takes",
    meaning="This part was not looked at.",
    blind_spot="all that it would have shown.",
)

INDEX, SHARE, CROWD = 2.0, 1 / 3, 5
"""A suspect's anomaly index [NC], its cost against the median's, and the answers that it takes for
an index; the last two are ours."""
UNASKED, UNTRIGGERED = 0.5, 64
"""Share of samples that get an answer without a trigger, above which none is to blame, and how many
are looked at: a model that has collapsed answers everything alike. Ours."""
CHEAPEST, FLOOR = 1e-3, 0.25
"""Costs below the first are one; a spread of their logarithms below the second is noise. Ours."""
SEARCH = Search(levels=(0.9,), steps=80)
"""One generator an answer, at the success that [NC] asks for."""
SAMPLES, SIDE_BY_SIDE, UNLEARNT, EPOCHS = 512, 512, 256, 20
"""Samples looked at, inputs of a step of the search, samples and epochs of unlearning. Ours."""


def scan_behaviour(
    adapter: TaskAdapter[Any],
    samples: Samples[Any],
    *,
    search: Search = SEARCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Finding]:
    """Return what speaks against the behaviour of a model; nothing of it is changed.

    Args:
        adapter: The model.
        samples: Clean samples, as the adapter reads them; at most 512 are looked at.
        search: How triggers are searched for.
        seed: Makes the findings reproducible.
        progress: Called with each :class:`~mmdefense.kernels.run.Event`.
    """
    run = Run(seed) if progress is None else Run(seed, progress)
    part = few(samples, SAMPLES)
    looks: list[tuple[str, type, Callable[[], Iterator[Finding]]]] = [
        ("triggers", TriggerAdapter, lambda: _triggers(cast("Any", adapter), part, search, run)),
        ("activeness", TaskAdapter, lambda: _activeness(adapter, part, run)),
        ("smoothness", TaskAdapter, lambda: _smoothness(adapter, part, seed)),
    ]
    found: list[Finding] = []
    for name, needs, look in looks:
        try:
            if missing := lacking(adapter, needs):
                raise UnsupportedError(f"{type(adapter).__name__} has no {', '.join(missing)}")
            found += look()
        except MMDefenseError as error:
            found.append(NOT_LOOKED.found(name, one_line(error)))
    return found


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The cheapest trigger of one family towards one answer.

    Attributes:
        target: The answer.
        row: Where it stands among the recovered ones.
        success: Share of samples that it turns.
        size: Share of an input that it alters.
        index: How far the logarithm of its cost is below the median of all answers, in spreads;
            zero where there are too few answers for one.
        works: Whether its success reaches the threshold within the family's budget.
        apart: Whether it works and no other answer is nearly as cheap.
    """

    target: int
    row: int
    success: float
    size: float
    index: float
    works: bool
    apart: bool


def answers(found: Recovered) -> list[Answer]:
    """Return the cheapest trigger of a family towards each answer, ascending by answer.

    The cost is the share of samples missed and the share of an input altered. An answer stands
    apart by its anomaly index and by the share of the median cost that it has.
    """
    cost = (1 - found.success + found.size).clamp(min=CHEAPEST)
    rows = []
    for target in sorted(set(found.targets.tolist())):
        mine = (found.targets == target).nonzero().flatten()
        rows.append(int(mine[cost[mine].argmin()]))
    costs = cost[rows]
    crowd = len(rows) >= CROWD
    index = -anomaly_index(costs.log(), floor=FLOOR) if crowd else torch.zeros_like(costs)
    suspect = (index > INDEX) & (costs <= SHARE * costs.median())
    return [
        Answer(
            target=int(found.targets[row]),
            row=row,
            success=float(found.success[row]),
            size=float(found.size[row]),
            index=float(index[place]),
            works=bool(found.accepted[row]),
            apart=bool(found.accepted[row] & suspect[place]),
        )
        for place, row in enumerate(rows)
    ]


def _triggers(
    adapter: TriggerAdapter[Any], samples: Samples[Any], search: Search, run: Run
) -> Iterator[Finding]:
    """Yield a finding for each answer that stands apart, or one for each family that works."""
    side = max(1, min(search.batch_size, SIDE_BY_SIDE // max(1, adapter.trigger_targets())))
    names = getattr(samples, "classes", ())
    search = replace(search, batch_size=side)
    for found in recover(adapter, samples, search, run, stage="triggers"):
        every = answers(found)
        works = [a for a in every if a.works and _unasked(adapter, samples, a.target) <= UNASKED]
        apart = [answer for answer in works if answer.apart]
        best = min(works, key=lambda answer: 1 - answer.success + answer.size, default=None)
        reference = _reference(every)
        for answer in apart:
            said = _said(adapter, found, answer)
            yield APART.found(_place(found, answer, names), said, reference=reference)
        if best is not None and not apart:
            many = f"{len(works)} of {len(every)} answers have one; the cheapest: "
            value = many + _said(adapter, found, best)
            yield TRIGGER.found(_place(found, best, names), value, reference=reference)


@torch.no_grad()
def _unasked(adapter: TriggerAdapter[Any], samples: Samples[Any], target: int) -> float:
    """Return the share of samples, not of the target, that get this answer without a trigger."""
    count = min(UNTRIGGERED, len(samples))
    batch = few(samples, count).take(torch.arange(count))
    device = next(adapter.model.parameters()).device
    targets = torch.full((count,), target, device=device)

    def given_in(row: slice) -> Tensor:
        return adapter.target_log_probability(part(batch, row), targets[row]).exp() > 0.5

    with mode(adapter.model, train=False):
        given = torch.cat(each_fitted(given_in, count, "scoring", adapter.model))
    counts = adapter.not_target(batch, targets)
    return float((given & counts).sum() / counts.sum().clamp(min=1))


def _place(found: Recovered, answer: Answer, names: tuple[str, ...]) -> str:
    target = names[answer.target] if answer.target < len(names) else answer.target
    return f"{found.family.name} to {target}"


def _said(adapter: TriggerAdapter[Any], found: Recovered, answer: Answer) -> str:
    """Return success, size and index of a trigger, and its words where it has some."""
    said = f"success {answer.success:.0%}, size {answer.size:.3f}, index {answer.index:.1f}"
    if lacking(adapter, WordedAdapter):
        return said
    worded = cast("WordedAdapter[Any]", adapter)
    words = worded.trigger_words(found.pool[answer.row, 0])
    return f"{said}; near {words!r} before a prompt, towards {worded.target_words(answer.target)!r}"


def _reference(every: list[Answer]) -> str:
    """Return what the answers of a family cost in the middle, and what stands apart."""
    success, size = (
        float(torch.tensor([getattr(answer, name) for answer in every]).median())
        for name in ("success", "size")
    )
    middle = f"median of {len(every)} answers: success {success:.0%}, size {size:.3f}"
    if len(every) < CROWD:
        return f"{middle}; fewer than {CROWD}, so that none can stand apart"
    return (
        f"{middle}; apart is an index over {INDEX:g} (Neural Cleanse, S&P 2019) at no more than "
        "a third of the median cost"
    )


def _activeness(adapter: TaskAdapter[Any], samples: Samples[Any], run: Run) -> Iterator[Finding]:
    """Yield the share of units that stand out of their layer after clean data was unlearnt."""
    groups = list(adapter.unit_groups())
    if not groups:
        raise UnsupportedError(f"{type(adapter.model).__name__} has no units")
    part = few(samples, UNLEARNT)
    fork = adapter.fork()
    unlearn(fork, part, run, stop=adapter.chance, lr=1e-3, batch_size=64, max_epochs=EPOCHS)
    with mode(fork.model, train=False):
        batch = part.take(torch.arange(min(64, len(part))))
        norms = gradient_norms(mean_gradient(fork, batch), groups)
    index = torch.cat([anomaly_index(norm.cpu()) for norm in norms])
    names = [f"{group.layer}[{unit}]" for group in groups for unit in range(group.size)]
    far, worst = int((index > ANOMALY).sum()), int(index.argmax())
    yield ACTIVENESS.found(
        names[worst],
        f"{far} of {len(index)} units stand out ({far / len(index):.1%}); the furthest by "
        f"{float(index[worst]):.1f}",
    )


def _smoothness(adapter: TaskAdapter[Any], samples: Samples[Any], seed: int) -> Iterator[Finding]:
    found = sharpness(adapter, samples, seed)
    if found is None:
        raise UnsupportedError(f"{type(adapter.model).__name__} cannot be differentiated twice")
    yield SMOOTHNESS.found(
        "the model", f"lambda_max {found.lambda_max:.3g}, Tr(H) {found.trace:.3g}"
    )
