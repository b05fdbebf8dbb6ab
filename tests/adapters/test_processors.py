"""What adapters make of images, against the processors of ``transformers`` themselves."""

from __future__ import annotations

import json

import pytest
import torch
from models import SIDE, build
from PIL import Image
from torch import nn

from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.registry import adapt
from mmdefense_adapters.huggingface_processor import preprocessing_of

IMAGES = (
    "Beit", "Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "Levit", "MobileNetV1",
    "MobileNetV2", "MobileViT", "PPLCNet", "Perceiver", "PoolFormer", "Pvt", "Segformer", "Siglip",
    "TextNet", "ViT",
)  # fmt: skip
DETECTION = ("ConditionalDetr", "DeformableDetr", "Detr", "RTDetr", "Yolos")
BILINEAR = 2
VIDEOS = ("VideoMAE", "Timesformer", "Vivit", "VJEPA2")
SMALL = {
    "ConvNext": {"size": {"shortest_edge": 32}, "crop_pct": 0.8},
    **{key: {"size": {"shortest_edge": 40, "longest_edge": 60}} for key in DETECTION},
    "RTDetr": {"size": {"height": 40, "width": 40}},
    "TextNet": {"size": {"shortest_edge": 64}},
}


def image(height=61, width=94):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, height, width), generator=generator, dtype=torch.uint8)


def errors(found, pixels, expected):
    """Return the errors of images read as uint8 and of those on the device, in levels of 255."""
    mean, std = (torch.tensor(row)[:, None, None] for row in (found.mean, found.std))
    read = found.fitted(pixels)
    assert read.dtype == torch.uint8
    both = []
    for fitted in (read / 255, found.fitted(pixels / 255)):
        ours = found.ordered((fitted - mean) / std)
        assert ours.shape == expected.shape
        both.append((ours - expected).abs() * min(found.std) * 255)
    return both


@pytest.mark.parametrize("name", [*IMAGES, *DETECTION])
def test_image_processors_are_followed(name):
    """To the bit where images are read; within rounding on the device, bicubic on the average."""
    import transformers

    processor = getattr(transformers, f"{name}ImageProcessor")(**SMALL.get(name, {}))
    found = preprocessing_of(processor, nn.Identity())
    for pixels in (image(), image(94, 61)):
        expected = processor(pixels, return_tensors="pt")["pixel_values"]
        read, computed = errors(found, pixels, expected)
        assert read.max() < 1e-3
        assert computed.max() < (1.1 if processor.resample == BILINEAR else 25)
        assert computed.mean() < 0.4


@pytest.mark.parametrize("name", VIDEOS)
def test_video_processors_are_followed(name):
    import transformers

    if not hasattr(transformers, f"{name}VideoProcessor"):
        pytest.skip(f"transformers {transformers.__version__} has no video processor of {name}")
    processor = getattr(transformers, f"{name}VideoProcessor")()
    found = preprocessing_of(processor, nn.Identity(), is_video=True)
    frames = image().repeat(3, 1, 1, 1)
    given = processor([frames], return_tensors="pt", do_sample_frames=False)
    expected = next(iter(given.values()))[0]
    read, computed = errors(found, frames, expected)
    assert read.max() < 1e-3
    assert computed.max() < 1.1


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 24, 24), (3, 24, 32)])
def test_transforms_of_timm_are_followed(mode, size):
    from sklearn.datasets import load_sample_image
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import (
        TimmWrapperImageProcessor as Processor,
    )

    settings = {"input_size": size, "crop_mode": mode, "crop_pct": 0.8, "interpolation": "bicubic",
                "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}  # fmt: skip
    processor = Processor(pretrained_cfg=settings)
    found = preprocessing_of(processor, nn.Identity())
    assert (found.mean, found.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    photograph = load_sample_image("china.jpg")
    expected = processor(Image.fromarray(photograph))["pixel_values"]
    pixels = torch.from_numpy(photograph.copy()).movedim(-1, 0)[None]
    for error in errors(found, pixels, expected):
        assert error.max() < 2.1  # Pillow's pixels are not torchvision's


def test_the_geometry_is_differentiable():
    from transformers import ConvNextImageProcessor

    found = preprocessing_of(ConvNextImageProcessor(**SMALL["ConvNext"]), nn.Identity())
    images = torch.rand(2, 3, 40, 60, requires_grad=True)
    found.fitted(images).sum().backward()
    assert (images.grad[:, :, 10:30, 20:40] != 0).all()
    assert (images.grad[:, :, :, :2] == 0).all()  # cut off
    assert found.fitted(images.double()).dtype == torch.float64


def test_images_of_the_delivered_size_are_left_as_they_are():
    from transformers import ConvNextImageProcessor

    found = preprocessing_of(ConvNextImageProcessor(**SMALL["ConvNext"]), nn.Identity())
    images = torch.rand(2, 3, 32, 32)
    assert found.fitted(images) is images


def test_blue_comes_first_where_the_processor_flips_channels():
    model = build("hf-convnext")
    images = torch.rand(2, 3, SIDE, SIDE)
    settings = {"image_processor_type": "MobileViTImageProcessor", "do_resize": False,
                "do_center_crop": False}  # fmt: skip
    answer = adapt(model, processor=settings).logits(images)
    torch.testing.assert_close(answer, model(images.flip(1)).logits)


def beside(folder, content):
    """Return a ViT that was loaded from a folder with such a processor file."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "preprocessor_config.json").write_text(text)
    model = build("hf-vit")
    model.name_or_path = str(folder)
    return model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ([], "must be a JSON object, got list"),
        ({"size": {"longest_edge": 32}}, "'size' of .*preprocessor_config.json"),
        ({"size": {"foo": 3}}, "'size' of .*keys"),
        ({"size": "big"}, "size must be"),
        ({"size": 0}, "size must be"),
        ({"image_mean": [0.5, 0.5], "size": 32}, "'image_mean' of"),
        ({"image_std": [0, 0, 0]}, "'image_std' of .*not finite"),
        ({"resample": 77}, "'resample' of"),
        ({"rescale_factor": "a"}, "rescale_factor must be a number"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, content, message):
    with pytest.raises(BadInputError, match=message) as error:
        adapt(beside(tmp_path, content))
    assert "\n" not in str(error.value)
    assert "preprocessor_config.json" in str(error.value)


def test_a_processor_of_its_own_code_is_not_run(tmp_path):
    settings = {
        "image_processor_type": "MineImageProcessor",
        "auto_map": {"AutoImageProcessor": "mine.MineImageProcessor"},
    }
    (tmp_path / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(UnsupportedError, match="names MineImageProcessor, which transformers does"):
        adapt(beside(tmp_path, settings))


def test_a_processor_that_makes_no_images_is_not_followed():
    from transformers import Siglip2ImageProcessor

    with pytest.raises(UnsupportedError, match="must make images"):
        preprocessing_of(Siglip2ImageProcessor(), nn.Identity())


def test_a_processor_of_pillow_is_taken_as_that_of_tensors():
    from transformers import ViTImageProcessorPil

    found = preprocessing_of(ViTImageProcessorPil(size=32, image_mean=0.4), build("hf-vit"))
    assert (found.size, found.mean) == ((32, 32), (0.4, 0.4, 0.4))
