"""What the adapter of point clouds promises beyond the contract of all adapters."""

from __future__ import annotations

import pytest
import torch
from cloud_models import CLASSES, MODELS, ChannelsFirst, build, clouds_for
from cloud_models import POINTS as P
from families import N
from torch import nn

from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.fisher import check_second_derivative
from mmdefense.kernels.hooks import mode
from mmdefense.protocol import HeadAdapter, TriggerAdapter
from mmdefense.registry import adapt
from mmdefense_adapters.points import PointClassifier


@pytest.fixture(params=MODELS)
def adapter(request):
    model = build(request.param)
    options = {"channels_first": True} if request.param == "channels-first" else {}
    return adapt(model, adapter="points", example=clouds_for(model, 1, seed=1), **options)


@pytest.fixture
def batch(adapter):
    labels = torch.arange(N) % CLASSES
    return LabelledBatch(clouds_for(adapter.model, N), labels)


def test_it_has_every_ability(adapter):
    assert isinstance(adapter, PointClassifier)
    assert isinstance(adapter, TriggerAdapter)
    assert isinstance(adapter, HeadAdapter)
    assert adapter.chance == 1 / CLASSES


def test_the_order_of_the_points_says_nothing(adapter, batch):
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    answer = adapter.logits(batch.inputs[:, order])
    torch.testing.assert_close(answer, adapter.logits(batch.inputs), rtol=1e-4, atol=1e-5)


def test_shared_channels_carry_their_batch_norm():
    adapter = adapt(build("pointnet"), example=torch.randn(1, P, 3))
    (group,) = [g for g in adapter.unit_groups() if g.layer == "late.layers.1"]
    assert list(group.axes) == ["late.layers.1.weight", "late.norms.1.weight", "late.norms.1.bias"]


def test_a_transformers_heads_are_units():
    adapter = adapt(build("point-transformer"), example=torch.randn(1, P, 4))
    heads = [group for group in adapter.unit_groups() if group.kind == "head"]
    assert [(group.size, group.width) for group in heads] == [(2, 4), (2, 4)]


def test_there_is_a_second_derivative_in_double_precision(adapter, batch):
    adapter.model.double()
    samples = LabelledSamples(batch.inputs.double(), batch.labels)
    check_second_derivative(adapter, samples, list(adapter.model.parameters()))


@pytest.mark.parametrize("name", ["cluster", "rotation"])
def test_a_trigger_is_applied_to_each_copy_and_has_a_gradient(adapter, batch, name):
    family = next(f for f in adapter.trigger_families() if f.name == name)
    raw = torch.rand(2, N, *family.shape, generator=torch.Generator().manual_seed(0))
    raw.requires_grad_()
    before = batch.inputs.clone()
    stamped = adapter.stamp(batch, family, raw)
    assert stamped.inputs.shape == (2 * N, *batch.inputs.shape[1:])
    assert torch.equal(stamped.labels, batch.labels.repeat(2))
    assert torch.equal(batch.inputs, before)
    assert torch.equal(stamped.inputs[..., 3:], batch.inputs[..., 3:].repeat(2, 1, 1))
    alone = adapter.stamp(batch, family, raw[1:])
    torch.testing.assert_close(stamped.inputs[N:], alone.inputs)
    with mode(adapter.model, train=False):
        log_p = adapter.target_log_probability(stamped, torch.zeros(2 * N, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(log_p.sum(), raw)
    assert gradient.abs().sum() > 0
    assert adapter.trigger_size(family, raw).shape == (2, N)
    picture = adapter.trigger_picture(family, raw[0, 0].detach())
    assert picture.ndim == 3
    assert picture.shape[0] == 3
    assert 0 <= picture.min() < picture.max() <= 1


def test_a_cluster_lies_where_its_raw_form_says(adapter, batch):
    family = adapter.trigger_families()[0]
    raw = torch.full((1, N, *family.shape), 0.5)
    raw[..., 0, 0] = 1.0
    stamped = adapter.stamp(batch, family, raw).inputs
    gaps = (stamped[..., :3] - torch.tensor([1.2, 0.0, 0.0])).norm(dim=2)
    there = (gaps < 2e-3).sum(1)
    assert there.tolist() == [family.shape[0] - 1] * N


def test_a_rotation_of_the_middle_leaves_the_cloud(adapter, batch):
    family = adapter.trigger_families()[1]
    half = torch.full((1, N, 3), 0.5)
    torch.testing.assert_close(adapter.stamp(batch, family, half).inputs, batch.inputs)
    assert adapter.trigger_size(family, half).sum() == 0


def test_only_models_that_say_so_are_recognised():
    assert PointClassifier.accepts(build("pointnet"))
    assert not PointClassifier.accepts(ChannelsFirst())
    assert isinstance(adapt(build("dgcnn")), PointClassifier)


def test_plain_tensors_pairs_and_batches_become_samples():
    adapter = adapt(build("pointnet"))
    clouds, labels = torch.randn(8, P, 3), torch.arange(8) % CLASSES
    from_pairs = adapter.samples(list(zip(clouds, labels, strict=True)))
    from_batches = adapter.samples([LabelledBatch(clouds[:4], labels[:4])] * 2)
    for samples in (adapter.samples((clouds, labels)), from_pairs, from_batches):
        assert len(samples) == 8
        assert samples.augmentation is None


@pytest.mark.parametrize(
    ("clouds", "message"),
    [
        (torch.randn(8, P, 5), "clouds must have 3 values per point"),
        (torch.randn(8, P), "of shape"),
        (torch.randn(8, 0, 3), "at least one point"),
        (torch.full((8, P, 3), float("nan")), "NaN or infinity in 8 of 8"),
    ],
)
def test_clouds_that_do_not_fit_are_refused(clouds, message):
    with pytest.raises(BadInputError, match=message):
        adapt(build("pointnet")).samples((clouds, torch.arange(8) % CLASSES))


def test_other_features_than_before_are_refused_of_any_model():
    adapter = PointClassifier(ChannelsFirst(), channels_first=True, example=torch.randn(1, P, 3))
    with pytest.raises(BadInputError, match="3 values per point, as those seen before, got 6"):
        adapter.samples((torch.randn(8, P, 6), torch.arange(8) % CLASSES))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "at least one sample .clouds., got none"),
        ([3], "pairs"),
        ([(torch.randn(5, 3), 0), (torch.randn(6, 3), 1)], "must have one shape"),
        ((torch.randn(8, P, 3), torch.full((8,), CLASSES)), "labels must lie in 0..3"),
    ],
)
def test_data_that_is_no_set_of_clouds_is_refused(data, message):
    with pytest.raises(BadInputError, match=message):
        adapt(build("pointnet")).samples(data)


def test_a_model_of_every_point_is_refused():
    dense = nn.Linear(3, CLASSES)
    with pytest.raises(UnsupportedError, match="logits \\(N, K\\)"):
        PointClassifier(dense).samples((torch.randn(8, P, 3), torch.arange(8) % CLASSES))
