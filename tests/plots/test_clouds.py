"""The geometry of point clouds, against what it must leave alone."""

from __future__ import annotations

import math

import pytest
import torch

from mmdefense.data import clouds as c
from mmdefense.errors import BadInputError
from mmdefense.plots.clouds import render_clouds


def drawn(count=3, points=20, features=5, seed=0):
    return torch.randn(count, points, features, generator=torch.Generator().manual_seed(seed))


def seeded():
    return torch.Generator().manual_seed(1)


def test_the_unit_sphere_is_centred_and_keeps_features():
    clouds = drawn() * 7 + 3
    unit = c.to_unit_sphere(clouds)
    torch.testing.assert_close(unit[..., :3].mean(1), torch.zeros(3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(unit[..., :3].norm(dim=2).amax(1), torch.ones(3))
    assert torch.equal(unit[..., 3:], clouds[..., 3:])


def test_a_rotation_about_z_turns_x_to_y():
    matrix = c.rotations(torch.tensor([0.0, 0.0, math.pi / 2]))
    x = torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(x @ matrix.mT, torch.tensor([[0.0, 1.0, 0.0]]), atol=1e-6, rtol=0)


def test_rotations_keep_lengths_and_compose_as_documented():
    angles = torch.tensor([0.3, -0.7, 1.1])
    matrix = c.rotations(angles)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(3), atol=1e-6, rtol=0)
    alone = [c.rotations(torch.diag(angles)[axis]) for axis in range(3)]
    torch.testing.assert_close(matrix, alone[2] @ alone[1] @ alone[0])
    many = c.turned(drawn(), angles.expand(3, 3))
    torch.testing.assert_close(many, c.turned(drawn(), angles))
    torch.testing.assert_close(many[..., :3].norm(dim=2), drawn()[..., :3].norm(dim=2))


def test_inserted_points_take_the_place_of_those_named_and_keep_their_features():
    clouds, cluster = drawn(), drawn(3, 4, 3, seed=2)
    places = torch.tensor([[0, 5, 7, 19]] * 3)
    changed = c.inserted(clouds, cluster, places)
    assert torch.equal(changed[:, places[0], :3], cluster)
    assert torch.equal(changed[..., 3:], clouds[..., 3:])
    rest = [p for p in range(20) if p not in places[0]]
    assert torch.equal(changed[:, rest], clouds[:, rest])


def test_farthest_points_are_those_of_a_plain_loop():
    points = drawn(2, 30, 3)
    chosen = c.farthest_points(points, 6)
    for cloud, mine in zip(points, chosen, strict=True):
        expected = [int((cloud - cloud.mean(0)).norm(dim=1).argmax())]
        while len(expected) < 6:
            gaps = torch.cdist(cloud, cloud[expected]).amin(1)
            expected.append(int(gaps.argmax()))
        assert mine.tolist() == expected


def test_nearest_points_are_sorted_by_distance():
    points, centers = drawn(2, 30, 3), drawn(2, 4, 3, seed=3)
    near = c.nearest_points(points, centers, 5)
    assert torch.equal(near, torch.cdist(centers, points).argsort(2)[..., :5])


@pytest.mark.parametrize("alter", [c.random_cloud_view, c.random_jitter])
def test_random_alterations_depend_on_their_generator_alone(alter):
    clouds = c.to_unit_sphere(drawn(40, 32))
    before = clouds.clone()
    first = alter(clouds, seeded())
    torch.rand(3)
    assert torch.equal(alter(clouds, seeded()), first)
    assert torch.equal(clouds, before)
    assert first.shape == clouds.shape
    assert first.isfinite().all()
    assert first[..., :3].norm(dim=2).max() < 2
    assert not torch.equal(first, clouds)


def test_a_view_keeps_its_share_of_clouds_and_carries_features_along():
    clouds = c.to_unit_sphere(drawn(400, 16))
    viewed = c.random_cloud_view(clouds, seeded(), keep=0.5)
    same = (viewed == clouds).flatten(1).all(1).float().mean()
    assert 0.4 < same < 0.6
    known = clouds[0, :, 3]
    moved = c.random_cloud_view(clouds[:1], seeded(), keep=0.0, erase=1.0)
    assert all((value == known).any() for value in moved[0, :, 3])


def test_a_view_without_change_is_the_cloud():
    clouds = c.to_unit_sphere(drawn())
    still = c.random_cloud_view(
        clouds, seeded(), degrees=0, scale=0, jitter=0, thin=0, erase=0, keep=0
    )
    torch.testing.assert_close(still, clouds)


@pytest.mark.parametrize(
    ("clouds", "message"),
    [
        (torch.zeros(2, 5), "of shape"),
        (torch.zeros(2, 5, 2), "of shape"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), "floating-point"),
        (torch.zeros(2, 0, 3), "at least one point"),
        (torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, math.nan, 0.0]]]), "NaN.*first in cloud 1"),
    ],
)
def test_what_is_no_cloud_is_refused(clouds, message):
    with pytest.raises(BadInputError, match=message):
        c.check_clouds(clouds)


def test_a_picture_shows_near_points_over_far_ones_and_marks_in_orange():
    cloud = torch.tensor([[[0.0, 0.5, 0.0], [0.0, -0.5, 0.0]]])
    marked = torch.tensor([[False, True]])
    front = render_clouds(cloud, marked, size=33, azimuth=0, elevation=0, radius=0.1)[0]
    assert front.shape == (3, 33, 33)
    assert front[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    red, _, blue = front[:, 16, 16]
    assert red > blue
    behind = render_clouds(cloud, marked, size=33, azimuth=180, elevation=0, radius=0.1)[0]
    assert behind[2, 16, 16] > behind[0, 16, 16]
    above = render_clouds(cloud, marked, size=33, azimuth=0, elevation=90, radius=0.1)[0]
    assert (above.flatten(1).amin(1) < 0.9).all()
