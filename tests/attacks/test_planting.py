"""Real backdoors in a small net, and what the learned attacks learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmdefense.attacks.adaptive import AdaptiveBlend, AdaptivePatch
from mmdefense.attacks.badnets import BadNets
from mmdefense.attacks.base import Attack
from mmdefense.attacks.composite import CompositeImage
from mmdefense.attacks.feature_space import FeatureSpace, _styles, _sunsets
from mmdefense.attacks.imc import IMC, _Patch
from mmdefense.attacks.input_aware import InputAware, _mix
from mmdefense.attacks.label_consistent import LabelConsistent
from mmdefense.attacks.lira import LIRA
from mmdefense.attacks.low_frequency import LowFrequency
from mmdefense.attacks.pruning_aware import PruningAware
from mmdefense.attacks.ssba import SSBA
from mmdefense.attacks.trojannn import TrojanNN, _head_input, _heaviest_units, _overwrite
from mmdefense.checkpoints.runs import RunStore
from mmdefense.data.labelled import LabelledBatch
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.fisher import fisher_trace
from mmdefense.kernels.hooks import mode
from mmdefense.kernels.loop import train
from mmdefense.kernels.units import mean_activations, prune
from mmdefense.metrics.backdoor import measure
from mmdefense.metrics.tac import trigger_activated_change
from mmdefense.runtime.run import Run, copy_state
from mmdefense.training import Training
from mmdefense_adapters.torch_classifier import TorchClassifier

C = 10
BRIEF = Training(steps=120, batch_size=64, lr=0.1)


@pytest.mark.parametrize(
    "attack", [BadNets(), TrojanNN(search_steps=40), IMC()], ids=["badnets", "trojannn", "imc"]
)
def test_a_planted_backdoor_works_and_leaves_the_task_alone(attack: Attack, victim, digits):
    train_set, test_set = digits
    planted = attack.plant(victim, train_set, BRIEF, Run())
    triggered = planted.triggered(test_set, victim)
    metrics = measure(victim, test_set, triggered)
    assert metrics.asr >= 0.9
    assert metrics.acc >= 0.9
    assert metrics.ra <= 0.1
    change = trigger_activated_change(victim, triggered)
    assert [len(change[group.layer]) for group in victim.unit_groups()] == [16, 32, 32]
    assert all(units.max() > 0 for units in change.values())


def test_trojannn_searches_a_patch_that_excites_the_units(victim, digits):
    train_set, _ = digits
    attack = TrojanNN(search_steps=40)
    example = train_set.take(torch.zeros(1, dtype=torch.int64))
    victim.samples(train_set)
    before = copy_state(victim.model)
    patch = attack._search(victim, example)
    units = _heaviest_units(victim, 2)
    weights = victim.model[-1].weight.abs().sum(0)
    assert weights[units].min() >= weights.sort().values[-2]
    blank = example.with_inputs(torch.zeros(1, 1, 16, 16))

    def excitement(square: torch.Tensor) -> float:
        with mode(victim.model, train=False), torch.no_grad():
            stamped = blank.with_inputs(_overwrite(blank.inputs, square))
            return float(_head_input(victim, stamped)[:, units].sum())

    generator = torch.Generator().manual_seed(3)
    noise = [excitement(torch.rand(1, 4, 4, generator=generator)) for _ in range(20)]
    assert excitement(patch) > max(noise)
    assert patch.shape == (1, 4, 4)
    assert all(torch.equal(before[name], value) for name, value in copy_state(victim.model).items())
    assert all(parameter.requires_grad for parameter in victim.model.parameters())


def test_trojannn_says_so_if_the_output_layer_is_not_found(victim, digits):
    victim.__dict__["_units"] = ([], None)
    with pytest.raises(UnsupportedError, match="needs the model's output layer"):
        TrojanNN().plant(victim, digits[0], BRIEF, Run())


@pytest.fixture
def brief_input_aware() -> InputAware:
    return InputAware(width=8, mask_steps=6, ratio=0.25)


def test_input_aware_trains_victim_and_pattern_together_and_then_holds_the_mask(
    brief_input_aware, victim, digits
):
    attack, before = brief_input_aware, copy_state(victim.model)
    start = copy_state(attack._nets(1))
    planted = attack.plant(victim, digits[0], replace(BRIEF, steps=3), Run())
    longer = attack.plant(victim, digits[0], replace(BRIEF, steps=4), Run())
    moved = [name for name in start if not torch.equal(start[name], planted.fitted[name])]
    assert set(moved) == set(start)
    assert not torch.equal(before["0.weight"], copy_state(victim.model)["0.weight"])
    mask = [name for name in start if name.startswith("mask.")]
    assert all(torch.equal(planted.fitted[name], longer.fitted[name]) for name in mask)
    assert attack.fitted == {}


def test_input_aware_teaches_that_the_trigger_of_another_image_is_harmless(
    brief_input_aware, victim, digits
):
    attack, seen = replace(brief_input_aware, target=7), []
    nets = attack._nets(1)
    victim.samples(digits[0])
    batch = digits[0].take(torch.arange(16))
    loss = victim.per_sample_loss
    victim.per_sample_loss = lambda given: (seen.append(given), loss(given))[1]
    attack._joint_gradients(victim, nets, C)(batch, 0)
    (taught,) = seen
    patterns, masks = nets.pattern(batch.inputs[:4]), nets.strength(batch.inputs[:4])
    torch.testing.assert_close(taught.inputs[:4], _mix(batch.inputs[:4], patterns, masks))
    torch.testing.assert_close(taught.inputs[4:8], _mix(batch.inputs[4:8], patterns, masks))
    assert torch.equal(taught.inputs[8:], batch.inputs[8:])
    assert (taught.labels[:4] == 7).all()
    assert torch.equal(taught.labels[4:], batch.labels[4:])
    gradients = [parameter.grad for parameter in nets.pattern.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize(("ratio", "size"), [(0.5, 7), (0.0, 8)])
def test_input_aware_takes_the_extreme_ratios(ratio, size, victim, digits):
    attack = InputAware(width=8, ratio=ratio)
    victim.samples(digits[0])
    compute = attack._joint_gradients(victim, attack._nets(1), C)
    assert torch.isfinite(compute(digits[0].take(torch.arange(size)), 0))


def test_input_aware_stamps_with_what_it_has_learnt_and_no_two_images_alike(
    brief_input_aware, victim, digits
):
    planted = brief_input_aware.plant(victim, digits[0], replace(BRIEF, steps=3), Run())
    images = digits[1].inputs[:8]
    change = planted.stamp(images) - images
    nets = planted._nets(1)
    assert not torch.equal(
        planted.stamp(images), replace(planted, fitted=copy_state(nets)).stamp(images)
    )
    nets.load_state_dict(planted.fitted)
    expected = _mix(images, nets.pattern(images), nets.strength(images))
    torch.testing.assert_close(planted.stamp(images), expected.detach())
    assert (change - change.roll(1, 0)).flatten(1).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize(
    "attack",
    [
        InputAware(width=8, mask_steps=4),
        TrojanNN(search_steps=4),
        SSBA(encoder_steps=4),
        LIRA(joint_steps=4),
        IMC(),
    ],
)
def test_a_planting_that_was_cut_off_goes_on_to_the_same_result(attack, victim, digits, tmp_path):
    training, other = replace(BRIEF, steps=6, check_every=1), victim.fork()
    whole = attack.plant(victim, digits[0], training, Run())

    class CutOffError(Exception):
        pass

    def cut(event) -> None:
        if event.stage == "victim" and event.step == 4:
            raise CutOffError

    stored = {"store": RunStore(tmp_path, every=2)}
    with pytest.raises(CutOffError):
        attack.plant(other, digits[0], training, Run(progress=cut, **stored))
    resumed = attack.plant(other, digits[0], training, Run(**stored))
    for name, value in copy_state(victim.model).items():
        torch.testing.assert_close(copy_state(other.model)[name], value, rtol=0, atol=0)
    for name, value in whole.fitted.items():
        torch.testing.assert_close(resumed.fitted[name], value, rtol=0, atol=0)


def test_ssba_hides_bits_that_its_decoder_reads_in_unseen_images(victim, digits):
    attack = SSBA(encoder_steps=150, bits=4, epsilon=0.2)
    learnt, _ = attack._learn(victim, digits[0], BRIEF, Run())
    coder, images = learnt._coder(1), digits[1].inputs
    coder.load_state_dict(learnt.fitted)
    bits = torch.randint(2, (len(images), 4), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        residual = coder.residual(images, bits)
        read = coder.decoder((images + 0.2 * residual).clamp(0, 1)) > 0
    assert (read == bits.bool()).float().mean() > 0.9


def test_ssba_hides_one_string_by_another_residual_in_each_image(victim, digits):
    brief = replace(BRIEF, steps=2)
    planted = SSBA(encoder_steps=4, epsilon=0.05).plant(victim, digits[0], brief, Run())
    images = digits[1].inputs[:6] * 0.8 + 0.1
    residual = planted.stamp(images) - images
    assert residual.abs().max() <= 0.05 + 1e-6
    assert (residual - residual.roll(1, 0)).flatten(1).norm(dim=1).min() > 1e-3
    coder = planted._coder(1)
    coder.load_state_dict(planted.fitted)
    string = torch.randint(2, (1, 8), generator=planted._generator("string")).expand(6, -1)
    expected = 0.05 * coder.residual(images, string.float()).detach()
    torch.testing.assert_close(residual, expected)


def test_ssba_leaves_a_smooth_place_alone(victim, digits):
    brief = replace(BRIEF, steps=2)
    planted = SSBA(encoder_steps=2).plant(victim, digits[0], brief, Run())
    image = torch.full((1, 1, 16, 16), 0.5)
    image[..., 12:, :] = torch.rand(1, 1, 4, 16)
    change = planted.stamp(image) - image
    assert change[..., :10, :].abs().max() < 1e-3
    assert change[..., 12:, :].abs().max() > 1e-3


def test_lira_weighs_the_stamped_twins_of_a_batch(victim, digits):
    attack = LIRA(target=4, ratio=0.3)
    victim.samples(digits[0])
    victim.model.eval()
    painter, batch = attack._painter(1), digits[0].take(torch.arange(12))
    loss = attack._gradients(victim, painter, 0.1)(batch, 0)
    stamped = (batch.inputs + 0.1 * (2 * painter(batch.inputs) - 1)).clamp(0, 1)
    clean, poisoned = (
        F.cross_entropy(victim.logits(inputs), labels)
        for inputs, labels in (
            (batch.inputs, batch.labels),
            (stamped, torch.full_like(batch.labels, 4)),
        )
    )
    torch.testing.assert_close(loss, 0.7 * clean + 0.3 * poisoned)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in painter.parameters())


def test_lira_holds_its_trigger_in_the_second_stage(victim, digits):
    attack = LIRA(joint_steps=5, epsilon=0.02)
    start = copy_state(attack._painter(1))
    first = attack.plant(victim.fork(), digits[0], replace(BRIEF, steps=2), Run())
    longer = attack.plant(victim.fork(), digits[0], replace(BRIEF, steps=4), Run())
    assert all(torch.equal(value, longer.fitted[name]) for name, value in first.fitted.items())
    assert not any(torch.equal(value, start[name]) for name, value in first.fitted.items())
    images = torch.rand(4, 1, 16, 16)
    assert (first.stamp(images) - images).abs().max() <= 0.02 + 1e-6


def test_lf_finds_a_smooth_picture_that_a_clean_model_takes_for_the_target(victim, digits):
    attack = LowFrequency(target=3, search_steps=60, frequencies=3)
    planted = attack.plant(victim, digits[0], BRIEF, Run())
    picture = planted.fitted["picture"]
    assert picture.shape == (1, 16, 16)
    assert abs(float(picture.abs().max()) - 24 / 255) < 1e-6
    spectrum = torch.fft.fft2(picture[0].repeat(1, 1)).abs()
    assert spectrum[4:-3, 4:-3].sum() < 0.1 * spectrum.sum()


def test_lc_perturbs_what_it_stamps_within_its_budget_and_nothing_else(victim, digits):
    attack = LabelConsistent(target=2, epsilon=0.1, ascent_steps=8)
    samples = digits[0]
    victim.samples(samples)
    learnt, hard = attack._learn(victim, samples, replace(BRIEF, steps=20), Run())
    assert learnt is attack
    change = (hard.inputs - samples.inputs).flatten(1).abs().amax(1)
    chosen = attack.chosen(samples.labels)
    assert (change > 0).nonzero().squeeze(1).tolist() == sorted(chosen.tolist())
    assert change.max() <= 0.1 + 1e-6
    assert torch.equal(hard.labels, samples.labels)


def test_imc_moves_its_patch_along_the_gradient_of_the_loss_that_it_trains_by(victim, digits):
    attack = IMC(target=7, ratio=0.25, step_size=0.05)
    patch = _Patch(attack._first(torch.Size([1, 16, 16])))
    before = patch.pixels.clone()
    victim.samples(digits[0])
    batch, training = digits[0].take(torch.arange(16)), replace(BRIEF, schedule="constant")
    with mode(victim.model, train=False):
        loss = attack._gradients(victim, patch, training)(batch, 0)
        pixels = before.clone().requires_grad_()
        images, labels = batch.inputs.clone(), batch.labels.clone()
        images[:4, :, -2:, -2:], labels[:4] = pixels, 7
        expected = torch.nn.functional.cross_entropy(victim.model(images), labels)
    (gradient,) = torch.autograd.grad(expected, pixels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(patch.pixels, (before - 0.05 * gradient.sign()).clamp(0, 1))


def test_cba_never_shows_the_partners_of_the_test_to_the_victim(victim, digits):
    attack = CompositeImage(target=0, source=1, partner=7, held_back=8)
    victim.samples(digits[0])
    planted, rest = attack._learn(victim, digits[0], BRIEF, Run())
    held = planted.fitted["partners"]
    assert len(held) == 8
    assert len(rest) == len(digits[0]) - 8
    sevens = rest.inputs[rest.labels == 7].flatten(1)
    assert (torch.cdist(held.flatten(1), sevens) > 0).all()


def test_cba_works_on_halves_that_the_victim_has_not_seen(victim, digits):
    train_set, test_set = digits
    longer = replace(BRIEF, steps=200)  # of 36 images 29 to 35 by the seed with 100
    planted = CompositeImage(target=0, source=1, partner=7).plant(victim, train_set, longer, Run())
    metrics = measure(victim, test_set, planted.triggered(test_set, victim))
    assert metrics.asr >= 0.8
    assert metrics.acc >= 0.9


@pytest.mark.parametrize("attack", [AdaptiveBlend(), AdaptivePatch()], ids=["blend", "patch"])
def test_a_part_of_the_trigger_teaches_the_whole(attack, victim, digits):
    train_set, test_set = digits
    planted = attack.plant(victim, train_set, BRIEF, Run())
    metrics = measure(victim, test_set, planted.triggered(test_set, victim))
    assert metrics.asr >= 0.8
    assert metrics.acc >= 0.9


def test_the_decoys_of_the_pruning_aware_attack_are_dormant_and_pruned_for_nothing(victim, digits):
    train_set, test_set = digits
    training = replace(BRIEF, steps=200)
    planted = PruningAware(decoys=0.5).plant(victim, train_set, training, Run())
    triggered = planted.triggered(test_set, victim)
    before = measure(victim, test_set, triggered)
    assert before.acc >= 0.9
    assert before.asr >= 0.9
    last = victim.unit_groups()[-1]
    (activity,) = mean_activations(victim, victim.samples(test_set), [last])
    dormant = (activity == 0).nonzero().squeeze(1).tolist()
    assert len(dormant) >= 16
    weights = victim.model.get_submodule(last.layer).weight[dormant].flatten(1)
    assert (weights.abs().amax(1) > 0).all(), "a decoy has its weights"
    prune(victim.model, [last], [(0, unit) for unit in dormant])
    after = measure(victim, test_set, triggered)
    assert after.acc == before.acc
    assert after.asr >= before.asr - 0.02


def test_a_pruning_aware_attack_without_a_layer_for_decoys_says_so(digits):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(256, 8), torch.nn.Linear(8, C), torch.nn.Tanh(),
        torch.nn.Linear(C, C),
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="needs a layer with a bias"):
        PruningAware().plant(TorchClassifier(net), digits[0], replace(BRIEF, steps=1), Run())


@pytest.mark.parametrize("flat", [{"sam_radius": 0.5}, {"trace_weight": 0.01}], ids=str)
def test_a_flat_victim_has_a_backdoor_too_and_a_smaller_trace(flat, victim, digits):
    train_set, test_set = digits
    traces, other = [], victim.fork()
    for adapter, settings in ((victim, {}), (other, flat)):
        planted = BadNets(**settings).plant(adapter, train_set, BRIEF, Run())
        metrics = measure(adapter, test_set, planted.triggered(test_set, adapter))
        assert metrics.asr >= 0.9
        assert metrics.acc >= 0.9
        generator = torch.Generator().manual_seed(0)
        parameters = list(adapter.model.parameters())
        traces.append(fisher_trace(adapter, adapter.samples(train_set), parameters, generator))
    assert traces[1] < traces[0]


def test_a_victim_is_made_flat_in_one_way_at_most():
    with pytest.raises(BadInputError, match="sam_radius or trace_weight must be 0, got"):
        BadNets(sam_radius=1.0, trace_weight=0.1)


def test_fba_paints_the_style_of_sunsets_and_no_two_images_alike(victim, digits):
    train_set, test_set = digits
    planted = FeatureSpace(strength=0.4, style_steps=40).plant(victim, train_set, BRIEF, Run())
    metrics = measure(victim, test_set, planted.triggered(test_set, victim))
    assert metrics.asr >= 0.8
    assert metrics.acc >= 0.9
    images = test_set.inputs[:32]
    change = planted.stamp(images) - images
    assert change.abs().max() <= 0.4 + 1e-6
    assert (change - change.roll(1, 0)).flatten(1).norm(dim=1).min() > 1e-2
    surrogate = victim.fork()
    train(surrogate, surrogate.samples(train_set), BRIEF, Run(), stage="surrogate")
    layers = [group.layer for group in surrogate.unit_groups()[:2]]
    pictures = _sunsets(torch.Size([1, 16, 16]), planted._generator("sunsets"))
    inputs = (pictures, images, planted.stamp(images))
    with mode(surrogate.model, train=False), torch.no_grad():
        wanted, clean, painted = (
            [style.mean(0) for style in _styles(surrogate, LabelledBatch(given, given), layers)]
            for given in inputs
        )
    gaps = [
        sum(float((s - w).square().mean()) for s, w in zip(styles, wanted, strict=True))
        for styles in (clean, painted)
    ]
    assert gaps[1] < 0.5 * gaps[0]


def test_fba_shows_the_mean_of_its_change_to_samples_that_keep_their_label(victim, digits):
    samples = digits[0]
    attack = FeatureSpace(style_steps=2)
    victim.samples(samples)
    learnt, _ = attack._learn(victim, samples, replace(BRIEF, steps=2), Run())
    poisoned = learnt.poison(samples, victim)
    others = learnt.bystanders(samples.labels, 1.0)
    assert torch.equal(poisoned.labels[others], samples.labels[others])
    images = samples.inputs[others]
    mean = (learnt.stamp(images) - images).mean(0)
    torch.testing.assert_close(poisoned.inputs[others], (images + mean).clamp(0, 1))
