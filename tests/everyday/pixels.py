"""Preprocessing that the model states, 16-bit and turned images, any number of channels."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from everyday.rows import Command, Refused, Row
from PIL import Image

from mmdefense.pipeline.sources import Source
from mmdefense.plots.images import ImageRow
from mmdefense_tasks.image_classification import load_data
from mmdefense_tasks.video_classification import load_clips

SIDE, CLASSES = 16, ("ant", "bee")
WIDE, UNEVEN = ((36, 96),) * 2, ((36, 96), (40, 30))  # heights and widths in pixels
SQUARE = ((SIDE, SIDE),) * 2
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 5), dtype=np.uint8)


def write_model(folder: Path, settings: object = None, channels: int = 3) -> Path:
    """Write a tiny ResNet of ``transformers``, which reads any size, beside a processor file."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=channels, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic",
        id2label=dict(enumerate(CLASSES)),
    )  # fmt: skip
    torch.manual_seed(0)
    ResNetForImageClassification(config).save_pretrained(folder / "model")
    if settings is not None:
        (folder / "model/preprocessor_config.json").write_text(json.dumps(settings))
    return folder / "model"


def write_timm(folder: Path) -> Path:
    """Write a folder as timm does, with ``pretrained_cfg`` in its config."""
    from safetensors.torch import save_file
    from timm import create_model

    torch.manual_seed(0)
    model = create_model("test_resnet", num_classes=2)
    (folder / "model").mkdir()
    save_file(model.state_dict(), folder / "model/model.safetensors")
    config = {
        "architecture": "test_resnet",
        "num_classes": 2,
        "label_names": list(CLASSES),
        "pretrained_cfg": {
            "input_size": [3, SIDE, SIDE],
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.25, 0.3],
            "crop_pct": 0.8,
            "interpolation": "bicubic",
            "num_classes": 2,
        },
    }
    (folder / "model/config.json").write_text(json.dumps(config))
    return folder / "model"


def write_images(folder: Path, sizes=SQUARE) -> Path:
    """Write one image a class, of these heights and widths."""
    for name, pixels, (height, width) in zip(CLASSES, IMAGES, sizes, strict=True):
        place = folder / "images" / name
        place.mkdir(parents=True)
        Image.fromarray(pixels[:height, :width, :3].copy()).save(place / "0.png")
    return folder / "images"


def opened(model: Path, data: Path):
    return Source(model=str(model), data=str(data)).open().prepare(to_learn=False)


def seen(adapter, samples) -> torch.Tensor:
    """Return the pixel values that the model itself gets."""
    values = []
    hook = adapter.model.register_forward_pre_hook(
        lambda _, __, named: values.append(named["pixel_values"]), with_kwargs=True
    )
    adapter.logits(samples.take(torch.arange(len(samples))).inputs)
    hook.remove()
    return values[0]


def agrees(folder: Path, write, sizes) -> bool:
    """Say whether a model gets the pixels that its own processor makes."""
    from transformers import AutoImageProcessor

    model, data = write(folder), write_images(folder, sizes)
    source = opened(model, data)
    images = [Image.open(path) for path in sorted(data.rglob("*.png"))]
    expected = AutoImageProcessor.from_pretrained(model)(images, return_tensors="pt")
    values, wanted = seen(source.adapter, source.samples), expected["pixel_values"]
    mean = float((values - wanted).abs().mean() * min(source.adapter.std or [1.0])) * 255
    return values.shape == wanted.shape and mean < 0.5  # levels of 255: that is its rounding


def followed(name: str, settings: object, sizes=WIDE) -> Row:
    write = partial(write_model, settings=settings)
    return Row(name, partial(agrees, write=write, sizes=sizes), True)


def refused(name: str, settings: object, line: str) -> Row:
    def read(folder: Path):
        return opened(write_model(folder, settings), write_images(folder))

    return Row(name, read, Refused(line))


EXACT = {"height": SIDE, "width": SIDE}
CROPPED = {"image_processor_type": "ViTImageProcessor", "do_center_crop": True,
           "size": {"shortest_edge": 20}, "resample": 2}  # fmt: skip
PLAIN = {"image_processor_type": "ViTImageProcessor", "resample": 2}
BLUE_FIRST = {"image_processor_type": "MobileViTImageProcessor", "size": 20, "crop_size": SIDE}
FILE = "of .*preprocessor_config.json"
PROCESSORS = [
    followed("shortest_edge and crop_size, images of one size", CROPPED | {"crop_size": EXACT}),
    followed("shortest_edge and crop_size, of several", CROPPED | {"crop_size": EXACT}, UNEVEN),
    followed("crop_size as a list", CROPPED | {"crop_size": [SIDE, SIDE]}),
    followed("crop_size as a number", CROPPED | {"crop_size": SIDE}),
    followed("size as a list", PLAIN | {"size": [SIDE, 20]}),
    followed("max_height and max_width", PLAIN | {"size": {"max_height": 20, "max_width": 24}}),
    followed("image_mean as a number", PLAIN | {"size": EXACT, "image_mean": 0.4}),
    followed("a file that names a mean alone", {"image_mean": [0.1, 0.2, 0.3], "size": SIDE}),
    followed("crop_pct of ConvNext", {"size": {"shortest_edge": SIDE}, "crop_pct": 0.7}),
    followed("bicubic", PLAIN | {"size": EXACT, "resample": 3}),
    followed("blue first", BLUE_FIRST),
    refused("longest_edge", PLAIN | {"size": {"longest_edge": 9}}, f"'size' {FILE}"),
    refused("a processor file that holds []", [], "preprocessor_config.json must be a JSON object"),
    refused("two means for three channels", PLAIN | {"image_mean": [0, 1]}, f"'image_mean' {FILE}"),
    Row("a folder of timm", partial(agrees, write=write_timm, sizes=UNEVEN), True),
]


def timm_statements(folder: Path) -> tuple[object, ...]:
    adapter = opened(write_timm(folder), write_images(folder)).adapter
    said = adapter.reading()
    return (*adapter.mean, *adapter.std, said["classes"] == CLASSES, said["channels"])


def notes_without_a_processor(folder: Path) -> list[bool]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened(write_model(folder), write_images(folder))
    return ["no preprocessor_config.json beside" in str(one.message) for one in caught]


def video_agrees(folder: Path) -> bool:
    """Say whether a video model gets the frames that its own processor makes."""
    import av
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEVideoProcessor

    config = VideoMAEConfig(
        image_size=SIDE, patch_size=8, num_frames=2, tubelet_size=2, hidden_size=8,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    )  # fmt: skip
    processor = VideoMAEVideoProcessor(size={"shortest_edge": 20}, crop_size=SIDE)
    VideoMAEForVideoClassification(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for name in CLASSES:
        (folder / "clips" / name).mkdir(parents=True)
        with av.open(str(folder / "clips" / name / "0.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            for pixels in IMAGES:
                frame = av.VideoFrame.from_ndarray(pixels[:32, :64, :3].copy(), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    source = opened(folder / "model", folder / "clips")
    whole = load_clips(folder / "clips", frames=2).inputs[0].transpose(0, 1)
    expected = processor([whole], return_tensors="pt")["pixel_values"]
    values = seen(source.adapter, source.samples)[:1]
    return values.shape == expected.shape and float((values - expected).abs().max()) < 0.01


def one_image(name: str, pixels: np.ndarray | Image.Image, right: object, ending="png", **options):
    """Return a row for a folder that holds one image; the value is its first row of pixels."""

    def read(folder: Path):
        (folder / "images/ant").mkdir(parents=True)
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(folder / f"images/ant/0.{ending}", **options)
        batch = load_data(folder / "images").take(torch.arange(1))
        return (batch.inputs[0, :, 0] * 255).flatten().tolist()

    return Row(name, read, right)


DEEP = np.array([[0, 257, 32896, 65535]])
LEVELS = [0, 1, 128, 255]
PAGES = [Image.new("L", (4, 1), value) for value in (0, 255)]
TURNED = Image.Exif()
TURNED[274] = 6  # the camera was held upright: the top of the picture is at the right
DEPTHS = [
    one_image("a 16-bit PNG", DEEP.astype(np.uint16), LEVELS),
    one_image("a 16-bit TIFF", DEEP.astype(np.uint16), LEVELS, "tif"),
    one_image("a 16-bit TIFF, big end first", DEEP.astype(">u2"), LEVELS, "tif"),
    one_image("a TIFF of whole numbers of 16 bits", DEEP.astype(np.int32), LEVELS, "tif"),
    one_image("a TIFF of floats", (DEEP / 65535).astype(np.float32), LEVELS, "tif"),
    one_image("a TIFF of floats beyond 1", DEEP.astype(np.float32),
              Refused(r"0.tif .*\[0, 1\], got 0 to 65535"), "tif"),
    one_image("a TIFF of whole numbers of 32 bits", DEEP.astype(np.int32) * 9,
              Refused("0.tif .*8 or 16 bits, got 0 to 589815"), "tif"),
    one_image("a TIFF of two pages", PAGES[0], Refused("0.tif .*holds 2 images"), "tif",
              save_all=True, append_images=PAGES[1:]),
    one_image("a GIF of two frames", PAGES[0], Refused("0.gif .*holds 2 images"), "gif",
              save_all=True, append_images=PAGES[1:]),
    one_image("a photograph that is to be turned", np.array([[0], [255]], np.uint8), [255, 0],
              exif=TURNED),
]  # fmt: skip


def write_archive(folder: Path, images: np.ndarray) -> Path:
    np.savez(folder / "data.npz", images=images, labels=np.array([0, 1]))
    return folder / "data.npz"


def channels_of(folder: Path, count: int, data) -> tuple[int, ...]:
    settings = PLAIN | {"do_resize": False, "image_mean": 0.5, "image_std": 0.5}
    source = opened(write_model(folder, settings, count), data(folder, count))
    return tuple(seen(source.adapter, source.samples).shape)[:3]


def many_channels(folder: Path, count: int) -> Path:
    return write_archive(folder, IMAGES[:, :SIDE, :SIDE, :count].copy())


def with_alpha(folder: Path, count: int) -> Path:
    data = write_images(folder)
    for path in data.rglob("*.png"):
        Image.fromarray(IMAGES[0, :SIDE, :SIDE, :count].copy()).save(path)
    return data


def evaluated(folder: Path, options) -> list[str]:
    settings = {"do_resize": False, "image_mean": [0.5] * 4, "image_std": [0.5] * 4}
    model = write_model(folder, PLAIN | settings, 4)
    return ["evaluate", str(model), "--data", str(with_alpha(folder, 4)), *options]


def evaluated_on_one(folder: Path) -> list[str]:
    model, data = write_model(folder, PLAIN | {"size": EXACT}), write_images(folder)
    (data / "bee/0.png").unlink()
    return ["evaluate", str(model), "--data", str(data)]


def floats(folder: Path):
    return load_data(write_archive(folder, IMAGES[..., :3] / 255.0))


def objects_of(folder: Path, processor) -> tuple[float, ...]:
    """Return height and width of two images of a detector, the box of each, and the padding."""
    from mmdefense_tasks.detection_victims import small_yolos

    small_yolos(1, 3, (64, 64)).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    sizes, boxes = ((24, 48), (48, 24)), ([12, 6, 24, 12], [6, 12, 12, 24])
    images, objects = [], []
    for index, ((height, width), box) in enumerate(zip(sizes, boxes, strict=True)):
        name = f"{index}.png"
        Image.fromarray(IMAGES[0, :height, :width, :3].copy()).save(folder / "data" / name)
        images.append({"id": index, "file_name": name, "height": height, "width": width})
        objects.append({"id": index, "image_id": index, "category_id": 0, "bbox": box})
    held = {"images": images, "annotations": objects, "categories": [{"id": 0, "name": "ant"}]}
    (folder / "data/train.json").write_text(json.dumps(held))
    batch = opened(folder / "model", folder / "data").samples.take(torch.arange(2))
    corner = (batch.images[0, :, -1, -1] * 255).round() if processor.do_pad else torch.zeros(3)
    found = [torch.tensor(batch.images.shape[2:]), *batch.boxes, corner]
    return tuple(torch.cat([part.flatten().float() for part in found]).tolist())


def squashed_objects(folder: Path):
    from transformers import YolosImageProcessor

    return objects_of(folder, YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False))


def padded_objects(folder: Path):
    from transformers import DetrImageProcessor

    return objects_of(folder, DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}))


ROWS = [
    *PROCESSORS,
    Row(
        "a detector that squashes", squashed_objects, (32, 32, 8, 8, 24, 24, 8, 8, 24, 24, 0, 0, 0)
    ),
    Row(
        "a detector that keeps proportions and pads",
        padded_objects,
        (64, 64, 16, 8, 48, 24, 8, 16, 24, 48, 124, 116, 104),
    ),
    Row("what timm states", timm_statements, (0.4, 0.5, 0.6, 0.2, 0.25, 0.3, True, 3)),
    Row("no processor file", notes_without_a_processor, [True]),
    Row("shortest_edge and crop_size of frames", video_agrees, True),
    Command("evaluate with fewer images than classes", evaluated_on_one, 0, "ACC .*n = 1"),
    *DEPTHS,
    Row("an archive of 4 channels", partial(channels_of, count=4, data=many_channels), (2, 4, 16)),
    Row("an archive of 5 channels", partial(channels_of, count=5, data=many_channels), (2, 5, 16)),
    Row("images with alpha", partial(channels_of, count=4, data=with_alpha), (2, 4, 16)),
    Command("--channels 4", partial(evaluated, options=("--channels", "4")), 0, "ACC"),
    Row(
        "pictures of 4 channels", lambda _: ImageRow("a", IMAGES[:, :4]).images.shape, (2, 3, 96, 5)
    ),
    Row("an archive of floats", floats, Refused("uint8 .*float64.*; scale them to 0..255")),
]
