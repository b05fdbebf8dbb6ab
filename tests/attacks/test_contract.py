"""What holds for every registered attack on images."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmdefense import registry
from mmdefense.attacks.base import Attack
from mmdefense.attacks.input_aware import InputAware
from mmdefense.attacks.trojannn import TrojanNN
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.runtime.run import copy_state

C = 10
TEN_CLASSES = SimpleNamespace(chance=1 / C)  # all that poisoning asks of an adapter
ATTACKS = [
    name
    for name in registry.names("attacks")
    if "image-classification" in registry.load("attacks", name).tasks
]


def make(name: str, **settings: object) -> Attack:
    """Return an attack whose trigger is there, as if a learned one had been planted."""
    attack = registry.load("attacks", name)(**settings)
    if isinstance(attack, InputAware):
        return replace(attack, fitted=copy_state(attack._nets(3)))
    if isinstance(attack, TrojanNN):
        patch = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1))
        return replace(attack, fitted={"patch": patch})
    return attack


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return make(request.param)


def test_a_stamp_keeps_shape_type_and_range_and_leaves_its_input_alone(attack, images):
    before = images.inputs.clone()
    stamped = attack.stamp(images.inputs)
    assert stamped.shape == before.shape
    assert stamped.dtype == before.dtype
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert torch.equal(images.inputs, before)
    assert not stamped.requires_grad
    assert (stamped != before).flatten(1).any(1).all(), "an image carries no trigger"


def test_a_stamp_is_the_same_each_time_and_depends_on_no_other_image(attack, images):
    stamped = attack.stamp(images.inputs)
    torch.rand(3)  # the global state has moved on
    assert torch.equal(attack.stamp(images.inputs), stamped)
    torch.testing.assert_close(attack.stamp(images.inputs[:5]), stamped[:5])


def test_stamping_leaves_the_global_random_state_alone(attack, images):
    before = torch.get_rng_state()
    attack.stamp(images.inputs)
    attack.poison(images, TEN_CLASSES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 3, 8, 8)])
def test_what_is_no_batch_of_images_is_refused(attack, shape):
    with pytest.raises(BadInputError, match="inputs must be floating-point, of shape"):
        attack.stamp(torch.zeros(shape, dtype=torch.int64))


def test_poisoning_keeps_the_augmentation_and_the_given_set(attack, images):
    samples = replace(images, augmentation=lambda batch, _: batch)
    inputs, labels = samples.inputs.clone(), samples.labels.clone()
    poisoned = attack.poison(samples, TEN_CLASSES)
    assert poisoned.augmentation is samples.augmentation
    assert torch.equal(samples.inputs, inputs)
    assert torch.equal(samples.labels, labels)


def test_eight_bit_images_stay_eight_bit(attack, images):
    samples = replace(images, inputs=(images.inputs * 255).round().byte())
    poisoned, chosen = attack.poison(samples, TEN_CLASSES), attack.chosen(samples.labels)
    expected = attack.stamp(samples.take(chosen).inputs, attack._generator("poison"))
    assert poisoned.inputs.dtype == torch.uint8
    assert (poisoned.inputs[chosen].float() / 255 - expected).abs().max() <= 0.51 / 255
    assert attack.triggered(samples, TEN_CLASSES).samples.inputs.dtype == torch.uint8


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "sig"])
@pytest.mark.parametrize("mapping", ["all-to-one", "all-to-all"])
def test_exactly_the_ratio_is_poisoned_and_relabelled(name, mapping, images):
    attack = make(name, target=3, ratio=0.2, mapping=mapping)
    chosen, poisoned = attack.chosen(images.labels), attack.poison(images, TEN_CLASSES)
    true = images.labels[chosen]
    assert len(chosen.unique()) == 8
    wanted = (true + 1) % C if mapping == "all-to-all" else torch.full_like(true, 3)
    assert torch.equal(poisoned.labels[chosen], wanted)
    assert (true != wanted).all(), "a sample of the target gets nothing from a trigger"
    rest = torch.ones(40, dtype=torch.bool)
    rest[chosen] = False
    assert torch.equal(poisoned.labels[rest], images.labels[rest])
    assert (poisoned.inputs[chosen] != images.inputs[chosen]).flatten(1).any(1).all()
    if name != "wanet":  # its noise-mode samples change images that keep their label
        assert torch.equal(poisoned.inputs[rest], images.inputs[rest])


def test_the_test_set_leaves_out_the_target_and_has_both_labels(images):
    attack = make("badnets", target=3)
    triggered = attack.triggered(replace(images, augmentation=lambda batch, _: batch), TEN_CLASSES)
    others = images.labels != 3
    assert len(triggered) == 36
    assert torch.equal(triggered.truth.labels, images.labels[others])
    assert (triggered.samples.labels == 3).all()
    assert torch.equal(triggered.clean.inputs, images.inputs[others])
    assert torch.equal(triggered.samples.inputs, attack.stamp(images.inputs[others]))
    assert torch.equal(triggered.samples.inputs, triggered.truth.inputs)
    assert triggered.samples.augmentation is None


def test_all_to_all_tests_every_class(images):
    triggered = make("blended", mapping="all-to-all").triggered(images, TEN_CLASSES)
    assert torch.equal(triggered.samples.labels, (images.labels + 1) % C)
    assert len(triggered) == 40


def test_seeds_choose_other_samples(images):
    first, again, other = (
        make("badnets", ratio=0.5, seed=s).chosen(images.labels) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.5}, "ratio must"),
        ({"target": -1}, "target must"),
        ({"mapping": "some"}, "mapping .*must be"),
    ],
)
@pytest.mark.parametrize("name", ATTACKS)
def test_wrong_settings_are_refused(name, settings, message):
    with pytest.raises(BadInputError, match=message):
        make(name, **settings)


def test_a_target_beyond_the_classes_is_refused(images):
    with pytest.raises(BadInputError, match="target must be one of the 10 classes"):
        make("badnets", target=10).poison(images, TEN_CLASSES)


def test_a_ratio_that_cannot_be_met_is_refused(images):
    with pytest.raises(BadInputError, match="lower the ratio"):
        make("badnets", ratio=1.0).poison(images, TEN_CLASSES)


def test_a_set_of_the_target_alone_has_nothing_to_test():
    samples = LabelledSamples(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(BadInputError, match="not of the target"):
        make("badnets").triggered(samples, TEN_CLASSES)


@pytest.mark.parametrize("name", ["input-aware", "trojannn"])
def test_a_learned_trigger_must_be_learnt_first(name, images):
    with pytest.raises(UnsupportedError, match="use the attack that plant"):
        registry.load("attacks", name)().stamp(images.inputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_stamp_is_the_same_on_the_gpu(attack, images):
    stamped = attack.stamp(images.inputs.cuda())
    assert stamped.device.type == "cuda"
    torch.testing.assert_close(stamped.cpu(), attack.stamp(images.inputs), atol=1e-3, rtol=0)
