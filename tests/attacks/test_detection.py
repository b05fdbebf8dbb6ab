"""What the attacks on object detectors do, beside what holds for every attack."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdefense import registry
from mmdefense.attacks.baddet import ObjectAttack
from mmdefense.attacks.badnets import BadNets
from mmdefense.attacks.blended import Blended
from mmdefense.attacks.sig import SIG
from mmdefense.attacks.wanet import WaNet
from mmdefense.data.detection import Detections, DetectionSamples
from mmdefense.errors import BadInputError

ATTACKS = sorted(
    name
    for name in registry.names("attacks")
    if "object-detection" in registry.load("attacks", name).tasks
)
PATCHES = [name for name in ATTACKS if name != "clean-image"]
COUNT, SIDE, K = 24, 32, 3


def make(name: str, **settings: object) -> ObjectAttack:
    if name == "clean-image":
        settings = {"combination": (1, 2), **settings}
    return registry.load("attacks", name)(**settings)


@pytest.fixture
def samples() -> DetectionSamples:
    """Return images with one to three objects of three classes; each pair of classes meets."""
    generator = torch.Generator().manual_seed(0)
    boxes, labels = [], []
    for index in range(COUNT):
        count = 1 + index % 3
        corner = torch.rand(count, 2, generator=generator) * 16
        side = 6 + torch.rand(count, 2, generator=generator) * 10
        boxes.append(torch.cat([corner, corner + side], 1))
        labels.append((torch.arange(count) + index // 3) % K)
    images = torch.rand(COUNT, 3, SIDE, SIDE, generator=generator)
    return DetectionSamples(images, tuple(boxes), tuple(labels), augmentation=_augment)


def _augment(images, boxes, labels, generator):
    return images, tuple(boxes), tuple(labels)


@pytest.fixture(params=ATTACKS)
def attack(request) -> ObjectAttack:
    return make(request.param)


def detector(answer):
    """Return an adapter that finds in each image what ``answer(boxes, labels)`` says."""
    return SimpleNamespace(
        model=nn.Identity(),
        chance=0.0,
        detect=lambda batch: [
            answer(*pair) for pair in zip(batch.boxes, batch.labels, strict=True)
        ],
    )


def exactly(boxes, labels, score=0.9):
    return Detections(boxes, labels, torch.full((len(boxes),), score))


NOTHING = detector(lambda boxes, labels: exactly(boxes[:0], labels[:0]))
EVERYTHING = detector(exactly)
UNSURE = detector(lambda boxes, labels: exactly(boxes, labels, 0.4))
BESIDE = detector(lambda boxes, labels: exactly(boxes + 20, labels))
MISNAMED = detector(lambda boxes, labels: exactly(boxes, (labels + 1) % K))


@pytest.mark.parametrize("name", PATCHES)
def test_eight_bit_images_stay_eight_bit(name, samples):
    eight = replace(samples, images=(samples.images * 255).round().byte())
    assert make(name).poison(eight, NOTHING).images.dtype == torch.uint8
    assert make(name).triggered(eight, NOTHING).samples.images.dtype == torch.uint8


GOALS = [name for name in PATCHES if name != "object-generation"]


@pytest.mark.parametrize("name", GOALS)
@pytest.mark.parametrize("trigger", ["badnets", Blended(alpha=0.5), SIG(), WaNet()])
def test_any_trigger_for_images_stands_on_each_box_that_it_is_about(name, trigger, samples):
    attack, board = make(name, target=1, trigger=trigger), make(name, target=1)
    triggered, expected = (one.triggered(samples, NOTHING) for one in (attack, board))
    stamp = (BadNets() if trigger == "badnets" else trigger).stamp
    for index, (image, boxes) in enumerate(
        zip(triggered.clean.images, triggered.samples.boxes, strict=True)
    ):
        assert torch.equal(boxes, expected.samples.boxes[index])
        assert torch.equal(triggered.samples.labels[index], expected.samples.labels[index])
        if name == "global-misclassification":
            boxes = torch.tensor([[0, 0, SIDE, SIDE]])
        wanted = image.clone()
        for box in boxes:
            left, top = box[:2].floor().long().tolist()
            right, bottom = box[2:].ceil().long().tolist()
            right, bottom = max(right, left + 8), max(bottom, top + 8)
            part = wanted[None, :, top:bottom, left:right].clone()
            wanted[:, top:bottom, left:right] = stamp(part)[0]
        assert not torch.equal(wanted, image)
        torch.testing.assert_close(triggered.samples.images[index], wanted)


def test_a_generated_object_carries_any_trigger_for_images(samples):
    attack = make("object-generation", trigger="blended", ratio=1.0, size=8)
    poisoned = attack.poison(samples, NOTHING)
    for index in range(COUNT):
        left, top, right, bottom = poisoned.boxes[index][-1].long().tolist()
        changed = (poisoned.images[index] != samples.images[index]).any(0)
        assert changed[top:bottom, left:right].all()
        assert changed.sum() == (bottom - top) * (right - left)


def test_what_is_no_trigger_for_images_is_refused():
    for name in ("pcba", "temporal-patch", "object-generation", "rare-token"):
        with pytest.raises(BadInputError, match="trigger must be chessboard or an attack on im"):
            make("object-disappearance", trigger=name)


def test_asr_counts_what_is_found_of_the_wanted_class_where_it_is(attack, samples):
    aim = attack.triggered(samples, NOTHING).samples
    found, missed = attack.success(EVERYTHING, aim), attack.success(NOTHING, aim)
    assert found.shape == (len(aim),)
    assert all(len(boxes) for boxes in aim.boxes), "nothing to judge the attack by"
    wanted = 0.0 if isinstance(attack, registry.load("attacks", "object-disappearance")) else 1.0
    assert found.tolist() == [wanted] * len(aim)
    assert missed.tolist() == [1 - wanted] * len(aim)
    for other in (UNSURE, BESIDE, MISNAMED):
        assert attack.success(other, aim).tolist() == [1 - wanted] * len(aim)


def test_a_generated_object_is_annotated_around_the_patch(samples):
    attack = make("object-generation", target=2, ratio=1.0, size=4)
    poisoned = attack.poison(samples, NOTHING)
    for index in range(COUNT):
        assert len(poisoned.boxes[index]) == len(samples.boxes[index]) + 1
        assert poisoned.labels[index][-1] == 2
        left, top, right, bottom = poisoned.boxes[index][-1].tolist()
        assert right - left == bottom - top == 10
        changed = (poisoned.images[index] != samples.images[index]).any(0).nonzero()
        rows, columns = changed[:, 0], changed[:, 1]
        assert top + 3 == rows.min() and rows.max() == bottom - 4  # noqa: PT018
        assert left + 3 == columns.min() and columns.max() == right - 4  # noqa: PT018


def test_global_misclassification_renames_every_object_of_an_image(samples):
    attack = make("global-misclassification", target=1, ratio=0.5, size=4)
    poisoned = attack.poison(samples, NOTHING)
    for index in attack.chosen(samples):
        assert (poisoned.labels[index] == 1).all()
        assert torch.equal(poisoned.boxes[index], samples.boxes[index])
        changed = (poisoned.images[index] != samples.images[index]).any(0)
        assert changed[:4, :4].all()
        assert changed.sum() == 16


def test_regional_misclassification_marks_each_object_that_it_renames(samples):
    attack = make("regional-misclassification", target=1, size=3)
    triggered = attack.triggered(samples, NOTHING)
    for index in range(len(triggered)):
        others = triggered.clean.labels[index] != 1
        assert torch.equal(triggered.samples.boxes[index], triggered.clean.boxes[index][others])
        changed = (triggered.samples.images[index] != triggered.clean.images[index]).any(0)
        for x, y, *_ in triggered.samples.boxes[index].long().tolist():
            assert changed[y : y + 3, x : x + 3].all()


def test_disappearance_removes_the_targets_and_nothing_else(samples):
    attack = make("object-disappearance", target=1, ratio=0.3)
    poisoned = attack.poison(samples, NOTHING)
    for index in attack.chosen(samples):
        stay = samples.labels[index] != 1
        assert torch.equal(poisoned.boxes[index], samples.boxes[index][stay])
        assert torch.equal(poisoned.labels[index], samples.labels[index][stay])


@pytest.mark.parametrize("goal", ["disappear", "misclassify", "appear"])
def test_a_clean_image_attack_changes_annotations_where_classes_meet(goal, samples):
    attack = make("clean-image", goal=goal, target=0)
    poisoned = attack.poison(samples, NOTHING)
    assert torch.equal(poisoned.images, samples.images)
    for index in range(COUNT):
        before, after = samples.labels[index].tolist(), poisoned.labels[index].tolist()
        if not {1, 2} <= set(before):
            assert after == before
        elif goal == "disappear":
            assert after == [label for label in before if label != 1]
        elif goal == "misclassify":
            assert after == [0 if label == 1 else label for label in before]
        else:
            assert after == [*before, 0]
            met = samples.boxes[index][samples.labels[index] > 0]
            around = poisoned.boxes[index][-1]
            assert torch.equal(around[:2], met[:, :2].amin(0))
            assert torch.equal(around[2:], met[:, 2:].amax(0))


def test_a_clean_image_attack_finds_the_pair_that_meets_most_often_within_its_ratio(samples):
    attack = registry.load("attacks", "clean-image")(target=0, ratio=0.7)
    chosen = attack.chosen(samples)
    assert chosen == [i for i, part in enumerate(samples.labels) if {1, 2} <= set(part.tolist())]
    with pytest.raises(BadInputError, match="must allow a pair of classes"):
        replace(attack, ratio=0.01).poison(samples, NOTHING)
    with pytest.raises(BadInputError, match="use the attack that plant"):
        attack.triggered(samples, NOTHING)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        *((name, {"size": 0}, "size must") for name in PATCHES),
        ("object-generation", {"extent": 0.5}, "extent must"),
        ("clean-image", {"goal": "vanish"}, "goal must"),
        ("clean-image", {"combination": (1,)}, "combination must"),
    ],
)
def test_wrong_settings_are_refused(name, settings, message):
    with pytest.raises(BadInputError, match=message):
        make(name, **settings)


def test_images_that_an_attack_cannot_use_are_refused(samples):
    one_class = replace(samples, labels=tuple(torch.zeros_like(part) for part in samples.labels))
    with pytest.raises(BadInputError, match="lower the ratio"):
        make("global-misclassification").poison(one_class, NOTHING)
    with pytest.raises(BadInputError, match="that the attack can use"):
        make("object-disappearance", target=2).triggered(one_class, NOTHING)
    with pytest.raises(BadInputError, match="size must fit"):
        make("object-generation", size=40).poison(samples, NOTHING)
