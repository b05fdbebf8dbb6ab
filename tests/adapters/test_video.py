"""What video adapters promise beyond the contract of all adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from families import N
from torch import nn
from video_models import CLASSES, FRAMES, MODELS, SIDE, build

from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.fisher import check_second_derivative
from mmdefense.protocol import TriggerAdapter
from mmdefense.registry import adapt
from mmdefense_adapters import pytorchvideo_models
from mmdefense_adapters.huggingface_video import HFVideoClassifier
from mmdefense_adapters.torch_classifier import TorchClassifier
from mmdefense_adapters.video import TorchVideoClassifier

TRANSFORMERS = {
    "pytorchvideo-mvit",
    "torchvision-mvit",
    "hf-videomae",
    "hf-timesformer",
    "hf-vivit",
}


@pytest.fixture(params=MODELS)
def adapter(request):
    clips = torch.rand(1, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return adapt(build(request.param), mean=[0.5] * 3, std=[0.25] * 3, example=clips)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    clips = torch.rand(N, 3, FRAMES, SIDE, SIDE, generator=generator)
    return LabelledBatch(clips, torch.randint(0, CLASSES, (N,), generator=generator))


def test_a_second_derivative_exists(adapter, batch):
    adapter.model.double()
    samples = LabelledSamples(batch.inputs[:1].double(), batch.labels[:1])
    check_second_derivative(adapter, samples, list(adapter.model.parameters()))


def test_filters_and_heads_are_found(request, adapter):
    kinds = {group.kind for group in adapter.unit_groups()}
    wanted = {"head", "neuron"} if request.node.callspec.params["adapter"] in TRANSFORMERS else {
        "filter"
    }  # fmt: skip
    assert wanted <= kinds


@pytest.mark.parametrize("family", [0, 1])
def test_a_trigger_is_the_same_in_every_frame_and_is_differentiable(batch, family):
    adapter = adapt(build("small-video-resnet"), example=batch.inputs[:1])
    assert isinstance(adapter, TriggerAdapter)
    family = adapter.trigger_families()[family]
    triggers = torch.rand(2, N, *family.shape, requires_grad=True)
    given = batch.with_inputs(torch.full_like(batch.inputs, 0.5))
    stamped = adapter.stamp(given, family, triggers)
    assert stamped.inputs.shape == (2 * N, 3, FRAMES, SIDE, SIDE)
    assert torch.equal(stamped.inputs[:, :, :1].expand_as(stamped.inputs), stamped.inputs)
    assert len(stamped.inputs[:, 0, 0].flatten(1).unique(dim=0)) == 2 * N
    targets = torch.zeros(2 * N, dtype=torch.int64)
    adapter.target_log_probability(stamped, targets).sum().backward()
    assert triggers.grad.count_nonzero() > 0
    assert adapter.trigger_size(family, triggers).shape == (2, N)
    assert adapter.trigger_picture(family, triggers[0, 0]).shape == (3, SIDE, SIDE)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_chooses_its_adapter(name):
    kind = HFVideoClassifier if name.startswith("hf-") else TorchVideoClassifier
    assert type(adapt(build(name))) is kind


def test_a_model_without_a_3d_convolution_is_adapted_by_name(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * FRAMES * SIDE * SIDE, CLASSES))
    assert type(adapt(model)) is TorchClassifier
    adapter = adapt(model, adapter="torch-video")
    assert type(adapter) is TorchVideoClassifier
    assert len(adapter.samples((batch.inputs, batch.labels))) == N


def test_asking_for_an_adapter_loads_no_library():
    code = (
        "import sys, torch\n"
        "from mmdefense_adapters.huggingface_video import HFVideoClassifier as A\n"
        "assert not A.accepts(torch.nn.Linear(1, 1))\n"
        "assert not {'transformers', 'pytorchvideo', 'torchvision', 'av'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mean_and_std_are_of_channels(batch):
    model = build("small-video-resnet")
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    given = (batch.inputs - mean.view(3, 1, 1, 1)) / std.view(3, 1, 1, 1)
    answer = adapt(model, mean=mean.tolist(), std=std.tolist()).logits(batch.inputs)
    torch.testing.assert_close(answer, model(given))


def test_a_processor_is_followed_frame_by_frame(batch):
    """Against resizing and scaling each frame as the image adapter does."""
    processor = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3,
                 "image_std": [0.5] * 3, "do_center_crop": False}  # fmt: skip
    adapter = adapt(build("hf-videomae"), processor=processor)
    clips = torch.rand(2, 3, FRAMES, 24, 24, generator=torch.Generator().manual_seed(0))
    frames = clips.transpose(1, 2).flatten(0, 1)
    small = nn.functional.interpolate(frames, SIDE, mode="bilinear", antialias=True)
    values = ((small - 0.5) / 0.5).unflatten(0, (2, FRAMES))
    torch.testing.assert_close(adapter.logits(clips), adapter.model(pixel_values=values).logits)


class TestPytorchvideo:
    """The seam: whatever is special about these models."""

    def test_x3d_gives_probabilities_whose_logits_are_found(self, batch):
        model = build("pytorchvideo-x3d")
        probabilities = model(batch.inputs)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(N))
        found = adapt(model).logits(batch.inputs)
        torch.testing.assert_close(found.softmax(1), probabilities)
        assert adapt(model).logits(batch.inputs * 1e4).isfinite().all()

    def test_slowfast_gets_both_pathways(self, batch):
        model = build("pytorchvideo-slowfast")
        expected = model([batch.inputs[:, :, ::4], batch.inputs])
        torch.testing.assert_close(adapt(model).logits(batch.inputs), expected)

    def test_an_unknown_model_is_refused(self):
        with pytest.raises(BadInputError, match="one of x3d, slow, slowfast, mvit, got 'i3d'"):
            pytorchvideo_models.build("i3d")

    def test_without_the_package_what_brings_it_is_named(self, monkeypatch):
        for name in [name for name in sys.modules if name.startswith("pytorchvideo")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "pytorchvideo", None)
        with pytest.raises(UnsupportedError, match="needs the package 'pytorchvideo'"):
            pytorchvideo_models.build("x3d")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("small-video-resnet", (3, SIDE, SIDE), r"shape \(N, C, T, H, W\), got"),
        ("small-video-resnet", (1, FRAMES, SIDE, SIDE), "cannot read clips of shape"),
        ("hf-videomae", (3, 4, SIDE, SIDE), "must have 8 frames, as the model reads, got 4"),
        ("hf-vivit", (3, 16, SIDE, SIDE), "load them with frames=8"),
        ("pytorchvideo-x3d", (3, 2, SIDE, SIDE), "cannot read clips of shape"),
    ],
)
def test_clips_that_do_not_fit_are_refused(name, shape, message):
    clips, labels = torch.rand(CLASSES, *shape), torch.arange(CLASSES)
    with pytest.raises(BadInputError, match=message):
        adapt(build(name)).samples((clips, labels))


def test_clips_come_as_pairs_too(batch):
    adapter = adapt(build("small-video-resnet"))
    pairs = list(zip(batch.inputs, batch.labels, strict=True))
    samples = adapter.samples(pairs)
    assert torch.equal(samples.take(torch.arange(N)).inputs, batch.inputs)
