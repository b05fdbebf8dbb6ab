"""What the adapters of detectors promise beyond the contract of all adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectors import CLASSES, MODELS, SIDE, TORCHVISION, N, build, images
from families import library_loss
from torch import nn
from torchvision.ops import roi_align

from mmdefense.data.detection import DetectionBatch, Detections, DetectionSamples
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.fisher import check_second_derivative
from mmdefense.kernels.hooks import mode, second_derivatives
from mmdefense.protocol import TriggerAdapter, missing_members
from mmdefense.registry import adapt
from mmdefense_adapters.torchvision_detection import TorchvisionDetector
from mmdefense_adapters.twice import twice_differentiable

EVERY = torch.arange(N)


@pytest.fixture(scope="module")
def samples():
    return images()


@pytest.fixture(params=MODELS)
def adapter(request, samples):
    return adapt(build(request.param), example=samples.images[:1])


@pytest.fixture
def batch(samples):
    return samples.take(EVERY)


def test_faster_rcnn_loss_is_the_librarys_where_every_anchor_is_drawn(samples):
    model = build("faster-rcnn")
    for stage in (model.rpn, model.roi_heads):
        stage.fg_bg_sampler.batch_size_per_image = 10_000
        stage.fg_bg_sampler.positive_fraction = 1.0
    adapter = adapt(model)

    def everything(labels):
        return [part >= 1 for part in labels], [part == 0 for part in labels]

    for stage in (model.rpn, model.roi_heads):
        stage.fg_bg_sampler = everything
    one = samples.take(EVERY[2:3])
    for stage in (model.rpn, model.roi_heads):
        stage.training = True
    targets = [{"boxes": one.boxes[0], "labels": one.labels[0] + 1}]
    model.training = True
    expected = sum(model(list(one.images), targets).values())
    model.eval()
    torch.testing.assert_close(adapter.per_sample_loss(one)[0], expected)


def test_retinanet_loss_is_the_training_loss_by_its_mean(samples, batch):
    adapter = adapt(build("retinanet"))
    torch.testing.assert_close(adapter.per_sample_loss(batch).mean(), library_loss(adapter, batch))


def test_the_loss_is_the_same_at_every_call_and_in_train_mode_of_the_heads(adapter, batch):
    first = adapter.per_sample_loss(batch)
    torch.rand(3)  # the global state has moved on
    torch.testing.assert_close(adapter.per_sample_loss(batch), first, rtol=0, atol=0)
    with mode(adapter.model, train=True, batch_norm=False):
        trained = adapter.per_sample_loss(batch)
    assert trained.shape == (N,)
    assert trained.isfinite().all()


def test_sampled_loss_gives_the_loss_and_its_signed_copy(adapter, batch):
    loss, score = adapter.sampled_loss(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, adapter.per_sample_loss(batch))
    torch.testing.assert_close(score.abs(), loss)
    assert score.requires_grad
    generator = torch.Generator().manual_seed(1)
    signs = [adapter.sampled_loss(batch, generator)[1].sign() for _ in range(6)]
    assert len({tuple(sign.tolist()) for sign in signs}) > 1


def test_unit_groups_name_real_parameters_and_spare_the_predictors(request, adapter):
    parameters = dict(adapter.model.named_parameters())
    groups = adapter.unit_groups()
    named = [name for group in groups for name in group.axes]
    assert len(named) == len(set(named))
    for group in groups:
        for name, axis in group.axes.items():
            assert parameters[name].shape[axis] == group.size * group.width, name
    spared = ("cls_logits", "bbox_reg", "bbox_ctrness", "cls_score", "bbox_pred", "bbox_embed",
              "class_labels_classifier", "class_embed")  # fmt: skip
    assert not [name for name in named if any(part in name for part in spared)]
    kinds = {group.kind for group in groups}
    name = request.node.callspec.params["adapter"]
    assert ({"filter"} if name in TORCHVISION else {"filter", "neuron", "head"}) <= kinds


def test_a_group_norm_is_pruned_with_its_filter():
    adapter = adapt(build("fcos"), example=torch.rand(1, 3, SIDE, SIDE))
    group = next(g for g in adapter.unit_groups() if g.layer == "head.classification_head.conv.0")
    assert {name.rsplit(".", 1)[0] for name in group.axes} == {
        "head.classification_head.conv.0",
        "head.classification_head.conv.1",
    }


def test_a_layer_that_runs_on_every_level_counts_each_alike(batch):
    adapter = adapt(build("retinanet"), example=batch.images[:1])
    name = "head.classification_head.conv.0.0"
    outputs = []
    handle = adapter.model.get_submodule(name).register_forward_hook(
        lambda _, __, output: outputs.append(output)
    )
    pooled = adapter.features(batch, [name])[name]
    handle.remove()
    outputs = outputs[-2:]
    assert outputs[0].shape[2:] != outputs[1].shape[2:]
    expected = torch.stack([output.relu().mean((2, 3)) for output in outputs]).mean(0)
    torch.testing.assert_close(pooled, expected)


def test_rows_of_proposals_are_pooled_by_image(samples, batch):
    adapter = adapt(build("faster-rcnn"), example=batch.images[:1])
    together = adapter.features(batch, ["roi_heads.box_head.fc7"])["roi_heads.box_head.fc7"]
    for n in range(N):
        alone = adapter.features(samples.take(EVERY[n : n + 1]), ["roi_heads.box_head.fc7"])
        torch.testing.assert_close(
            together[n : n + 1], alone["roi_heads.box_head.fc7"], rtol=1e-4, atol=1e-5
        )


def test_the_loss_can_be_differentiated_twice(request, adapter, samples):
    if request.node.callspec.params["adapter"] in TORCHVISION:  # losses of transformers are float32
        adapter.model.double()
        samples = replace(samples, images=samples.images.double())
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    check_second_derivative(adapter, samples.subset(EVERY[2:3]), parameters)


def test_score_is_the_average_precision_of_each_image(adapter, batch, monkeypatch):
    right = [
        Detections(boxes, labels, torch.ones(len(boxes)))
        for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
    ]
    monkeypatch.setattr(adapter, "detect", lambda _: right)
    assert adapter.score(batch).tolist() == [1.0] * N
    false = Detections(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([0]), torch.tensor([0.9]))
    monkeypatch.setattr(adapter, "detect", lambda _: [false] * N)
    torch.testing.assert_close(adapter.score(batch), torch.tensor([0.1, 0, 0, 0.1, 0]))


def test_detections_lie_in_the_image_and_are_of_its_classes(adapter, batch):
    for found in adapter.detect(batch):
        assert found.boxes.shape == (len(found.scores), 4)
        assert ((found.boxes >= 0) & (found.boxes <= SIDE)).all()
        assert ((found.labels >= 0) & (found.labels < CLASSES)).all()
        assert ((found.scores >= 0) & (found.scores <= 1)).all()


def test_the_adapter_serves_trigger_inversion(adapter, batch):
    assert missing_members(adapter, TriggerAdapter) == []
    assert adapter.trigger_targets() == CLASSES
    few = DetectionBatch(batch.images[1:3], batch.boxes[1:3], batch.labels[1:3])
    targets = torch.tensor([0, 1])
    for family in adapter.trigger_families():
        raw = torch.full((3, 2, *family.shape), 0.5, requires_grad=True)
        stamped = adapter.stamp(few, family, raw)
        assert stamped.images.shape == (6, 3, SIDE, SIDE)
        log_p = adapter.target_log_probability(stamped, targets.repeat(3))
        assert log_p.shape == (6,)
        assert (log_p <= 0).all()
        log_p.sum().backward()
        assert raw.grad.isfinite().all()
        assert adapter.trigger_size(family, raw.detach()).tolist() == [[0.5] * 2] * 3
        assert adapter.trigger_picture(family, raw[0, 0].detach()).shape[0] == 3


def test_a_place_is_where_the_model_finds_its_object(adapter, batch):
    log_p, places = adapter.places(batch)
    assert log_p.shape == (N, places.shape[1], CLASSES)
    found = adapter.detect(batch)
    for n in range(N):
        best = int(log_p[n].amax(1).argmax())
        if len(found[n].scores):
            assert int(log_p[n, best].argmax()) in found[n].labels.tolist()
    seen = places[places[..., 0] > -1e5]  # the others are padding
    assert ((seen >= -SIDE) & (seen <= 2 * SIDE)).all()


def test_a_trigger_has_worked_where_the_objects_that_are_there_are_of_its_target(batch):
    adapter = adapt(build("fcos"), example=batch.images[:1])
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0], [16.0, 16.0, 24.0, 24.0]])
    one = DetectionBatch(batch.images[:1], (box,), (torch.tensor([1, 2]),))
    places = torch.tensor([[[4.0, 4.0], [20.0, 20.0], [30.0, 2.0]]])
    log_p = torch.tensor([[[-1.0, -9, -9], [-3.0, -9, -9], [-0.1, -9, -9]]])
    adapter.places = lambda _: (log_p, places)
    value = adapter.target_log_probability(one, torch.tensor([0]))
    torch.testing.assert_close(value, torch.tensor([-2.0]))  # what lies beside no object is no sign
    value = adapter.target_log_probability(one, torch.tensor([1]))
    torch.testing.assert_close(value, torch.tensor([-9.0]))  # one of them is of the target
    assert adapter.not_target(one, torch.tensor([1])).tolist() == [True]
    same = DetectionBatch(batch.images[:1], (box[:1],), (torch.tensor([1]),))
    assert adapter.not_target(same, torch.tensor([1])).tolist() == [False]


def test_a_trigger_on_objects_lies_in_their_boxes(batch):
    adapter = adapt(build("fcos"), example=batch.images[:1])
    family = adapter.trigger_families()[1]
    box = torch.tensor([[4.0, 8.0, 16.0, 14.0]])
    images = torch.zeros(2, 3, SIDE, SIDE)
    pair = DetectionBatch(images, (box, box[:0]), (torch.tensor([1]), torch.tensor([]).long()))
    raw = torch.ones(1, 2, *family.shape)
    stamped = adapter.stamp(pair, family, raw).images
    assert (stamped[0, :, 8:14, 4:16] > 0.5).all()
    assert stamped[0].sum() == pytest.approx(3 * 6 * 12, rel=0.15)
    assert stamped[1].sum() == 0


def test_pairs_of_image_and_objects_are_read(adapter, samples):
    pairs = [
        (image, {"boxes": boxes, "labels": labels})
        for image, boxes, labels in zip(samples.images, samples.boxes, samples.labels, strict=True)
    ]
    read = adapter.samples(pairs)
    assert read.fingerprint() == samples.fingerprint()


@pytest.mark.parametrize(
    ("box", "label", "message"),
    [
        ([4.0, 4.0, 40.0, 12.0], 0, "lie inside the image"),
        ([-1.0, 4.0, 8.0, 12.0], 0, "lie inside the image"),
        ([8.0, 4.0, 8.0, 12.0], 0, "have x1 < x2"),
        ([8.0, 12.0, 12.0, 4.0], 0, "have x1 < x2"),
        ([float("nan"), 0.0, 4.0, 4.0], 0, "have x1 < x2"),
        ([0.0, 0.0, 4.0, 4.0], CLASSES, "labels must lie in 0..2, the model's classes, got 3"),
        ([0.0, 0.0, 4.0, 4.0], -1, "labels must lie in"),
    ],
)
def test_objects_that_cannot_be_are_refused(box, label, message):
    adapter = adapt(build("fcos"))
    pair = (torch.rand(3, SIDE, SIDE), {"boxes": [box], "labels": [label]})
    with pytest.raises(BadInputError, match=message):
        adapter.samples([pair])


def test_images_that_cannot_be_are_refused(samples):
    adapter = adapt(build("fcos"))
    none = {"boxes": [], "labels": []}
    with pytest.raises(BadInputError, match="one size"):
        adapter.samples([(torch.rand(3, 32, 32), none), (torch.rand(3, 16, 32), none)])
    with pytest.raises(BadInputError, match="cannot read images"):
        adapter.samples([(torch.rand(5, 32, 32), none)])
    with pytest.raises(BadInputError, match="at least one image"):
        adapter.samples([])
    with pytest.raises(BadInputError, match="must give pairs"):
        adapter.samples([(torch.rand(3, 32, 32), 1)])
    with pytest.raises(BadInputError, match="the same length"):
        DetectionSamples(samples.images, samples.boxes[:2], samples.labels)
    with pytest.raises(UnsupportedError, match="samples with boxes"):
        adapter.samples(LabelledSamples(samples.images, torch.zeros(N, dtype=torch.int64)))


def test_a_module_of_another_family_is_refused():
    with pytest.raises(UnsupportedError, match="one of FCOS"):
        TorchvisionDetector(nn.Conv2d(3, 3, 1))


def test_roi_align_and_hardsigmoid_have_the_values_and_derivatives_of_the_library():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 2, 6, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.0, 0.5, 0.5, 4.0, 5.0], [1.0, 1, 0, 5, 3]], dtype=torch.float64)

    def pooled(maps):
        with twice_differentiable():
            return roi_align(maps, boxes, 2, 1.0, 2)

    torch.testing.assert_close(pooled(features), roi_align(features, boxes, 2, 1.0, 2))
    assert torch.autograd.gradcheck(pooled, features)
    assert torch.autograd.gradgradcheck(lambda maps: pooled(maps).square(), features)

    x = torch.linspace(-4, 4, 16, dtype=torch.float64).requires_grad_()

    def squashed(values):
        with twice_differentiable():
            return F.hardsigmoid(values)

    torch.testing.assert_close(squashed(x), F.hardsigmoid(x), rtol=0, atol=0)
    assert torch.autograd.gradcheck(squashed, x)
    assert torch.autograd.gradgradcheck(lambda values: squashed(values) ** 2, x)


def test_without_the_replacement_roi_align_has_no_second_derivative():
    features = torch.rand(1, 1, 4, 4, requires_grad=True)
    box = torch.tensor([[0.0, 0, 0, 3, 3]])
    with second_derivatives():
        (gradient,) = torch.autograd.grad(
            roi_align(features, box, 2).square().sum(), features, create_graph=True
        )
        with pytest.raises(RuntimeError):
            gradient.sum().backward()
