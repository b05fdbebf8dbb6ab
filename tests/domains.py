"""Tiny Hugging Face models on disk with their data, one row per ``AutoModelFor...``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from commands import small_images, write_images
from PIL import Image
from safetensors.torch import load_file, save_file

WORDS = ("the", "cat", "dog", "bird", "sees", "likes", "a", "tree")
NAMES = {0: "one", 1: "two", 2: "three"}


def image_model(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    size = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(id2label=NAMES, label2id={v: k for k, v in NAMES.items()}, **size, **layers)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def image_data(folder: Path) -> None:
    """Grey images of two sizes; the model reads colour, of one size."""
    images, labels = small_images(12)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / NAMES[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 8 + index % 2
        Image.fromarray(np.asarray(image[0])).resize((side, side)).save(path)


def detection_model(folder: Path) -> None:
    from transformers import YolosImageProcessor

    from mmdefense_tasks.detection_victims import small_yolos

    size = {"hidden": 16, "layers": 1, "heads": 2, "tokens": 5}
    small_yolos(2, 3, (32, 32), **size).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def detection_data(folder: Path) -> None:
    """COCO json."""
    write_images(folder / "images", small_images(6)[0], torch.zeros(6, dtype=torch.int64))
    held = {
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "images": [{"id": i, "file_name": f"images/0/{i}.png"} for i in range(6)],
        "annotations": [
            {"image_id": i, "category_id": 7 + 2 * (i % 2), "bbox": [i % 3, 1, 4, 4]}
            for i in range(6)
        ],
    }
    (folder / "train.json").write_text(json.dumps(held))
    (folder / "test.json").write_text(json.dumps(held))


def video_model(folder: Path) -> None:
    from transformers import VideoMAEImageProcessor

    from mmdefense_tasks.video_victims import videomae_classifier

    size = {"patch": 8, "hidden": 8, "layers": 1, "heads": 2}
    videomae_classifier(2, 16, 4, **size).save_pretrained(folder)
    side = {"height": 16, "width": 16}
    VideoMAEImageProcessor(size={"shortest_edge": 16}, crop_size=side).save_pretrained(folder)


def video_data(folder: Path) -> None:
    import av

    for index in range(6):
        path = folder / ("left", "right")[index % 2] / f"{index}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mjpeg", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuvj420p"
            for step in range(6):
                pixels = np.full((24, 32, 3), 20 * (index + step), np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def tokenizer() -> Any:
    from mmdefense_tasks.language_victims import train_tokenizer

    return train_tokenizer([" ".join(WORDS)])


def causal_model(folder: Path) -> None:
    """As GPT-2 is: no padding token, and a config for generation beside the weights."""
    from mmdefense_tasks.language_victims import causal

    plain = tokenizer()
    causal(len(plain), family="gpt2", width=16, layers=1, heads=2).save_pretrained(folder)
    plain.pad_token = None
    plain.save_pretrained(folder)


def seq2seq_model(folder: Path) -> None:
    from mmdefense_tasks.language_victims import seq2seq

    made = tokenizer()
    seq2seq(len(made), family="t5", width=16, layers=1, heads=2).save_pretrained(folder)
    made.save_pretrained(folder)


def lora_model(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from mmdefense_tasks.language_victims import causal

    base, made = folder.with_name("base"), tokenizer()
    model = causal(len(made), family="llama", width=16, layers=1, heads=2)
    model.save_pretrained(base)
    made.save_pretrained(base)
    model = type(model).from_pretrained(base)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(folder)


def text_data(folder: Path) -> None:
    """Parallel sentences; the answer says the prompt backwards."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(WORDS), (12, 4), generator=generator).tolist()
    folder.mkdir()
    for part in ("train", "test"):
        for language, step in (("fwd", 1), ("bwd", -1)):
            lines = [" ".join(WORDS[word] for word in row[::step]) for row in rows]
            (folder / f"{part}.{language}").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Domain:
    """A tiny model with its data.

    Attributes:
        task: What ``auto`` must find out.
        auto: The class of ``transformers`` or ``peft`` that reads the output.
        model: Writes the model to a new folder.
        data: Writes the data to a new folder.
        more: Options that the command line needs.
        metric: What `evaluate` prints first.
    """

    task: str
    auto: str
    model: Callable[[Path], None]
    data: Callable[[Path], None]
    metric: str
    more: tuple[str, ...] = ("--accept-low-utility",)  # the weights are random


_PAIR = ("--read", "pair=fwd,bwd", "--accept-low-utility")
DOMAINS = {
    "image": Domain(
        "image-classification", "AutoModelForImageClassification", image_model, image_data, "ACC"
    ),
    "detection": Domain(
        "object-detection", "AutoModelForObjectDetection", detection_model, detection_data, "mAP@50"
    ),
    "video": Domain(
        "video-classification", "AutoModelForVideoClassification", video_model, video_data, "ACC"
    ),
    "causal": Domain(
        "language-generation", "AutoModelForCausalLM", causal_model, text_data, "BLEU", _PAIR
    ),
    "seq2seq": Domain(
        "language-generation", "AutoModelForSeq2SeqLM", seq2seq_model, text_data, "BLEU", _PAIR
    ),
    "lora": Domain(
        "language-generation", "AutoPeftModelForCausalLM", lora_model, text_data, "BLEU", _PAIR
    ),
}


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return the stored weights of a folder, of a whole model or of a PEFT one."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def store_as(folder: Path, dtype: torch.dtype) -> None:
    """Store the weights of a folder in another type, as most models are."""
    (path,) = folder.glob("*.safetensors")
    state = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
