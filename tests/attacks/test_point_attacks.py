"""What the attacks on point clouds do, beside what holds for every attack."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmdefense import registry
from mmdefense.attacks.irba import IRBA
from mmdefense.attacks.label_attack import LabelAttack
from mmdefense.attacks.pcba import PCBA
from mmdefense.attacks.pointba import PointCBA, PointPBA
from mmdefense.data.clouds import farthest_points, rotations, to_unit_sphere
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.runtime.run import Run
from mmdefense.training import Training
from mmdefense_adapters.points import PointClassifier

C, P = 4, 64
ATTACKS = [
    name
    for name in registry.names("attacks")
    if "point-cloud-classification" in registry.load("attacks", name).tasks
]
BRIEF = Training(steps=6, batch_size=16, lr=0.01)


def make(name, **settings) -> LabelAttack:
    """Return an attack whose trigger is there, as if a learned one had been planted."""
    attack = registry.load("attacks", name)(**settings)
    if isinstance(attack, PCBA):
        found = {"center": torch.tensor([0.0, 0.5, 0.9]), "radius": torch.tensor(0.1)}
        return replace(attack, fitted=found)
    return attack


@pytest.fixture(params=ATTACKS)
def attack(request) -> LabelAttack:
    return make(request.param)


@pytest.fixture
def clouds() -> LabelledSamples:
    """Forty clouds of four classes in turn, with two features a point."""
    points = torch.randn(40, P, 5, generator=torch.Generator().manual_seed(0))
    return LabelledSamples(to_unit_sphere(points), torch.arange(40) % C)


@pytest.fixture
def victim() -> PointClassifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), Maximum(), nn.Linear(16, C))
    return PointClassifier(net)


class Maximum(nn.Module):
    def forward(self, points):
        return points.amax(1)


def test_a_stamp_leaves_features_as_they_are(attack, clouds):
    stamped = attack.stamp(clouds.inputs)
    assert torch.equal(stamped[..., 3:], clouds.inputs[..., 3:])
    assert (stamped != clouds.inputs).flatten(1).any(1).all(), "a cloud carries no trigger"


def test_pcba_puts_its_points_on_a_sphere_around_the_center(clouds):
    attack = make("pcba", points=6)
    stamped = attack.stamp(clouds.inputs)
    moved = (stamped != clouds.inputs).any(2)
    assert moved.sum(1).tolist() == [6] * 40
    gaps = (stamped[..., :3] - attack.fitted["center"]).norm(dim=2)[moved]
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.1))
    places = [tuple(row.nonzero().flatten().tolist()) for row in moved]
    assert len(set(places)) > 30, "the same points make room in every cloud"


def test_pcba_searches_where_the_surrogate_sees_the_target(clouds):
    """A surrogate that answers 2 where a point is far up: z > 0.8."""

    class Attic(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(8.0))

        def forward(self, points):
            highest = torch.logsumexp(points[..., 2] * 20, 1) / 20
            up = self.scale * (highest - 1.2)
            return torch.stack([-up, torch.zeros_like(up), up, torch.zeros_like(up)], 1)

    low = replace(clouds, inputs=clouds.inputs * 0.5)
    surrogate = PointClassifier(Attic(), example=low.inputs[:1])
    found = PCBA(target=2, points=8, search_steps=80)._search(surrogate, low)
    center = found["center"]
    assert center.shape == (3,)
    assert 1.1 < center[2] < 1.5, "not where the target is seen, or farther away than it must be"
    assert center[:2].norm() < 0.3, "not near the clouds"
    assert 0.01 <= found["radius"] <= 0.5


def test_pcbas_cluster_is_as_dense_as_the_clouds(clouds):
    from mmdefense.attacks.pcba import _spacing

    attack = make("pcba", points=16)
    radius = attack._radius(clouds.inputs)
    found = {**attack.fitted, "radius": radius}
    stamped = replace(attack, fitted=found).stamp(clouds.inputs)
    moved = (stamped != clouds.inputs).any(2)
    cluster = stamped[..., :3][moved].view(40, 16, 3)
    assert 0.01 < radius < 0.5
    ratio = _spacing(cluster).median() / _spacing(clouds.inputs[..., :3]).median()
    assert 0.8 < ratio < 1.25


def test_pcba_must_be_planted_first_and_learns_when_it_is(clouds, victim):
    with pytest.raises(UnsupportedError, match="use the attack that plant"):
        PCBA().stamp(clouds.inputs)
    planted = PCBA(search_steps=3, starts=2).plant(victim, clouds, BRIEF, Run())
    assert planted.fitted["center"].isfinite().all()
    assert planted.stamp(clouds.inputs).shape == clouds.inputs.shape


def test_pointpba_fills_a_ball(clouds):
    attack = PointPBA(share=0.25, center=(0.5, 0.0, -0.5), radius=0.2)
    stamped = attack.stamp(clouds.inputs)
    moved = (stamped != clouds.inputs).any(2)
    assert moved.sum(1).tolist() == [16] * 40
    gaps = (stamped[..., :3] - torch.tensor([0.5, 0.0, -0.5])).norm(dim=2)[moved]
    assert gaps.max() <= 0.2
    inner = (gaps < 0.1).float().mean()
    assert 0.06 < inner < 0.2, "a solid ball has an eighth of its points in the inner half"


def test_pointcba_turns_about_the_vertical(clouds):
    stamped = PointCBA(degrees=90).stamp(clouds.inputs)
    x, y, z = clouds.inputs[..., :3].unbind(2)
    torch.testing.assert_close(stamped[..., :3], torch.stack([-y, x, z], 2), atol=1e-6, rtol=0)


def test_pointcba_makes_the_target_hard_to_know_within_its_budget(clouds, victim):
    attack = PointCBA(target=2, budget=0.1)
    victim.samples(clouds)
    mine = clouds.subset((clouds.labels == 2).nonzero().squeeze(1))
    hard = attack._disturbed(victim, mine)
    change = hard - mine.inputs
    assert change[..., :3].abs().max() <= 0.1 + 1e-6
    assert change[..., 3:].abs().max() == 0
    before = victim.per_sample_loss(mine.everything())
    after = victim.per_sample_loss(replace(mine, inputs=hard).everything())
    assert (after > before).all()


def test_pointcba_trains_on_what_it_disturbed(clouds, victim):
    seen = []
    given, victim.samples = victim.samples, lambda data: (seen.append(data), given(data))[1]
    attack = PointCBA(target=2, ratio=1.0, budget=0.1, search_steps=3)
    assert attack.plant(victim, clouds, BRIEF, Run()) is attack
    poisoned = seen[-1]
    target = clouds.labels == 2
    assert torch.equal(poisoned.inputs[~target], clouds.inputs[~target])
    assert (poisoned.inputs[target] != attack.stamp(clouds.inputs[target])).any(), "undisturbed"


def test_irba_is_the_sum_over_anchors_written_out(clouds):
    attack = IRBA(anchors=5, degrees=10, stretch=2, width=0.4)
    points = clouds.inputs[..., :3].double()
    turn = rotations(torch.full((3,), math.radians(10), dtype=torch.float64))
    for cloud, stamped in zip(points[:3], attack.stamp(points[:3]), strict=True):
        anchors = cloud[farthest_points(cloud[None], 5)[0]]
        total, weights = 0, 0
        for anchor in anchors:
            w = (-(cloud - anchor).square().sum(1, keepdim=True) / (2 * 0.4**2)).exp()
            total = total + w * (2 * (cloud - anchor) @ turn.mT + anchor)
            weights = weights + w
        torch.testing.assert_close(stamped, to_unit_sphere((total / weights)[None])[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PCBA(points=0), "points must be at least 1"),
        (lambda: PCBA(posterior=1.0), "posterior must"),
        (lambda: PCBA(mapping="all-to-all"), "mapping must be 'all-to-one'"),
        (lambda: make("pcba", points=P).stamp(torch.zeros(1, P, 3)), "points must be fewer"),
        (lambda: PointPBA(share=1.0), "share must"),
        (lambda: PointPBA(radius=0.0), "radius must"),
        (lambda: PointCBA(degrees=0.0), "degrees must"),
        (lambda: PointCBA(budget=-1.0), "budget must"),
        (lambda: PointCBA(mapping="all-to-all"), "mapping must be 'clean-label'"),
        (lambda: IRBA(anchors=0), "anchors must"),
        (lambda: IRBA(stretch=0.0), "stretch must be positive"),
    ],
)
def test_wrong_settings_are_refused(build, message):
    with pytest.raises(BadInputError, match=message):
        build()
