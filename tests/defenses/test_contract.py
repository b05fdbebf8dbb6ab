"""What holds for every registered defense, whatever the model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from condition import assert_same, condition
from limits import limited
from torch import nn

from mmdefense import registry
from mmdefense.checkpoints.runs import RunStore
from mmdefense.defenses.base import Result
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.protocol import TriggerAdapter, missing_members
from mmdefense.runtime.run import copy_state

IMAGES = ["small-resnet", "cnn-without-batchnorm", "hf-vit"]
OTHER_DOMAINS = ["fcos", "small-video-resnet", "pointnet", "llama"]
SHORT = {"steps": 3, "batch_size": 8}


@dataclass(frozen=True)
class Row:
    """How to try a defense.

    Attributes:
        quick: Settings with which it does something, soon.
        idle: Settings, beside those, with which it must do nothing.
        long: Settings, beside the quick ones, with which it is worth interrupting.
        idle_on: The models, of random weights, on which it rightly does nothing.
        draws: Whether it draws anything but the split, which may leave the result as it is.
        refused_on: The models whose adapters lack what it needs.
    """

    quick: Mapping[str, Any]
    idle: Mapping[str, Any]
    long: Mapping[str, Any] = field(default_factory=lambda: {"steps": 25})
    idle_on: tuple[str, ...] = ()
    draws: bool = True
    refused_on: tuple[str, ...] = ()


UNLEARNING = {"unlearn_epochs": 3, "unlearn_lr": 0.01, "unlearn_batch_size": 16}
SEARCH = {"screening": 0, "search_steps": 3, "levels": (0.5,), "rounds": 1, "tau": 0.01}
PRUNED = {"lr": 1.0, "threshold": 1.0, "max_share": 0.1}
RECOVERY = {"unlearn_epochs": 3, "epochs": 3, "batch_size": 8}
ROWS = {
    "anp": Row(SHORT | PRUNED, {"threshold": 0.0}),
    "auto": Row(
        SHORT | {"candidates": ("fine-tuning",), "fallback": ("fine-tuning",), "search_steps": 3},
        {"steps": 0},
    ),
    "awm": Row(SHORT, {"steps": 0}),
    "baeraser": Row(
        SHORT | SEARCH, {"steps": 0}, {"steps": 25, "stop": 0.0, "rounds": 2}, ("fcos", "llama")
    ),
    "clp": Row({"spread": 0.7, "holdout": 0.8}, {"spread": 1e6}, {}, draws=False),
    "fast-fip": Row(SHORT, {"steps": 0}),
    "fine-pruning": Row(
        SHORT | {"max_pruning_drop": 0.5, "points": 8}, {"max_share": 0.0, "steps": 0}
    ),
    "fine-tuning": Row(SHORT, {"steps": 0}),
    "random-insertion": Row(SHORT, {"steps": 0}),
    "fip": Row(SHORT, {"steps": 0}),
    "ft-sam": Row(SHORT, {"steps": 0}),
    "fst": Row(SHORT, {"steps": 0}),
    "i-bau": Row(SHORT | {"ascents": 2, "iterations": 2}, {"steps": 0}),
    "nad": Row(SHORT | {"teacher_steps": 3}, {"steps": 0}),
    "neural-cleanse": Row(
        SHORT | {"search_steps": 3, "tau": 0.01, "anomaly": -100.0},
        {"steps": 0},
        idle_on=("fcos", "llama"),
    ),
    "distillation": Row(SHORT, {"steps": 0}, refused_on=("fcos",)),
    "nft": Row(SHORT, {"steps": 0}),
    "pruning": Row(
        {"max_pruning_drop": 0.25, "holdout": 0.8, "points": 16}, {"max_share": 0.0}, {}
    ),
    "rnp": Row(PRUNED | RECOVERY, {"threshold": 0.0}, {"epochs": 12}),
    "sau": Row(SHORT | {"ascents": 2}, {"steps": 0}, refused_on=("fcos", "llama")),
    "tsbd": Row(SHORT | UNLEARNING, {"ratio": 0.0, "fine_tuning": "none"}),
}


def make(name, **settings):
    # No state is turned down, so that what is compared is what the defense itself has done.
    settings = {"max_utility_drop": 1.0} | dict(ROWS[name].quick) | settings
    return registry.load("defenses", name)(**settings)


def test_every_registered_defense_has_a_row():
    assert sorted(ROWS) == registry.names("defenses")


def prepare(model, taught):
    """Return an adapter whose model has odd modes and a frozen weight, and its clean data."""
    adapter, samples = taught(model)
    next(adapter.model.parameters()).requires_grad_(False)
    next(m for m in adapter.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))).train()
    return adapter, samples


@dataclass(frozen=True)
class Trial:
    """A purification, and what can be seen around it."""

    result: Result
    before: Any
    after: Any
    events: list[Any]
    kind: type[nn.Module]


@pytest.fixture(scope="module")
def trial(taught):
    """Return a function that purifies; each trial is made once for all tests."""

    @functools.cache
    def purify(name, model, seed=0):
        adapter, samples = prepare(model, taught)
        before, events = condition(adapter.model), []
        result = make(name, seed=seed).purify(adapter, samples, progress=events.append)
        return Trial(result, before, condition(adapter.model), events, type(adapter.model))

    return purify


def assert_equal(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def differ(first, second):
    return any(not torch.equal(value, second[name]) for name, value in first.items())


def over(models):
    """Try every defense on each model that it serves, all tests of a pair one after the other."""
    pairs = [(name, model) for name in ROWS for model in models]
    served = [(name, model) for name, model in pairs if model not in ROWS[name].refused_on]
    return pytest.mark.parametrize(("name", "model"), served, scope="module")


every_image, every_domain = over(IMAGES), over(IMAGES + OTHER_DOMAINS)


@every_domain
def test_the_given_model_stays_as_it_is_in_every_respect(trial, name, model):
    tried = trial(name, model)
    assert_same(tried.before, tried.after)


class AugmentedError(Exception):
    """Raised by the samples' own augmentation."""


def _raise(inputs, generator):
    raise AugmentedError


VIEWING = [name for name in ROWS if hasattr(registry.load("defenses", name), "views")]


@pytest.mark.parametrize("name", sorted(set(VIEWING) - {"random-insertion"}))
def test_samples_keep_an_augmentation_of_their_own_as_standard_views(name, taught):
    adapter, samples = taught(IMAGES[0])
    own = dataclasses.replace(samples, augmentation=_raise)
    with pytest.raises(AugmentedError):
        make(name).purify(adapter, own)
    for views in ("none", "insertions"):
        make(name, views=views).purify(adapter, own)


def test_random_insertion_is_fine_tuning_on_views_with_insertions(taught):
    adapter, samples = taught(IMAGES[0])
    states = [
        defense.purify(adapter, samples).model.state_dict()
        for defense in (
            make("random-insertion"),
            make("fine-tuning", views="insertions"),
            make("fine-tuning", views="standard"),
        )
    ]
    assert_equal(states[0], states[1])
    assert differ(states[0], states[2])


@every_domain
def test_the_model_handed_back_takes_the_place_of_the_given_one(trial, name, model):
    tried = trial(name, model)
    purified = condition(tried.result.model)
    assert sum(purified["hooks"]) == 0
    assert all(grad is None for grad in purified["grads"])
    for key in ("forms", "modes", "wanted"):
        assert purified[key] == tried.before[key], key
    changed = purified["values"] != tried.before["values"]
    assert changed == (model not in ROWS[name].idle_on)
    assert all(value.isfinite().all() for value in tried.result.model.state_dict().values())
    assert tried.result.adapter.model is tried.result.model
    assert type(tried.result.model) is tried.kind
    assert tried.result.guard.message


@every_image
def test_another_seed_gives_another_result(trial, name, model):
    first = trial(name, model).result
    # Where the seed makes the split alone, the same units may be chosen on another part.
    others = (trial(name, model, seed).result for seed in (1, 2, 3))
    assert not ROWS[name].draws or any(
        other.guard != first.guard or differ(copy_state(first.model), copy_state(other.model))
        for other in others
    )


@every_image
def test_strength_zero_is_the_identity(taught, name, model):
    adapter, samples = prepare(model, taught)
    given = copy_state(adapter.model)
    result = make(name, **ROWS[name].idle).purify(adapter, samples)
    assert_equal(given, copy_state(result.model))
    assert result.guard.state == "final"


@every_domain
def test_the_time_limit_is_kept(taught, name, model):
    """No time at all is what every clock agrees on: one update at most, and a verdict."""
    adapter, samples = prepare(model, taught)
    result = make(name, **ROWS[name].long).purify(adapter, samples, max_seconds=0)
    assert result.stopped
    assert result.guard.message


@every_image
def test_progress_goes_forward(trial, name, model):
    tried = trial(name, model)
    stages = [stage for stage, _ in itertools.groupby(event.stage for event in tried.events)]
    assert stages
    assert len(stages) == len(set(stages)), "a stage goes on after another has begun"
    for stage in stages:
        steps = [event.step for event in tried.events if event.stage == stage]
        assert steps == sorted(steps)
        totals = {event.total for event in tried.events if event.stage == stage}
        assert len(totals) == 1
        total = totals.pop()  # 0 where it is not known
        assert 0 <= steps[0] <= steps[-1] <= (total or steps[-1])
    heard = [
        {"stage": event.stage, "step": event.step, **event.values}
        for event in tried.events
        if event.values
    ]
    assert tried.result.history == heard


class Killed(BaseException):
    pass


def killer(moment):
    """Return a listener that ends the process, so to say, at the event of that number."""
    count = itertools.count(1)

    def listen(_):
        if next(count) == moment:
            raise Killed

    return listen


@pytest.mark.parametrize("name", ROWS)
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bits(taught, tmp_path, name):
    adapter, samples = prepare("small-resnet", taught)
    defense = make(name, **ROWS[name].long)
    events: list[Any] = []
    expected = defense.purify(adapter, samples, progress=events.append)
    store, chance = RunStore(tmp_path, every=1), random.Random(name)
    for _ in range(2):
        with contextlib.suppress(Killed):
            moment = chance.randint(1, len(events))
            defense.purify(adapter, samples, progress=killer(moment), store=store)
    assert_same_result(defense.purify(adapter, samples, store=store), expected)


@every_domain
def test_the_same_seed_gives_the_same_bits_even_after_a_kill(trial, taught, tmp_path, name, model):
    tried, store = trial(name, model), RunStore(tmp_path, every=1)
    adapter, samples = prepare(model, taught)
    moment = random.Random(f"{name}/{model}").randint(1, len(tried.events))
    with torch.random.fork_rng():
        torch.manual_seed(11)  # the global state has no part in it, and is left as it is
        state = torch.get_rng_state()
        with pytest.raises(Killed):
            make(name).purify(adapter, samples, progress=killer(moment), store=store)
        found = make(name).purify(adapter, samples, store=store)
        assert torch.equal(torch.get_rng_state(), state)
    assert_same_result(found, tried.result)


def assert_same_result(found, expected):
    assert_equal(copy_state(expected.model), copy_state(found.model))
    assert found.history == expected.history
    assert found.guard == expected.guard
    assert [type(plot) for plot in found.plots] == [type(plot) for plot in expected.plots]


@pytest.mark.parametrize("name", ROWS)
def test_an_adapter_without_a_needed_hook_is_refused_by_name(name):
    defense = make(name)
    members = missing_members(object(), defense.requires)
    assert members
    for absent in members:
        adapter = SimpleNamespace(**{member: None for member in members if member != absent})
        with pytest.raises(UnsupportedError, match=rf"SimpleNamespace lacks {absent}$"):
            defense.purify(adapter, None)


@pytest.mark.parametrize("name", ["pruning", "fine-pruning"])
def test_pruning_the_last_layer_needs_a_linear_one(taught, name):
    adapter, samples = taught("small-resnet")
    members = missing_members(object(), TriggerAdapter)
    without_head = SimpleNamespace(**{m: getattr(adapter, m) for m in members})
    without_head.fork = lambda: without_head
    with pytest.raises(UnsupportedError, match=r"needs a HeadAdapter; .* use layers='all'"):
        replace(make(name), layers="last").purify(without_head, samples)


@pytest.mark.parametrize("name", ROWS)
def test_weights_that_are_not_finite_are_refused(taught, name):
    adapter, samples = taught("cnn-without-batchnorm")
    with torch.no_grad():
        next(adapter.model.parameters()).view(-1)[3] = float("nan")
    with pytest.raises(BadInputError, match=r"'0.weight' .* must be finite, got NaN"):
        make(name).purify(adapter, samples)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    "wrong", [{"max_utility_drop": -0.1}, {"max_utility_drop": 2.0}, {"holdout": 0.0}]
)
def test_wrong_settings_are_refused(name, wrong):
    with pytest.raises(BadInputError, match=rf"{next(iter(wrong))} must lie in .* got"):
        make(name, **wrong)


@pytest.mark.parametrize("name", ROWS)
def test_the_record_holds_every_setting_and_prints_as_it_was_made(trial, name):
    result, defense = trial(name, "small-resnet").result, make(name)
    assert type(defense)(**result.settings) == defense
    assert result.settings.keys() == {f.name for f in dataclasses.fields(defense)}
    assert result.defense == type(defense).__name__
    assert result.data["samples"] == 40
    assert result.seconds > 0


@pytest.fixture
def in_float64(taught):
    """Return a net without BatchNorm in float64, and its clean data."""
    adapter, samples = taught("cnn-without-batchnorm")
    samples = replace(samples, inputs=samples.inputs.double())
    return registry.adapt(adapter.model.double(), example=samples.inputs[:1]), samples


@pytest.mark.parametrize("name", ROWS)
def test_too_little_memory_changes_nothing_but_rounding_and_is_said_once(in_float64, name):
    adapter, samples = in_float64
    wide = {"batch_size": 32} if "batch_size" in ROWS[name].quick else {}
    expected = make(name, **wide).purify(adapter, samples)
    asked, events = [], []
    limited(adapter, 30, asked)  # the search tries up to 30 generators on each sample
    found = make(name, **wide).purify(adapter, samples, progress=events.append)
    assert max(count for _, count in asked) > 30
    told = [event for event in events if event.note and event.stage == "memory"]
    assert len(told) == 1
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[key], value, rtol=1e-9, atol=1e-11)


def test_a_sample_that_is_too_large_is_one_line(taught):
    adapter, samples = taught("small-resnet")
    with pytest.raises(UnsupportedError, match="one sample at a time"):
        make("fip").purify(limited(adapter, 0), samples)


def test_want_of_memory_outside_of_batches_is_one_line(taught, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("out of memory\nmore")

    monkeypatch.setattr(torch.linalg, "svd", exhausted)
    adapter, samples = taught("small-resnet")
    with pytest.raises(UnsupportedError, match="smaller batches would not help") as caught:
        make("fast-fip").purify(adapter, samples)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROWS)
def test_a_model_in_half_precision_comes_back_in_it(taught, name, dtype):
    adapter, samples = taught("hf-resnet")
    adapter.model.to(dtype)
    adapter.model.get_submodule(adapter.head).float()  # types may be mixed
    before = condition(adapter.model)
    result = make(name).purify(adapter, samples)
    after = condition(result.model)
    assert after["forms"] == before["forms"]
    assert condition(adapter.model)["values"] == before["values"]
    wide = result.adapter.model.state_dict()
    for key, value in result.model.state_dict().items():  # nothing is lost that was judged
        assert torch.equal(value.double(), wide[key].double()), key
    assert after["values"] != before["values"]
