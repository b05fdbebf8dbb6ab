"""One defense at several settings: what each leaves of ACC and ASR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmdefense.data.batch import Samples, split
from mmdefense.defenses.base import Defense, Purifying
from mmdefense.metrics.backdoor import Rates, TriggeredSamples, measure
from mmdefense.plots.base import Plot
from mmdefense.plots.settings_compared import SettingsCompared
from mmdefense.protocol import TaskAdapter
from mmdefense.runtime.run import Run

__all__ = ["Compared", "settings_compared"]


@dataclass(frozen=True)
class Compared:
    """The rates that a defense leaves at several settings.

    Attributes:
        before: Of the given model.
        after: By the name of the setting.
        plots: What the defense shows at each, by the name of the setting.
    """

    before: Rates
    after: Mapping[str, Rates]
    plots: Mapping[str, tuple[Plot, ...]]

    def plot(self) -> SettingsCompared:
        """Return the plot, the given model first."""
        rates = {"before": self.before, **self.after}
        return SettingsCompared(
            list(rates),
            [100 * (rate.acc or 0.0) for rate in rates.values()],
            [100 * (rate.asr or 0.0) for rate in rates.values()],
        )


def settings_compared(
    adapter: TaskAdapter[Any],
    clean: Samples[Any],
    test: Samples[Any],
    triggered: TriggeredSamples[Any],
    defenses: Mapping[str, Defense],
    seed: int = 0,
) -> Compared:
    """Purify a copy of a model by one defense at each of several settings, and measure it.

    What the defense computes once for all its learning rates, such as TSBD's unlearning and
    BAERASER's search for triggers, is computed once for all settings; so these must not differ in
    what it depends on.

    Args:
        adapter: The given model; it is left as it is.
        clean: What the defense is given.
        test: Clean test samples.
        triggered: Triggered test samples.
        defenses: The defense by the name of its setting.
        seed: Of the split of the clean samples and of the runs.
    """
    run = Run(seed)
    after: dict[str, Rates] = {}
    plots: dict[str, tuple[Plot, ...]] = {}
    for name, defense in defenses.items():
        fit, holdout = split(clean, defense.holdout, seed)
        work = Purifying(adapter.fork(), fit, holdout, run.milder(name))
        defense.attempt(work)
        after[name] = measure(work.adapter, test, triggered)
        plots[name] = tuple(work.plots)
    return Compared(measure(adapter, test, triggered), after, plots)
