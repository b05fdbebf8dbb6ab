"""What evidence is measured in which time, by a clock that the models move."""

from __future__ import annotations

import pytest
import torch
from clocks import Clock
from commands import Net, small_images

from mmdefense.analysis import gather as module
from mmdefense.analysis.gather import gather
from mmdefense.registry import adapt
from mmdefense.runtime.deadline import Deadline

ONE = 0.01
"""Seconds that the loss of a sample takes; its gradients and their own take nothing."""


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def measure(clock, monkeypatch):
    """Return a function that gathers evidence of a small net, where a loss takes its time."""
    monkeypatch.setattr(module, "map_seconds", lambda count, slow: count * ONE * slow)

    def run(level="fast", seconds=1e6, left=float("inf"), cost=ONE, **more):
        adapters = []
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                adapters.append(adapt(Net()))
            adapters[-1].per_sample_loss = timed(adapters[-1].per_sample_loss, cost)
        samples, _ = (adapter.samples(small_images(128)) for adapter in adapters)
        deadline = Deadline(clock.now + left, clock)
        return gather(*adapters, samples, level, seconds=seconds, deadline=deadline, **more)

    def timed(loss, cost):
        def slow(batch):
            clock.now += cost * len(batch)
            return loss(batch)

        return slow

    return run


def test_with_time_all_of_it_is_measured(measure):
    found = measure()
    assert found.skipped == ()
    assert found.curvature.parts == ("trace", "lambda_max", "spectrum")
    assert found.curvature.samples == 128
    assert [plot.title for plot in found.plots()] == ["Loss smoothness", "Penultimate layer"]
    assert [layer.layer for layer in found.layers] == ["conv", "head"]


# A product on 32 samples takes 0.32 s, so that 16 of them with both models take 10.24 s; a fifth
# more is kept. The map takes 2.56 s.
@pytest.mark.parametrize(
    ("budget", "parts", "samples", "left_out"),
    [
        (60, ("trace", "lambda_max", "spectrum"), 128, []),
        (30, ("trace", "lambda_max", "spectrum"), 64, []),
        (12, ("trace", "lambda_max"), 32, ["the spectrum of the Hessian"]),
        (2.5, ("trace",), 32, ["the largest eigenvalue", "the map of the penultimate layer"]),
        (0.5, None, 0, ["the largest eigenvalue", "the trace", "the map of the penultimate"]),
        (0, None, 0, ["the change of each layer", "the map", "the curvature"]),
    ],
)
def test_what_does_not_fit_is_left_out_and_said(measure, clock, budget, parts, samples, left_out):
    found = measure(seconds=budget / module.SHARE)
    if parts is None:
        assert found.curvature is None
    else:
        assert (found.curvature.parts, found.curvature.samples) == (parts, samples)
    assert len(found.skipped) == len(left_out)
    for words in left_out:
        assert any(words in sentence for sentence in found.skipped), found.skipped
    assert all("15% of the purification" in sentence for sentence in found.skipped)
    assert clock.now <= budget + ONE * 8  # and a few samples, to find out


def test_full_evidence_is_bound_by_the_deadline_alone(measure, clock):
    assert measure("full", seconds=0.0).skipped == ()
    clock.now = 0.0
    found = measure("full", seconds=0.0, left=12)
    assert found.curvature.parts == ("trace", "lambda_max")
    assert "before the time limit" in found.skipped[0]
    assert clock.now < 12


def test_a_deadline_that_comes_first_binds_fast_evidence_too(measure, clock):
    found = measure(seconds=1e6, left=0.5)
    assert found.curvature is None
    assert all("before the time limit" in sentence for sentence in found.skipped)
    assert clock.now < 0.6


def test_a_model_that_is_far_too_slow_is_told_by_one_gradient(measure, clock):
    found = measure(seconds=100.0, cost=3.0)
    assert found.curvature is None
    assert clock.now == 3.0


def test_what_turns_out_slower_than_it_seemed_is_cut_off(measure, clock):
    def slower(event):
        if event.stage == "evidence: curvature" and event.step == 3:
            clock.now += 1000

    found = measure(seconds=1000.0, progress=slower)
    assert found.curvature is None
    assert "time ran out in product 3 of 32" in found.skipped[0]


def test_no_evidence_runs_nothing(measure, clock):
    found = measure("none")
    assert found.plots() == []
    assert clock.now == 0


def test_its_steps_are_told(measure):
    heard = []
    measure(progress=heard.append)
    stages = {e.stage: (e.step, e.total) for e in heard}
    assert set(stages) == {
        f"evidence: {name}" for name in ("layers", "estimate", "map", "curvature")
    }
    assert all(step == total for step, total in stages.values())
