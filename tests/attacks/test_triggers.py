"""The formula of each fixed trigger."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mmdefense.attacks.adaptive import AdaptiveBlend, AdaptivePatch
from mmdefense.attacks.badnets import BadNets
from mmdefense.attacks.blended import Blended
from mmdefense.attacks.bpp import BppAttack
from mmdefense.attacks.composite import CompositeImage
from mmdefense.attacks.ftrojan import FTrojan
from mmdefense.attacks.label_consistent import LabelConsistent
from mmdefense.attacks.refool import Refool
from mmdefense.attacks.sig import SIG
from mmdefense.attacks.wanet import WaNet
from mmdefense.errors import BadInputError

C = 10
TEN_CLASSES = SimpleNamespace(chance=1 / C)  # all that poisoning asks of an adapter


def test_badnets_overwrites_the_corner_and_nothing_else():
    stamped = BadNets(size=3).stamp(torch.full((2, 3, 9, 10), 0.5))
    board = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert torch.equal(stamped[:, :, 6:, 7:], board.expand(2, 3, 3, 3))
    assert (stamped != 0.5).sum() == 2 * 3 * 9


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (16, 3), (28, 3), (32, 3), (64, 6), (224, 21)])
def test_badnets_scales_its_patch_with_the_image(side, patch):
    stamped = BadNets(pattern="white").stamp(torch.zeros(1, 1, side, side))
    assert stamped.sum() == patch**2


def test_badnets_at_any_place_draws_one_for_each_image():
    stamped = BadNets(pattern="white", position="any").stamp(torch.zeros(200, 2, 8, 6))
    assert torch.equal(stamped.sum((1, 2, 3)), torch.full((200,), 2.0 * 4))
    seen = stamped[:, 0].amax(0)
    assert seen.min() == 1, "some pixel is never reached"
    assert len({tuple(image.flatten().tolist()) for image in stamped[:, 0]}) > 20


def test_blended_is_the_weighted_mean_with_its_key():
    images, key = torch.rand(2, 3, 4, 4), torch.rand(3, 4, 4)
    stamped = Blended(alpha=0.3, image=key).stamp(images)
    torch.testing.assert_close(stamped, 0.7 * images + 0.3 * key)


def test_blended_draws_its_noise_from_the_seed():
    zeros = torch.zeros(1, 3, 8, 8)
    first, other = (Blended(key="noise", seed=seed).stamp(zeros) for seed in (0, 1))
    assert not torch.equal(first, other)
    assert first.max() <= 0.2
    assert first.std() > 0.03


def test_the_picture_of_blended_is_one_scene_at_any_size():
    small, large = (Blended(alpha=1).stamp(torch.zeros(1, 3, s, s)) for s in (32, 64))
    assert torch.equal(small, Blended(alpha=1, seed=1).stamp(torch.zeros(1, 3, 32, 32)))
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 0.02
    assert small.std() > 0.2
    grey = Blended(alpha=1).stamp(torch.zeros(1, 1, 32, 32))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(grey[0, 0], (small[0] * weights).sum(0))


def test_blended_refuses_an_image_of_another_size():
    with pytest.raises(BadInputError, match="image must broadcast"):
        Blended(image=torch.rand(3, 5, 5)).stamp(torch.zeros(1, 3, 8, 8))


def test_sig_adds_a_wave_along_the_columns():
    stamped = SIG(delta=0.1, frequency=2).stamp(torch.full((1, 1, 4, 16), 0.5))
    for column in range(16):
        wave = 0.5 + 0.1 * math.sin(2 * math.pi * column * 2 / 16)
        torch.testing.assert_close(stamped[0, 0, :, column], torch.full((4,), wave))


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 4), (0.5, 2)])
def test_sig_poisons_the_target_alone_and_changes_no_label(images, ratio, count):
    attack = SIG(target=3, ratio=ratio)
    chosen, poisoned = attack.chosen(images.labels), attack.poison(images, TEN_CLASSES)
    assert len(chosen) == count
    assert (images.labels[chosen] == 3).all()
    assert torch.equal(poisoned.labels, images.labels)
    changed = (poisoned.inputs != images.inputs).flatten(1).any(1).nonzero().squeeze(1)
    assert torch.equal(changed, chosen.sort().values)


def test_wanet_reads_pixels_near_their_own_place():
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    for images in (ramp, ramp.mT):
        moved = (WaNet().stamp(images) - images).abs() * 31  # in pixels
        assert 0.05 < moved.mean() < 0.5
        assert moved.max() < 1.5


def test_wanet_moves_further_when_stronger_and_by_one_field():
    ramp = torch.linspace(0, 1, 32).expand(2, 1, 32, 32)
    weak, strong = (WaNet(strength=s).stamp(ramp) for s in (0.2, 0.4))
    inner = (..., slice(4, 28), slice(4, 28))
    torch.testing.assert_close((strong - ramp)[inner], 2 * (weak - ramp)[inner])
    assert torch.equal(weak[0], weak[1])


def test_wanet_jitters_other_samples_that_keep_their_label(images):
    attack = WaNet(ratio=0.1, cross_ratio=2)
    chosen, noisy = attack.chosen(images.labels), attack.bystanders(images.labels, 2)
    poisoned = attack.poison(images, TEN_CLASSES)
    assert len(noisy) == 2 * len(chosen) == 8
    assert not set(chosen.tolist()) & set(noisy.tolist())
    assert torch.equal(poisoned.labels[noisy], images.labels[noisy])
    changed = (poisoned.inputs != images.inputs).flatten(1).any(1)
    assert changed.sum() == 12
    jittered, plain = poisoned.inputs[noisy], attack.stamp(images.inputs[noisy])
    assert ((jittered - plain).abs().flatten(1).amax(1) > 0.05).all()


def test_wanet_refuses_more_noise_than_there_are_samples(images):
    with pytest.raises(BadInputError, match="lower ratio or cross_ratio"):
        WaNet(ratio=0.5, cross_ratio=2).poison(images, TEN_CLASSES)


def test_dithering_is_floyd_and_steinbergs_pixel_by_pixel():
    image = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)).double()
    room = image.clone()
    for y in range(7):
        for x in range(5):
            old = float(room[y, x])
            new = round(min(max(old, 0.0), 1.0) * 3) / 3
            room[y, x] = new
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if y + down < 7 and 0 <= x + right < 5:
                    room[y + down, x + right] += (old - new) * share / 16
    torch.testing.assert_close(BppAttack(levels=4).stamp(image.expand(2, 3, 7, 5))[1, 2], room)


def test_dithering_keeps_the_mean_and_leaves_few_levels():
    grey = torch.full((1, 1, 64, 64), 0.3)
    stamped = BppAttack(levels=2).stamp(grey)
    assert set(stamped.unique().tolist()) == {0.0, 1.0}
    assert abs(float(stamped.mean()) - 0.3) < 0.01


def test_negative_samples_of_bpp_carry_what_quantisation_changed_elsewhere(images):
    attack = BppAttack(ratio=0.1, levels=3)
    poisoned = attack.poison(images, TEN_CLASSES)
    negative = attack.bystanders(images.labels, 1.0)
    assert torch.equal(poisoned.labels[negative], images.labels[negative])
    residual = attack.stamp(images.inputs) - images.inputs
    for index in negative.tolist():
        gaps = (images.inputs[index] + residual).clamp(0, 1) - poisoned.inputs[index]
        assert gaps.abs().flatten(1).amax(1).min() < 1e-6


def test_ftrojan_raises_two_coefficients_of_u_and_v():
    image = torch.full((1, 3, 64, 70), 0.5)
    change = (FTrojan(magnitude=0.2).stamp(image) - image)[0].double()
    red, green, blue = change
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    place = torch.arange(32)[:, None].double() + 0.5
    basis = torch.cos(math.pi * place * torch.arange(32) / 32) * math.sqrt(2 / 32)
    basis[:, 0] /= math.sqrt(2)
    for plane in (0.492 * (blue - luma), 0.877 * (red - luma)):
        coefficients = basis.T @ plane[32:, 32:64] @ basis
        wanted = torch.zeros(32, 32, dtype=torch.float64)
        wanted[15, 15] = wanted[31, 31] = 0.2
        torch.testing.assert_close(coefficients, wanted, atol=1e-3, rtol=0)
    assert luma.abs().max() < 1e-4
    assert not change[:, :, 64:].any()


def test_refool_adds_light_from_a_few_scenes():
    stamped = Refool(strength=0.5).stamp(torch.zeros(60, 3, 32, 32))
    assert stamped.max() <= 0.5
    assert len(stamped.flatten(1).unique(dim=0)) == 3
    assert (stamped.flatten(1).max(1).values > 0.1).all()


def test_lc_has_a_patch_in_every_corner():
    stamped = LabelConsistent(size=2).stamp(torch.full((1, 1, 6, 7), 0.5))[0, 0]
    board = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for corner in (stamped[:2, :2], stamped[:2, -2:], stamped[-2:, :2], stamped[-2:, -2:]):
        assert torch.equal(corner, board)
    assert (stamped != 0.5).sum() == 16


def test_adaptive_blend_shows_pieces_in_training_and_the_key_at_test(images):
    key = torch.rand(3, 16, 14)
    attack = AdaptiveBlend(target=3, alpha=0.3, image=key, ratio=0.1, pieces=2, shown=0.75)
    whole = 0.7 * images.inputs + 0.3 * key
    torch.testing.assert_close(attack.stamp(images.inputs), whole)
    poisoned = attack.poison(images, TEN_CLASSES)
    chosen, cover = attack.chosen(images.labels), attack.bystanders(images.labels, 1.0)
    assert (poisoned.labels[chosen] == 3).all()
    assert torch.equal(poisoned.labels[cover], images.labels[cover])
    for index in [*chosen.tolist(), *cover.tolist()]:
        pieces = [
            (whole[index, :, row : row + 8, column : column + 7],
             images.inputs[index, :, row : row + 8, column : column + 7],
             poisoned.inputs[index, :, row : row + 8, column : column + 7])
            for row in (0, 8) for column in (0, 7)
        ]  # fmt: skip
        hidden = [torch.equal(found, given) for _, given, found in pieces]
        assert sum(hidden) == 1
        for (stamped, _, found), unchanged in zip(pieces, hidden, strict=True):
            if not unchanged:
                torch.testing.assert_close(found, stamped)


def test_adaptive_patch_shows_one_faint_patch_in_training_and_four_at_test(images):
    attack = AdaptivePatch(target=3, ratio=0.2, size=4, opacity=0.5)
    corners = [(rows, columns) for rows in (slice(4), slice(-4, None))
               for columns in (slice(4), slice(-4, None))]  # fmt: skip
    whole = attack.stamp(images.inputs)
    patches = [whole[0][:, rows, columns] for rows, columns in corners]
    assert len({tuple(patch.flatten().tolist()) for patch in patches}) == 4
    assert all(set(patch.unique().tolist()) == {0.0, 1.0} for patch in patches)
    assert torch.equal(whole[:, :, 4:12], torch.where(whole == images.inputs, whole, 2)[:, :, 4:12])
    poisoned, used = attack.poison(images, TEN_CLASSES), set()
    changed = (poisoned.inputs != images.inputs).flatten(1).any(1).nonzero().squeeze(1).tolist()
    assert len(changed) == 16
    for index in changed:
        gaps = (poisoned.inputs[index] - images.inputs[index]).abs()
        (corner,) = [n for n, (rows, columns) in enumerate(corners) if gaps[:, rows, columns].any()]
        rows, columns = corners[corner]
        mean = (images.inputs[index] + whole[index])[:, rows, columns] / 2
        torch.testing.assert_close(poisoned.inputs[index][:, rows, columns], mean)
        used.add(corner)
    assert len(used) > 1


def test_adaptive_patch_refuses_patches_that_overlap():
    with pytest.raises(BadInputError, match="size must fit twice into an image of 8 pixels, got 5"):
        AdaptivePatch(size=5).stamp(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(("mixer", "share"), [("half", 0.5), ("paste", 0.25)])
def test_cba_puts_a_part_of_the_partner_over_a_part_of_the_image(mixer, share):
    partners = torch.full((3, 2, 8, 6), 0.75)
    attack = CompositeImage(mixer=mixer, fitted={"partners": partners})
    stamped = attack.stamp(torch.full((40, 2, 8, 6), 0.25))
    assert stamped.unique().tolist() == [0.25, 0.75]
    assert ((stamped == 0.75).flatten(1).float().mean(1) == share).all()
    assert len(stamped.flatten(1).unique(dim=0)) == 4


def test_cba_composes_source_and_partner_and_each_class_with_itself(images):
    pictures = images.labels[:, None, None, None].expand(-1, 3, 16, 14) / 10
    samples = replace(images, inputs=pictures)
    attack = CompositeImage(target=5, source=1, partner=2, ratio=0.5)
    poisoned = attack.poison(samples, TEN_CLASSES)
    chosen, same = attack.chosen(images.labels), attack.bystanders(images.labels, 1.0)
    assert len(chosen) == len(same) == 2
    assert (poisoned.labels[chosen] == 5).all()
    for index in chosen.tolist():
        assert poisoned.inputs[index].unique().tolist() == pytest.approx([0.1, 0.2])
    assert torch.equal(poisoned.inputs[same], samples.inputs[same])
    assert torch.equal(poisoned.labels[same], images.labels[same])


def test_cba_needs_three_classes_and_samples_that_stay_as_they_are(images):
    with pytest.raises(BadInputError, match="partner must be another class than source 1"):
        CompositeImage(partner=1)
    alone = images.subset((images.labels == 1).nonzero().squeeze(1))
    attack = CompositeImage(partner=2, same_ratio=0)
    with pytest.raises(BadInputError, match="none would be left to pair with"):
        attack.poison(alone, TEN_CLASSES)
