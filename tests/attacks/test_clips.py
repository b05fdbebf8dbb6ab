"""What triggers do to the frames of a clip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdefense import registry
from mmdefense.attacks.badnets import BadNets
from mmdefense.attacks.blended import Blended
from mmdefense.attacks.surrogate import harder
from mmdefense.attacks.temporal_patch import TemporalPatch
from mmdefense.attacks.universal_trigger import UniversalTrigger
from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.loop import train
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_adapters.video import TorchVideoClassifier

C, T = 4, 6


@pytest.fixture
def clips():
    """Forty colour clips of four classes, ten of each."""
    generator = torch.Generator().manual_seed(0)
    inputs = 0.1 + 0.8 * torch.rand(40, 3, T, 16, 14, generator=generator)
    return LabelledSamples(inputs, torch.arange(40) % C)


def test_a_patch_is_that_of_badnets_in_every_frame(clips):
    stamped = BadNets().stamp(clips.inputs)
    for frame in range(T):
        expected = BadNets().stamp(clips.inputs[:, :, frame])
        torch.testing.assert_close(stamped[:, :, frame], expected)


@pytest.mark.parametrize(
    "name", ["badnets", "blended", "sig", "wanet", "bpp", "ftrojan", "refool", "lc"]
)
def test_a_trigger_for_images_stamps_every_frame_alike(name, clips):
    attack = registry.load("attacks", name)()
    still = clips.inputs[:, :, :1].expand(-1, -1, T, -1, -1).contiguous()
    stamped = attack.stamp(still)
    torch.testing.assert_close(stamped, stamped[:, :, :1].expand_as(stamped))
    torch.testing.assert_close(stamped[:, :, 0], attack.stamp(still[:, :, 0]))


def test_a_patch_at_any_place_stays_there(clips):
    stamped = BadNets(position="any", pattern="white").stamp(clips.inputs)
    where = (stamped == 1).all(1)  # (N, T, H, W)
    assert torch.equal(where, where[:, :1].expand_as(where))
    assert len(where[:, 0].flatten(1).unique(dim=0)) > 5


def test_a_key_is_the_same_in_every_frame(clips):
    change = Blended(alpha=0.2).stamp(clips.inputs) - 0.8 * clips.inputs
    torch.testing.assert_close(change, change[:1, :, :1].expand_as(change))
    assert change[0, :, 0].std() > 0.01


@pytest.mark.parametrize("frames", [1, 3, T])
def test_a_temporal_patch_is_in_a_few_frames_in_a_row(clips, frames):
    stamped = TemporalPatch(frames=frames).stamp(clips.inputs)
    carries = (stamped != clips.inputs).flatten(3).any(3).any(1)  # (N, T)
    assert (carries.sum(1) == frames).all()
    assert ((carries[:, 1:] & ~carries[:, :-1]).sum(1) + carries[:, 0] == 1).all()
    every = BadNets().stamp(clips.inputs)
    assert torch.equal(stamped.movedim(2, 1)[carries], every.movedim(2, 1)[carries])
    assert len(carries.unique(dim=0)) == T - frames + 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TemporalPatch(frames=0), "frames must be at least 1"),
        (lambda: TemporalPatch(frames=9).stamp(torch.zeros(1, 1, 4, 8, 8)), "fit into a clip of 4"),
        (lambda: UniversalTrigger(search_steps=0), "search_steps must"),
        (lambda: UniversalTrigger(epsilon=-1), "epsilon must"),
        (lambda: UniversalTrigger(size=0), "size must"),
        (lambda: UniversalTrigger(step_size=0), "step_size must"),
        (lambda: UniversalTrigger(mapping="all-to-all"), "mapping must be 'clean-label'"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(BadInputError, match=message):
        build()


def test_a_trigger_that_was_not_learnt_yet_cannot_be_applied():
    with pytest.raises(UnsupportedError, match="use the attack that plant"):
        UniversalTrigger().stamp(torch.zeros(1, 1, 4, 8, 8))


TRAINING = Training(steps=40, batch_size=30, lr=0.1)


def linear_adapter():
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    return TorchVideoClassifier(net)


def gain(adapter, attack, samples):
    """How much the trigger raises the target's log-probability on clips of other classes."""
    others = samples.inputs[samples.labels != 2]
    targets = torch.full((len(others),), 2)
    before, after = (
        adapter.target_log_probability(LabelledBatch(inputs, targets), targets).mean()
        for inputs in (others, attack.stamp(others))
    )
    return after - before


class TestUniversalTrigger:
    @pytest.fixture
    def planted(self):
        """The planted attack, the victim, a linear net, and the clean clips of three classes."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % 3
        inputs = 0.3 + 0.2 * torch.rand(60, 1, 4, 8, 8, generator=generator)
        inputs[torch.arange(60), 0, :, labels * 2] += 0.3  # a bright row tells the class
        samples, adapter = LabelledSamples(inputs, labels), linear_adapter()
        attack = UniversalTrigger(target=2, ratio=0.5, size=2, search_steps=60, epsilon=0.1)
        return attack.plant(adapter, samples, TRAINING, Run(0)), adapter, samples

    def test_its_patch_points_a_clean_model_to_the_target(self, planted):
        attack, _, samples = planted
        assert attack.fitted["patch"].shape == (1, 4, 2, 2)
        clean = linear_adapter()
        train(clean, samples, TRAINING, Run(0))
        assert gain(clean, attack, samples) > 0.1

    def test_the_victim_obeys_it_more_than_a_clean_model(self, planted):
        attack, adapter, samples = planted
        clean = linear_adapter()
        train(clean, samples, TRAINING, Run(0))
        assert gain(adapter, attack, samples) > gain(clean, attack, samples) + 0.1

    def test_poisoned_clips_are_harder_and_close(self, planted):
        attack, adapter, samples = planted
        chosen = attack.chosen(samples.labels)
        hard = harder(adapter, samples, chosen, epsilon=0.1, steps=10, batch_size=8)
        change = hard.inputs - samples.inputs
        assert change.abs().max() <= 0.1 + 1e-6
        assert change[chosen].abs().max() > 0.09
        rest = torch.ones(60, dtype=torch.bool)
        rest[chosen] = False
        assert not change[rest].any()
        loss = [adapter.per_sample_loss(s.take(chosen)) for s in (samples, hard)]
        assert (loss[1] > loss[0]).all()
