"""Scan how a model behaves on a little clean data, only through its adapter.

Three parts, and each says what it cannot see:

- triggers that send every sample to one target, searched for over all targets in parallel. A
  backdoor's target costs far less than any other: a smaller trigger reaches it, or, if all triggers
  have the same size, no other target is reached;
- units that stay far more active than their neighbours while clean data is unlearnt;
- how sharp the model's minimum is, and the spectrum of its curvature.

A part that the model's adapter does not support is reported as not run.

References:
    [NC] Wang et al. *Neural Cleanse*. IEEE S&P 2019. Implemented: a search for every trigger
    (:mod:`mmdefense.kernels.inversion`), and the anomaly index over the targets
    (:mod:`mmdefense.kernels.outliers`).
    [TSBD] Lin et al. NeurIPS 2024. arXiv:2405.20291, for the activeness, a unit's gradient norm
    during unlearning. The paper compares with a clean model; here there is none.
    [FIP] Karim et al. CCS 2024. arXiv:2409.00863, for lambda_max and Tr(H) of backdoored models.
    [GKX] Ghorbani, Krishnan, Xiao. ICML 2019. arXiv:1901.10159, for the spectrum of the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mmdefense.analysis.evidence import measured_sharpness
from mmdefense.data.batch import Samples, few
from mmdefense.errors import MMDefenseError, UnsupportedError, one_line
from mmdefense.findings import Finding, Level, Rule
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.inversion import Recovered, Search, recover
from mmdefense.kernels.outliers import (
    CROWD,
    MANY,
    TargetTrigger,
    anomaly_index,
    cheapest_triggers,
    index_bound,
)
from mmdefense.kernels.units import gradient_norms
from mmdefense.kernels.unlearning import mean_gradient, unlearn
from mmdefense.protocol import TaskAdapter, TriggerAdapter, WordedAdapter, missing_members
from mmdefense.report.images import data_address
from mmdefense.runtime.memory import each_fitted
from mmdefense.runtime.run import Progress, Run
from mmdefense.scanning.weights import ANOMALY

__all__ = ["NOT_LOOKED", "scan_behaviour"]

OUTLIER = Rule(
    id="behaviour-trigger-outlier",
    level="high",
    measured="triggers that send clean samples to one target, from a search over all targets",
    reference="the other targets",
    meaning="One trigger sends almost any sample to this target, at a far lower cost than for "
    "the other targets: what a backdoor looks like.",
    blind_spot="triggers of kinds that were not searched for, or that depend on their sample; "
    "whether anyone planted it.",
)
TRIGGER = Rule(
    id="behaviour-trigger",
    level="medium",
    measured=OUTLIER.measured,
    reference="the other targets",
    meaning="One trigger sends almost any sample to one target, so whoever knows it controls "
    "what the model says. This does not show that it was planted: by the criteria for an "
    "outlier it is not one among the triggers for the other targets, and models that "
    "nobody tampered with can have such triggers too. Compare its picture and its size "
    "with those of a clean model of the same kind.",
    blind_spot="whether anyone planted it; triggers of kinds that were not searched for.",
)
COMMON = Rule(
    id="behaviour-trigger-common",
    level="info",
    measured=OUTLIER.measured,
    reference="the other targets",
    meaning="One trigger sends almost any sample to one target, but triggers of this kind are no "
    "evidence: models that nobody tampered with have them too.",
    blind_spot="a backdoor among them; triggers of kinds that were not searched for.",
)
NONE = Rule(
    id="behaviour-trigger-none",
    level="info",
    measured=OUTLIER.measured,
    reference="the other targets",
    meaning="This search found no trigger that works. That is not proof that there is none.",
    blind_spot="triggers of kinds that were not searched for, or that depend on their sample; "
    "triggers that the search missed.",
)
ACTIVENESS = Rule(
    id="behaviour-activeness",
    level="info",
    measured="the gradient norm of each unit after clean data was unlearnt (TSBD, NeurIPS 2024)",
    reference="the other units of its layer, threshold 3.5 by median absolute deviation; there is "
    "no clean twin to compare with",
    meaning="For comparison only. A backdoor's units stay active while clean data is unlearnt; "
    "so do some units of any model.",
    blind_spot="backdoors whose units look like the others; a single model has no reference.",
)
SMOOTHNESS = Rule(
    id="behaviour-smoothness",
    level="info",
    measured="lambda_max, Tr(H) and the spectrum of the Hessian of the loss on at most 128 clean "
    "samples, by stochastic Lanczos quadrature (Ghorbani et al., ICML 2019)",
    reference="none for a single model: they depend on its architecture, training and data",
    meaning="For comparison with the purified model. Backdoored models tend to sit in sharper "
    "minima than clean ones of the same kind (FIP, CCS 2024).",
    blind_spot="whether there is a backdoor: clean models have sharp directions as well; what lies "
    "between the quadrature nodes; the loss away from these weights and samples.",
)
NOT_LOOKED = Rule(
    id="behaviour-not-looked-at",
    level="info",
    measured="whether a part of the behaviour scan could run",
    reference="a model and data that meet its requirements",
    meaning="This part did not run.",
    blind_spot="everything it would have shown.",
)

COLLAPSED, UNTRIGGERED = 0.5, 64
"""Share of samples that are predicted as the target without a trigger, above which a trigger is not
to blame (a collapsed model predicts one class for everything), and the number of samples used. Our
choice."""
SUSPECTS, OTHERS = 8, 24
"""Where targets are screened: the number of cheapest ones per kind of trigger that are then
searched in full, and of random others to compare with. Our choice."""
SEARCH = Search(levels=(0.9,), steps=80)
"""One generator per target, at the success rate of [NC]."""
SCREEN = replace(SEARCH, steps=16, batch_size=2, judged=16)
"""The screening: 48 inputs per target instead of 900 in the full search. Our choice."""
PROBES, TRACE_ERROR = 3, 0.05
"""Start vectors of the Lanczos quadrature, 48 Hessian-vector products; and the standard error of
Tr(H) as a share of it, which takes 8 to 64 more. Our choice."""
PICTURED = 12
"""Triggers of a family that are shown, the cheapest first. Our choice."""
SAMPLES, SIDE_BY_SIDE, UNLEARNT, EPOCHS = 512, 512, 256, 20
"""Samples used, inputs per search step, samples and epochs of unlearning. Our choice."""


def scan_behaviour(
    adapter: TaskAdapter[Any],
    samples: Samples[Any],
    *,
    search: Search = SEARCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Finding]:
    """Return the findings on a model's behaviour; the model is not changed.

    Args:
        adapter: The model.
        samples: Clean samples, as the adapter reads them; at most 512 are used.
        search: How triggers are searched for.
        seed: Random seed; the same seed gives the same findings.
        progress: Called with each :class:`~mmdefense.runtime.run.Event`.
    """
    run = Run(seed) if progress is None else Run(seed, progress)
    some = few(samples, SAMPLES)
    parts: list[tuple[str, type, Callable[[], Iterator[Finding]]]] = [
        ("triggers", TriggerAdapter, lambda: _triggers(cast("Any", adapter), some, search, run)),
        ("activeness", TaskAdapter, lambda: _activeness(adapter, some, run)),
        ("smoothness", TaskAdapter, lambda: _smoothness(adapter, some, seed)),
    ]
    found: list[Finding] = []
    for name, needs, scan in parts:
        try:
            if missing := missing_members(adapter, needs):
                raise UnsupportedError(f"{type(adapter).__name__} has no {', '.join(missing)}")
            found += scan()
        except MMDefenseError as error:
            # The other two only give numbers; a search that could not run matters more.
            level: Level = "low" if name == "triggers" else "info"
            found.append(NOT_LOOKED.found(name, one_line(error), level=level))
    return found


def _parts(total: int) -> list[Tensor]:
    """Return all targets in chunks that are screened in parallel."""
    return [torch.arange(n, min(n + MANY, total)) for n in range(0, total, MANY)]


def _chosen(
    adapter: TriggerAdapter[Any], samples: Samples[Any], search: Search, run: Run
) -> Tensor | None:
    """Return the targets to search in full, or None for all if they are not many.

    Otherwise each is screened, and the cheapest of each family and some random others are chosen.
    """
    total = adapter.trigger_targets()
    if total <= MANY:
        return None
    screen = replace(SCREEN, steps=min(SCREEN.steps, search.steps))
    chosen = torch.randperm(total, generator=run.generator("triggers/others"))[:OTHERS]
    parts = [
        recover(adapter, samples, screen, run, stage=f"triggers/{n}", pool=1, targets=targets)
        for n, targets in enumerate(_parts(total))
    ]
    for found in zip(*parts, strict=True):
        cost = torch.cat([1 - part.success + part.size for part in found])
        chosen = torch.cat([chosen, cost.topk(SUSPECTS, largest=False).indices])
    return torch.tensor(sorted(set(chosen.tolist())))


def _triggers(
    adapter: TriggerAdapter[Any], samples: Samples[Any], search: Search, run: Run
) -> Iterator[Finding]:
    """Yield a finding for each outlier among the targets, or else one for each family.

    In a family whose triggers are no evidence, no target is an outlier.
    """
    total, chosen = adapter.trigger_targets(), _chosen(adapter, samples, search, run)
    count = total if chosen is None else len(chosen)
    side = max(1, min(search.batch_size, SIDE_BY_SIDE // max(1, count)))
    names = getattr(samples, "classes", ())
    search = replace(search, batch_size=side)
    for found in recover(adapter, samples, search, run, stage="triggers", targets=chosen):
        every = cheapest_triggers(found, total)
        works = [
            a for a in every if a.works and _untriggered(adapter, samples, a.target) <= COLLAPSED
        ]
        outliers = [trigger for trigger in works if trigger.is_outlier and found.family.diagnostic]
        works.sort(key=lambda trigger: 1 - trigger.success + trigger.size)
        best = works[0] if works else None
        reference = _reference(every, total)
        for trigger in outliers:
            text, place = _described(adapter, found, trigger), _place(found, trigger, names)
            pictures = _pictures(adapter, found, [trigger], names)
            yield OUTLIER.found(place, text, reference=reference, pictures=pictures)
        if best is not None and not outliers:
            many = f"{len(works)} of {len(every)} targets have one; the cheapest: "
            value = many + _described(adapter, found, best)
            rule = TRIGGER if found.family.diagnostic else COMMON
            place, pictures = _place(found, best, names), _pictures(adapter, found, works, names)
            yield rule.found(place, value, reference=reference, pictures=pictures)
        if best is None:
            yield NONE.found(found.family.name, f"none of {_searched(every, total)}")


@torch.no_grad()
def _untriggered(adapter: TriggerAdapter[Any], samples: Samples[Any], target: int) -> float:
    """Return the share of non-target samples that are predicted as the target without a trigger."""
    count = min(UNTRIGGERED, len(samples))
    batch = few(samples, count).take(torch.arange(count))
    device = next(adapter.model.parameters()).device
    targets = torch.full((count,), target, device=device)

    def predicted_in(row: slice) -> Tensor:
        return adapter.target_log_probability(batch.rows(row), targets[row]).exp() > 0.5

    with mode(adapter.model, train=False):
        predicted = torch.cat(each_fitted(predicted_in, count, "scoring", adapter.model))
    counts = adapter.not_target(batch, targets)
    return float((predicted & counts).sum() / counts.sum().clamp(min=1))


def _place(found: Recovered, trigger: TargetTrigger, names: tuple[str, ...]) -> str:
    target = names[trigger.target] if trigger.target < len(names) else trigger.target
    return f"{found.family.name} to {target}"


def _pictures(
    adapter: TriggerAdapter[Any],
    found: Recovered,
    triggers: list[TargetTrigger],
    names: tuple[str, ...],
) -> dict[str, str]:
    """Return pictures of the first triggers by caption; none of words, which are shown as text."""
    if not missing_members(adapter, WordedAdapter):
        return {}
    pictures = {}
    for trigger in triggers[:PICTURED]:
        place = _place(found, trigger, names)
        caption = f"{place}: success {trigger.success:.0%}, size {trigger.size:.3f}"
        image = adapter.trigger_picture(found.family, found.pool[trigger.row, 0])
        pictures[caption] = data_address(image)
    return pictures


def _described(adapter: TriggerAdapter[Any], found: Recovered, trigger: TargetTrigger) -> str:
    """Return success, size and index of a trigger, and its words if it has any."""
    text = f"success {trigger.success:.0%}, size {trigger.size:.3f}, index {trigger.index:.1f}"
    if missing_members(adapter, WordedAdapter):
        return text
    worded = cast("WordedAdapter[Any]", adapter)
    words = worded.trigger_words(found.pool[trigger.row, 0])
    return f"{text}; near {words!r} before a prompt, target {worded.target_words(trigger.target)!r}"


def _searched(every: list[TargetTrigger], total: int) -> str:
    """Return how many targets were searched, and how."""
    if len(every) == total:
        return f"{total} targets, all searched"
    return f"{len(every)} targets searched in full, of {total} screened"


def _reference(every: list[TargetTrigger], total: int) -> str:
    """Return the median cost of a family's targets, and when a target is an outlier."""
    success, size = (
        float(torch.tensor([getattr(trigger, name) for trigger in every]).median())
        for name in ("success", "size")
    )
    middle = f"median of {_searched(every, total)}: success {success:.0%}, size {size:.3f}"
    if len(every) < CROWD:
        return f"{middle}; fewer than {CROWD} targets, too few to find an outlier"
    return (
        f"{middle}; an outlier has an index above {index_bound(total):.2g} (Neural Cleanse, S&P "
        "2019) and at most a third of the median cost"
    )


def _activeness(adapter: TaskAdapter[Any], samples: Samples[Any], run: Run) -> Iterator[Finding]:
    """Yield the share of units that are outliers in their layer after unlearning clean data."""
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
        f"{far} of {len(index)} units are outliers ({far / len(index):.1%}); the furthest by "
        f"{float(index[worst]):.1f}",
    )


def _smoothness(adapter: TaskAdapter[Any], samples: Samples[Any], seed: int) -> Iterator[Finding]:
    """Yield lambda_max, the trace and the spectrum; see :func:`measured_sharpness` for the cost."""
    found = measured_sharpness(adapter, samples, seed, probes=PROBES, trace_error=TRACE_ERROR)
    spectrum = found.spectrum
    size = sum(p.numel() for p in adapter.model.parameters() if p.requires_grad)
    spread = size * spectrum.moment(1) ** 2 / max(spectrum.moment(2), 1e-30)
    mass = float((spectrum.weights * spectrum.nodes.abs()).sum())
    below = float((spectrum.weights * (-spectrum.nodes).clamp(min=0)).sum()) / max(mass, 1e-30)
    numbers = {
        "lambda_max": found.lambda_max,
        "trace": found.trace,
        "trace_error": found.spread,
        "directions": spread,
        "negative_share": below,
        "nodes": spectrum.nodes.tolist(),
        "weights": spectrum.weights.tolist(),
    }
    value = (
        f"lambda_max {found.lambda_max:.3g}, Tr(H) {found.trace:.3g} (standard error "
        f"{found.spread:.2g}); participation ratio {spread:.3g} of {size} directions; "
        f"{below:.1%} of the curvature is negative"
    )
    yield SMOOTHNESS.found("the model", value, numbers=numbers)
