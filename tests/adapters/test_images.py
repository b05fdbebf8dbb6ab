"""What image adapters check, normalise and resize."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from condition import assert_same, condition
from models import CLASSES, MODELS, SIDE, build
from torch import nn

from mmdefense.data.labelled import LabelledBatch, LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.registry import adapt
from mmdefense_adapters.huggingface_image import HFImageClassifier
from mmdefense_adapters.huggingface_processor import class_names
from mmdefense_adapters.torch_classifier import TorchClassifier


@pytest.fixture
def images():
    return torch.rand(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.arange(6) % CLASSES


def test_the_model_chooses_its_adapter(images):
    assert type(adapt(build("small-resnet"))) is TorchClassifier
    assert type(adapt(build("hf-resnet"))) is HFImageClassifier
    assert not HFImageClassifier.accepts(build("timm-vit"))


def test_asking_the_hugging_face_adapter_does_not_load_transformers():
    code = (
        "import sys, torch\n"
        "from mmdefense_adapters.huggingface_image import HFImageClassifier as A\n"
        "assert not A.accepts(torch.nn.Linear(1, 1))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mean_and_std_are_applied_inside(images):
    model = build("small-resnet")
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    given = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    answer = adapt(model, mean=mean, std=std).logits(images)
    torch.testing.assert_close(answer, model(given))


@pytest.mark.parametrize("side", [SIDE, 11, 40])
def test_a_processor_is_followed(side):
    """Against the library's own processor, at, below and above the model's size."""
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.25, 0.3],
        resample=2,
    )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 3, side, side), generator=generator, dtype=torch.uint8)
    expected = processor(list(pixels), return_tensors="pt")["pixel_values"]
    seen = []
    model = build("hf-vit")
    model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["pixel_values"]), with_kwargs=True
    )
    adapt(model, processor=processor).logits(pixels.float() / 255)
    error = (seen[0] - expected).abs().max()
    assert error < 1.1 / 255 / 0.2  # it rounds to 8 bits in both passes of resizing, we do not


def test_a_processor_that_rescales_to_minus_one_is_followed(images):
    settings = {
        "do_rescale": True,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 1.0, 1.0],
        "image_std": [1.0, 1.0, 1.0],
        "do_resize": False,
    }
    model = build("hf-convnext")
    answer = adapt(model, processor=settings).logits(images)
    torch.testing.assert_close(answer, model(images * 2 - 1).logits)


def test_a_processor_beside_the_weights_is_followed(tmp_path, images):
    model = build("hf-convnext")
    given = adapt(model).logits(images)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": false}'
    )
    model.name_or_path = str(tmp_path)
    torch.testing.assert_close(adapt(model).logits(images), model(images * 2 - 1).logits)
    torch.testing.assert_close(adapt(model, processor={}).logits(images), given)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(BadInputError, match="must be JSON"):
        adapt(model)


def test_the_config_says_how_images_are_read():
    adapter = adapt(build("hf-vit"), processor={"size": {"height": SIDE, "width": SIDE}})
    assert adapter.reading() == {"channels": 3, "fit": adapter.fitted}
    assert adapter.fitted(torch.rand(1, 3, 20, 9)).shape == (1, 3, SIDE, SIDE)
    adapter.model.config.id2label = {2: "dog", 0: "ant", 1: "cat"}
    assert adapter.reading()["classes"] == ("ant", "cat", "dog")
    assert class_names(nn.Linear(1, 1)) == ()


def test_a_fork_keeps_scaling_and_size(images):
    settings = {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5], "image_std": [0.5]}
    adapter = HFImageClassifier(build("hf-vit"), processor=settings)
    small = images[:, :, :9, :9]
    torch.testing.assert_close(adapter.fork().logits(small), adapter.logits(small))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("small-resnet", lambda x, y: (x[:, :1], y), "cannot read images of shape"),
        ("hf-vit", lambda x, y: (x[:, :, :8, :8], y), "cannot read images of shape"),
        ("small-resnet", lambda x, y: (x, y + 1), "labels must lie in 0..3.* got 4"),
        ("small-resnet", lambda x, y: (x, y - 1), "labels must lie in 0..3.* got -1"),
        ("small-resnet", lambda x, y: (x[:0], y[:0]), "at least one sample"),
        ("small-resnet", lambda x, y: (x, y[:2]), "the same length"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line(images, labels, name, change, message):
    with pytest.raises(BadInputError, match=message) as caught:
        adapt(build(name)).samples(change(images, labels))
    assert "\n" not in str(caught.value)


def test_channels_must_match_mean_and_std(labels):
    grey = torch.rand(6, 1, SIDE, SIDE)
    with pytest.raises(BadInputError, match="for each channel of the images, got 3 for shape"):
        adapt(build("small-resnet"), mean=[0.5] * 3, std=[0.5] * 3).samples((grey, labels))


def test_refused_data_does_not_become_the_example(images, labels):
    adapter = adapt(build("small-resnet"))
    with pytest.raises(BadInputError):
        adapter.samples((images[:, :1], labels))
    adapter.samples((images, labels))
    assert adapter.chance == 1 / CLASSES


def test_a_model_that_gives_no_logits_is_unsupported(images, labels):
    with pytest.raises(UnsupportedError, match="logits"):
        adapt(nn.Conv2d(3, 4, 3)).samples((images, labels))


def test_samples_of_any_kind_are_taken(images, labels):
    adapter = adapt(build("small-resnet"))
    pairs = list(zip(images, labels.tolist(), strict=True))
    for data in (LabelledSamples(images, labels), (images, labels), pairs):
        batch = adapter.samples(data).take(torch.arange(6))
        torch.testing.assert_close(batch.inputs, images)
        assert batch.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_are_told_from_nets_with_batch_norm(name, images):
    adapter = adapt(build(name), example=images[:1])
    assert adapter.layer_norm == any(p in name for p in ("vit", "encoder", "swin", "convnext"))


@pytest.mark.parametrize("name", MODELS)
def test_every_family_of_layer_is_found(name, images):
    adapter = adapt(build(name), example=images[:1])
    kinds = {group.kind for group in adapter.unit_groups()}
    if "vit" in name or name in {"hf-swin", "transformer-encoder"}:
        assert {"head", "neuron"} <= kinds
    elif name != "torchvision-swin":
        assert "filter" in kinds


def test_a_model_in_train_mode_keeps_its_statistics(images, labels):
    adapter = adapt(build("small-resnet").train())
    before = condition(adapter.model)
    adapter.samples((images, labels))
    adapter.unit_groups()
    assert_same(before, condition(adapter.model))


def test_features_are_what_the_next_layer_reads_averaged_over_positions(images, labels):
    model = build("small-resnet")
    with torch.no_grad():
        model.bn.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        expected = model.bn(model.conv(images)).relu().mean((2, 3))
    adapter = adapt(model, example=images[:1])
    torch.testing.assert_close(
        adapter.features(LabelledBatch(images, labels), ["conv"])["conv"], expected
    )


@pytest.mark.parametrize("name", ["hf-vit", "hf-swin", "timm-vit", "torchvision-vit"])
def test_a_heads_feature_is_the_size_of_what_it_adds(images, labels, name):
    """Against the change of the block's output, head by head, when the head alone is removed."""
    adapter = adapt(build(name), example=images[:1])
    group = next(group for group in adapter.unit_groups() if group.kind == "head")
    block = adapter.model.get_submodule(group.layer.rpartition(".")[0])
    outputs = []

    def keep(_, __, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    whole = adapter.features(LabelledBatch(images, labels), [group.layer])[group.layer]
    handle = block.register_forward_hook(keep)
    for head in range(group.size):
        weight = adapter.model.get_parameter(f"{group.layer}.weight").data
        columns = slice(head * group.width, (head + 1) * group.width)
        kept = weight[:, columns].clone()
        adapter.score(LabelledBatch(images, labels))
        weight[:, columns] = 0
        adapter.score(LabelledBatch(images, labels))
        weight[:, columns] = kept
        change = (outputs[-2] - outputs[-1]).square().mean(-1).sqrt()
        torch.testing.assert_close(whole[:, head], change.reshape(len(images), -1).mean(1))
    handle.remove()


def test_finding_the_units_survives_an_exception(images, monkeypatch):
    model = build("small-resnet")
    adapter = adapt(model, example=images[:1])
    before = condition(model)
    monkeypatch.setattr(model.linear, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter.unit_groups()
    assert_same(before, condition(model))
