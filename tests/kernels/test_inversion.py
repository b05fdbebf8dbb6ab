"""The search for triggers, on a net whose backdoor is put there by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from commands import CLASSES, small_images
from torch import nn

from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.kernels import inversion
from mmdefense.kernels.inversion import Recovered, Search, recover, success_of
from mmdefense.protocol import TriggerFamily
from mmdefense.runtime.run import Run, copy_state
from mmdefense_adapters.torch_classifier import TorchClassifier

TARGET, PIXEL = 1, (6, 6)
SEARCH = Search(levels=(0.8,), steps=150, batch_size=8, hidden=32, noise=8, lr=0.05)


class Corners(nn.Module):
    """Answers with the bright quarter; and one pixel of the fourth, dark one forces ``TARGET``."""

    def __init__(self, strength=20.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, 8, 8))
        with torch.no_grad():
            for label in range(CLASSES):
                row, column = divmod(label, 2)
                self.weight[label, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 10 / 16
            self.weight[TARGET][PIXEL] = strength
        self.norm = nn.BatchNorm1d(1)  # in train mode it would mix the samples
        self.eval()

    def forward(self, images):
        logits = images.flatten(1) @ self.weight.flatten(1).T
        return self.norm(logits[:, None].mean(2)) * 0 + logits


@pytest.fixture(scope="module")
def corners():
    images, labels = small_images()
    images[:, 0, PIXEL[0], PIXEL[1]] = 0
    return LabelledSamples(images, labels)


def planted(strength=20.0):
    return TorchClassifier(Corners(strength), example=torch.zeros(1, 1, 8, 8))


@pytest.fixture
def adapter():
    return planted()


@pytest.fixture(scope="module")
def found(corners):
    adapter = planted()
    assert adapter.score(corners.everything()).all()
    return {record.family.name: record for record in recover(adapter, corners, SEARCH, Run())}


def test_the_planted_pixel_is_found_and_the_target_with_it(found):
    record = found["patch"]
    hit = record.targets == TARGET
    assert record.accepted[hit].all()
    assert record.success[hit].min() >= 0.9
    masks = record.pool[hit][0, :, 0]
    assert (masks[:, PIXEL[0], PIXEL[1]] > 0.5).all()
    assert masks.mean(0).argmax() == PIXEL[0] * 8 + PIXEL[1]
    assert record.size[hit].max() < 0.1


def test_no_other_class_is_taken_for_a_target(found):
    for record in found.values():
        assert not record.accepted[record.targets != TARGET].any()


def test_an_honest_model_has_no_target(corners):
    for record in recover(planted(strength=0.0), corners, SEARCH, Run()):
        assert not record.accepted.any(), record.family.name


def test_records_have_a_row_per_target_and_level(adapter, corners):
    search = dataclasses.replace(SEARCH, levels=(0.3, 0.9), steps=1)
    for record in recover(adapter, corners, search, Run(), pool=5):
        assert record.targets.tolist() == [0, 0, 1, 1, 2, 2]
        assert record.levels.tolist() == pytest.approx([0.3, 0.9] * 3)
        assert record.pool.shape == (6, 5, *record.family.shape)
        assert record.pool.min() >= 0
        assert record.pool.max() <= 1
        for tensor in (record.success, record.size, record.accepted):
            assert tensor.shape == (6,)


def test_success_and_size_are_those_of_the_pool_that_is_handed_on(adapter, corners, found):
    for name, record in found.items():
        for index, target in enumerate(record.targets.tolist()):
            again = success_of(adapter, corners, record.family, target, record.pool[index])
            assert again == pytest.approx(float(record.success[index]), abs=0.2), (name, target)
        expected = adapter.trigger_size(record.family, record.pool).mean(1)
        torch.testing.assert_close(record.size, expected)


@pytest.mark.parametrize(("threshold", "budget"), [(0.5, 1.0), (1.0, 1.0), (0.5, 0.0)])
def test_only_what_succeeds_within_its_budget_is_accepted(
    adapter, corners, monkeypatch, threshold, budget
):
    families = [dataclasses.replace(f, budget=budget) for f in adapter.trigger_families()]
    monkeypatch.setattr(adapter, "trigger_families", lambda: families)
    search = dataclasses.replace(SEARCH, steps=30, threshold=threshold)
    for record in recover(adapter, corners, search, Run()):
        expected = (record.success >= threshold) & (record.size <= budget)
        assert torch.equal(record.accepted, expected)


SCREENED = dataclasses.replace(SEARCH, screening=60)


def test_screening_finds_the_planted_target_and_searches_it_alone_in_full(adapter, corners):
    search = dataclasses.replace(SCREENED, levels=(0.7, 0.8, 0.9), steps=60)
    patch = recover(adapter, corners, search, Run())[0]
    others = [target for target in range(CLASSES) if target != TARGET]
    assert patch.targets.tolist() == [*others, TARGET, TARGET, TARGET]
    assert patch.levels.tolist() == pytest.approx([0.8] * len(others) + [0.7, 0.8, 0.9])
    assert patch.accepted.any()
    assert not patch.accepted[: len(others)].any()
    assert patch.pool.shape == (len(others) + 3, 16, *patch.family.shape)


def test_screening_takes_no_target_of_an_honest_model(corners):
    for record in recover(planted(strength=0.0), corners, SCREENED, Run()):
        assert not record.accepted.any(), record.family.name
        assert len(record.targets) >= CLASSES


def rows(targets, success, size, accepted=True):
    """Return a record of one level whose triggers are those of no search."""
    count = len(targets)
    return Recovered(
        family=TriggerFamily("patch", (1,), 1.0),
        targets=torch.tensor(targets),
        levels=torch.full((count,), 0.8),
        success=torch.tensor(success),
        size=torch.tensor(size),
        accepted=torch.full((count,), accepted),
        pool=torch.zeros(count, 1, 1),
    )


@pytest.mark.parametrize(
    ("success", "size", "suspects"),
    [
        ((1.0, 1.0, 1.0, 1.0), (0.02, 0.2, 0.2, 0.3), [0]),  # far smaller
        ((1.0, 1.0, 1.0, 1.0), (0.11, 0.2, 0.2, 0.3), []),  # not far enough
        ((0.0, 0.9, 0.1, 0.0), (0.1, 0.1, 0.1, 0.1), [1]),  # all of one size: success decides
        ((0.0, 0.1, 0.1, 0.0), (0.1, 0.1, 0.1, 0.1), []),
    ],
)
def test_suspects_cost_half_of_the_median_at_most(success, size, suspects):
    assert inversion._suspects(rows(range(4), success, size)).tolist() == suspects


def test_of_the_found_targets_those_with_the_smallest_triggers_are_accepted():
    screened = rows(range(4), (0.9, 0.2, 1.0, 1.0), (0.04, 0.5, 0.02, 0.05), accepted=False)
    full = rows([0, 0, 2, 3], (1.0,) * 4, (0.09, 0.039, 0.02, 0.041))
    joined = inversion._joined(screened, full)
    assert joined.targets.tolist() == [1, 0, 0, 2, 3]
    assert joined.accepted.tolist() == [False, True, True, True, True]
    (kept,) = inversion._smallest([joined])
    assert kept.accepted.tolist() == [False, True, True, True, False]
    alike = inversion._joined(screened, rows([0, 2, 3], (1.0,) * 3, (0.1,) * 3))
    assert inversion._smallest([alike])[0].accepted.tolist() == [False, True, True, True]
    assert not inversion._joined(full, None).accepted.any()


def test_a_trigger_counts_relative_to_the_budget_of_its_family():
    """A pattern of half of its budget is as small as a patch of half of its own."""
    patches = rows([0, 1], (1.0, 1.0), (0.05, 0.3))
    wide = dataclasses.replace(patches, family=TriggerFamily("additive", (1,), 10.0))
    patterns = dataclasses.replace(
        wide, targets=torch.tensor([0, 2]), size=torch.tensor([9.0, 0.9])
    )
    kept = inversion._smallest([patches, patterns])
    assert [record.accepted.tolist() for record in kept] == [[True, False], [True, True]]
    nothing = [
        dataclasses.replace(r, accepted=torch.zeros(2, dtype=torch.bool))
        for r in (patches, patterns)
    ]
    assert not any(record.accepted.any() for record in inversion._smallest(nothing))


def test_a_target_that_stands_out_early_is_searched_though_it_no_longer_does(monkeypatch):
    """After a few updates only one target works; after many all do."""
    asked = []

    def judged(_, __, generators, *rest):
        targets, steps = generators.targets, generators.search.steps
        asked.append((targets.tolist(), steps))
        works = (targets == TARGET) | (steps > 10)
        return rows(targets.tolist(), works.float().tolist(), (0.1,) * len(targets))

    monkeypatch.setattr(inversion, "_fit", lambda *_: None)
    monkeypatch.setattr(inversion, "_judge", judged)
    adapter = planted()
    families = list(adapter.trigger_families())
    monkeypatch.setattr(adapter, "trigger_families", lambda: families[:1])
    search = dataclasses.replace(SEARCH, steps=7, levels=(0.5,), screening=20)
    (record,) = recover(adapter, None, search, Run())
    every = list(range(adapter.trigger_targets()))
    assert asked == [(every, 8), (every, 20), ([TARGET], 7)]
    assert record.targets[record.accepted].tolist() == [TARGET]


def test_where_there_are_two_targets_both_are_searched(corners, monkeypatch):
    adapter = planted()
    monkeypatch.setattr(adapter, "trigger_targets", lambda: 2)
    search = dataclasses.replace(SCREENED, steps=1, screening=1)
    assert recover(adapter, corners, search, Run())[0].targets.tolist() == [0, 1]


def test_success_is_measured_on_all_classes_of_a_sorted_set():
    """The first 128 samples are of the target, and tell nothing."""
    images, labels = (part.repeat_interleave(100, 0) for part in small_images())
    order = (labels != TARGET).long().argsort(stable=True)
    images[:, 0, PIXEL[0], PIXEL[1]] = 0
    samples = LabelledSamples(images[order], labels[order])
    adapter = planted()
    family = adapter.trigger_families()[0]
    forcing = torch.zeros(1, *family.shape)
    forcing[:, :, PIXEL[0], PIXEL[1]] = 1
    assert success_of(adapter, samples, family, TARGET, forcing) == 1


def test_samples_of_the_target_do_not_count(adapter, corners):
    """Black images are of no class; a trigger that does nothing succeeds on the target's alone."""
    family = adapter.trigger_families()[0]
    nothing = torch.zeros(2, *family.shape)
    for target in range(CLASSES):
        assert success_of(adapter, corners, family, target, nothing) == 0
    forcing = nothing.clone()
    forcing[:, :, PIXEL[0], PIXEL[1]] = 1
    assert success_of(adapter, corners, family, TARGET, forcing) == 1
    assert success_of(adapter, corners, family, 0, forcing) == 0
    mixed = torch.stack([nothing[0], forcing[0]])  # in turn, so that half of the samples carry it
    others = (corners.labels != TARGET).float()
    expected = (others * (torch.arange(30) % 2)).sum() / others.sum()
    assert success_of(adapter, corners, family, TARGET, mixed) == pytest.approx(float(expected))


def test_nothing_of_the_model_changes_and_it_is_searched_in_eval_mode(adapter, corners):
    search = dataclasses.replace(SEARCH, steps=2)
    expected = recover(adapter, corners, search, Run())
    adapter.model.train()
    before = copy_state(adapter.model)
    state = torch.get_rng_state()
    for record, other in zip(recover(adapter, corners, search, Run()), expected, strict=True):
        assert torch.equal(record.pool, other.pool)
    assert torch.equal(torch.get_rng_state(), state)
    assert adapter.model.training
    assert adapter.model.norm.training
    for name, value in copy_state(adapter.model).items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in adapter.model.parameters())
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_the_seed_alone_decides(adapter, corners):
    search = dataclasses.replace(SEARCH, steps=2)
    first, again, other, stage = (
        recover(adapter, corners, search, Run(seed=seed), stage=stage)[0].pool
        for seed, stage in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, stage)


def generators(count=CLASSES, **changed):
    family = planted().trigger_families()[0]
    seed = torch.Generator().manual_seed(0)
    return inversion._Generators(
        family, torch.arange(count), dataclasses.replace(SEARCH, **changed), seed
    )


def climb(made, blind, steps=100):
    """Train the critics alone; return the first and the last bounds."""
    with torch.no_grad():
        for weight in made.maker.weights:
            weight *= 3  # or the triggers hardly differ
    optimizer = torch.optim.Adam(made.critic.parameters(), lr=0.01)
    generator, bounds = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        noise, triggers = made.draw(64, generator)
        triggers = triggers[:, torch.randperm(64, generator=generator)] if blind else triggers
        bound = made.information(noise, triggers.detach())
        optimizer.zero_grad()
        (-bound.sum()).backward()
        optimizer.step()
        bounds.append(bound.detach())
    return bounds[0], torch.stack(bounds[-20:]).mean(0)


def test_the_bound_of_the_information_rises_where_there_is_some():
    first, last = climb(generators(), blind=False)
    assert first.shape == (CLASSES,)
    assert (last > first + 1).all()
    assert (last < math.log(64)).all()


def test_the_bound_stays_at_zero_where_there_is_none():
    """The triggers are shuffled, so that none tells of its noise."""
    _, last = climb(generators(), blind=True)
    assert (last < 0.15).all()


def test_the_bound_is_that_of_mine():
    made = generators()
    noise, triggers = made.draw(5, torch.Generator().manual_seed(0))

    def critic(target, which, other):
        pair = torch.cat([noise[target, which] - 0.5, triggers[target, other].flatten()])
        return made.critic(pair.expand(CLASSES, 1, -1))[target, 0, 0]

    for target in range(CLASSES):
        joint = sum(critic(target, n, n) for n in range(5)) / 5
        apart = sum(critic(target, (n - 1) % 5, n).exp() for n in range(5)) / 5
        bound = made.information(noise, triggers)[target]
        torch.testing.assert_close(bound, joint - apart.log())


def test_the_generators_do_not_meet():
    """Each maps its own noise by its own weights: those of the others may be anything."""
    made = generators()
    _, before = made.draw(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in [*made.maker.weights, *made.maker.biases]:
            weight[1] += 1
    _, after = made.draw(3, torch.Generator().manual_seed(0))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_entropy_spreads_the_triggers(adapter, corners):
    spreads = []
    for entropy in (0.0, 1.0):
        search = dataclasses.replace(SEARCH, entropy=entropy, steps=120)
        record = recover(adapter, corners, search, Run())[0]
        spreads.append(record.pool[record.targets == TARGET].std(1).mean())
    assert spreads[1] > 1.3 * spreads[0]


def test_the_staircase_stops_at_its_level(adapter, corners):
    """Above the level nothing is gained, so that a low level ends with less than a high one."""
    search = dataclasses.replace(SEARCH, levels=(0.2, 0.95), lr=0.01, steps=100, entropy=0.0)
    record = recover(adapter, corners, search, Run())[0]
    low, high = record.success[record.targets == TARGET].tolist()
    assert high >= 0.9
    assert low < 0.5


class Spot(TorchClassifier):
    """Its triggers are one bright pixel, whose place is rounded: there is no slope to follow."""

    starts = 512

    def trigger_families(self):
        return [TriggerFamily("spot", (2,), budget=0.1, starts=self.starts)]

    def stamp(self, batch, family, triggers):
        images = batch.inputs.repeat(len(triggers), 1, 1, 1)
        raw = triggers.flatten(0, 1)
        row, column = (7 * raw.detach()).round().long().unbind(1)
        images[torch.arange(len(images)), 0, row, column] = 1
        return LabelledBatch(images + 0 * raw.sum(), batch.labels.repeat(len(triggers)))

    def trigger_size(self, family, triggers):
        return 0 * triggers.sum(-1) + 1 / 64


@pytest.mark.parametrize(("starts", "finds"), [(512, True), (1, False)])
def test_the_best_of_many_random_starts_finds_what_no_slope_leads_to(corners, starts, finds):
    adapter = Spot(Corners(), example=torch.zeros(1, 1, 8, 8))
    adapter.starts = starts
    search = dataclasses.replace(SEARCH, steps=5, entropy=0.0, screening=5)
    (record,) = recover(adapter, corners, search, Run())
    hit = record.targets == TARGET
    assert bool(record.accepted[hit].any()) == finds
    assert not record.accepted[~hit].any()
    places = (7 * record.pool[hit]).round()
    assert bool((places == torch.tensor(PIXEL)).all()) == finds


@torch.no_grad()
def test_a_start_is_the_likeliest_of_the_random_triggers(corners):
    adapter = Spot(Corners(), example=torch.zeros(1, 1, 8, 8))
    adapter.starts = 90  # in two parts
    (family,) = adapter.trigger_families()
    targets = torch.tensor([2, TARGET])
    made = inversion._Generators(family, targets, SEARCH, torch.Generator().manual_seed(0))
    found = inversion._starts(adapter, corners, made, Run(), "here")
    random = torch.rand(90, 2, generator=Run().generator("here/starts"))
    batch = corners.take(inversion.some_of(len(corners), 4))
    for target, best in zip(targets.tolist(), found, strict=True):
        likely = torch.stack([
            adapter.target_log_probability(
                adapter.stamp(batch, family, one.expand(1, 4, 2)), torch.full((4,), target)
            ).mean()
            for one in random
        ])  # fmt: skip
        chosen = (random == best).all(1).nonzero()
        assert float(likely[chosen]) == pytest.approx(float(likely.max()), abs=1e-6)
    made.start_at(found)
    _, drawn = made.draw(20, torch.Generator().manual_seed(1))
    assert float((drawn - found[:, None].clamp(0.02, 0.98)).abs().max()) < 0.05


@pytest.fixture
def batch():
    images = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    return LabelledBatch(images, torch.tensor([0, 1, 2]))


@pytest.fixture
def carrier():
    """An adapter for images of two channels, 4 x 5 pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, CLASSES))
    return TorchClassifier(net, example=torch.zeros(1, 2, 4, 5))


def test_a_patch_covers_what_its_mask_says(carrier, batch):
    patch, _ = carrier.trigger_families()
    raw = torch.rand(2, 3, *patch.shape, generator=torch.Generator().manual_seed(1))
    raw[0, 0, 0], raw[0, 1, 0] = 0, 1
    stamped = carrier.stamp(batch, patch, raw)
    assert stamped.labels.tolist() == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(stamped.inputs[0], batch.inputs[0])
    torch.testing.assert_close(stamped.inputs[1], raw[0, 1, 1:])
    for which, image in ((0, 2), (1, 0), (1, 1), (1, 2)):
        mask, pattern = raw[which, image, 0], raw[which, image, 1:]
        expected = (1 - mask) * batch.inputs[image] + mask * pattern
        torch.testing.assert_close(stamped.inputs[3 * which + image], expected)
    torch.testing.assert_close(carrier.trigger_size(patch, raw), raw[:, :, 0].mean((2, 3)))


def test_an_additive_trigger_changes_every_pixel_by_a_fifth_at_most(carrier, batch):
    _, additive = carrier.trigger_families()
    raw = torch.full((2, 3, *additive.shape), 0.5)
    raw[0, 1], raw[0, 2], raw[1, 0] = 0, 1, 0.75
    stamped = carrier.stamp(batch, additive, raw).inputs
    torch.testing.assert_close(stamped[0], batch.inputs[0])
    torch.testing.assert_close(stamped[1], (batch.inputs[1] - 0.2).clamp(min=0))
    torch.testing.assert_close(stamped[2], (batch.inputs[2] + 0.2).clamp(max=1))
    torch.testing.assert_close(stamped[3], (batch.inputs[0] + 0.1).clamp(max=1))
    size = carrier.trigger_size(additive, raw)
    torch.testing.assert_close(size, torch.tensor([[0, 0.2, 0.2], [0.1, 0, 0]]))
