"""Files altered at random: exit codes 0 to 3, never 70, and nothing left behind.

Half a minute in all, and ten more for the tests that are marked as slow. Each kind of file begins
with the same seed; a failure shows the altered file.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fitted_state
from PIL import Image
from safetensors.torch import save

from mmdefense import registry
from mmdefense.errors import MMDefenseError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# Seconds for each kind.
LENGTHS = [pytest.param(1.3, id="brief"), pytest.param(27.0, id="long", marks=pytest.mark.slow)]
Tree = dict[str, bytes]

SPECIAL = (
    b"-1", b"0", b"null", b"[]", b"{}", b"NaN", b"1e400", b"9" * 40, b'"\\ud800"', b"\xff\xfe",
    b"\0", b"\n", b'"', b"[" * 300, b"true", b"../", b"/dev/zero", b"\x80\x04", b"PK\x03\x04",
    b"\xff" * 8, b"\x7f" + b"\xff" * 7,
)  # fmt: skip


def encoded(form: str, mode: str = "L") -> bytes:
    held = io.BytesIO()
    Image.new(mode, (6, 6), 120 if mode == "L" else (9, 99, 199)).save(held, form)
    return held.getvalue()


def archived(**arrays) -> bytes:
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()


def said(value) -> bytes:
    return json.dumps(value).encode()


def coco() -> bytes:
    return said(
        {
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "images": [{"id": 0, "file_name": "0.png", "width": 6, "height": 6}],
            "annotations": [
                {"image_id": 0, "category_id": 1, "bbox": [1, 1, 3, 3], "iscrowd": 0},
                {"image_id": 0, "category_id": 2, "bbox": [0, 0, 6.0, 6], "area": 36},
            ],
        }
    )


def clip() -> bytes:
    import av

    held = io.BytesIO()
    with av.open(held, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuvj420p"
        for shade in range(4):
            pixels = np.full((24, 32, 3), 40 * shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return held.getvalue()


BOX = b"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
LINE = {"file": "0.png", "boxes": [[1, 1, 5, 5]], "labels": [0], "iscrowd": [0], "width": 6}


@cache
def data() -> dict[str, tuple[str, Tree]]:
    """Return for each kind of data the task and sound files."""
    png = encoded("PNG")
    images, labels = np.zeros((4, 5, 5), np.uint8), np.arange(4)
    encoded_images = {"jpeg": np.frombuffer(png * 2, np.uint8), "labels": np.arange(2)}
    records = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]
    forms = {"png": "PNG", "gif": "GIF", "bmp": "BMP", "ppm": "PPM", "tif": "TIFF", "webp": "WEBP"}
    return {
        "folders of images": (
            "image-classification",
            {f"a/{i}.{end}": encoded(form, "RGB") for i, (end, form) in enumerate(forms.items())},
        ),
        "archives of images": (
            "image-classification",
            {
                "train.npz": archived(images=images, labels=labels),
                "classes.json": said(["a", "b", "c", "d"]),
            },
        ),
        "archives of encoded images": (
            "image-classification",
            {
                "train.npz": archived(
                    offsets=np.array([0, len(png), 2 * len(png)]), **encoded_images
                )
            },
        ),
        "clouds": (
            "point-cloud-classification",
            {
                "train.npz": archived(
                    points=np.random.default_rng(0).random((4, 8, 3)), labels=labels
                ),
                "classes.json": said({"0": "a", "1": "b", "2": "c", "3": "d"}),
            },
        ),
        "COCO": ("object-detection", {"train.json": coco(), "images/0.png": png}),
        "json lines of boxes": (
            "object-detection",
            {
                "train.jsonl": said(LINE) + b"\n" + said(LINE),
                "classes.json": said(["cat", "dog"]),
                "0.png": png,
            },
        ),
        "VOC": (
            "object-detection",
            {
                "Annotations/a.xml": b"<annotation><size><width>6</width><height>6</height></size>"
                b"<object><name>cat</name>" + BOX + b"</object></annotation>",
                "ImageSets/Main/train.txt": b"a\n",
                "JPEGImages/a.png": png,
            },
        ),
        "records": ("language-generation", {"train.jsonl": b"\n".join(map(said, records))}),
        "lists of records": ("language-generation", {"train.json": said(records)}),
        "packed texts": ("language-generation", {"train.txt.gz": gzip.compress(b"one\n\ntwo")}),
        "parallel texts": (
            "language-generation",
            {"train.de": b"eins\nzwei\n", "train.en": b"one\ntwo\n"},
        ),
        "clips": ("video-classification", {"left/0.avi": clip(), "right/1.avi": clip()}),
    }


def stored(**options) -> bytes:
    held = io.BytesIO()
    torch.save(fitted_state(), held, **options)
    return held.getvalue()


@cache
def models() -> dict[str, Tree]:
    """Return for each kind of model sound files; those of one file are given as a file."""
    state = fitted_state()
    names = sorted(state)
    config = {
        "model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 8,
        "image_size": 8, "patch_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1,
        "intermediate_size": 8, "num_channels": 1, "id2label": {"0": "a", "1": "b"},
    }  # fmt: skip
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "1.safetensors")}
    return {
        "safetensors": {"net.safetensors": save(state)},
        "PyTorch's zip": {"net.pt": stored()},
        "PyTorch's older format": {"net.pth": stored(_use_new_zipfile_serialization=False)},
        "pickles": {"net.pkl": pickle.dumps({name: state[name].tolist() for name in names})},
        "folders": {
            "config.json": said(config),
            "preprocessor_config.json": said(processor),
            "tokenizer_config.json": said({"chat_template": "{{ messages[0]['content'] }}"}),
            "model.safetensors.index.json": said(index),
            "1.safetensors": save(state),
        },
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from([-1, 2**64, 10**40, 1e308, "\ud800", "../x", "\0", "nan", []]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@st.composite
def altered_bytes(draw, content: bytes) -> bytes:
    """Draw some bytes changed, put in, or cut away."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["flip", "insert", "replace", "cut", "drop", "double"]))
        piece = draw(st.sampled_from(SPECIAL) | st.binary(min_size=1, max_size=4))
        if how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ piece[0]]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "double":
            content = content[:at] + content[: 2 * at]
        else:
            gone = {"insert": 0, "replace": len(piece), "drop": draw(st.integers(1, 9))}.get(how, 0)
            content = content[:at] + (b"" if how == "drop" else piece) + content[at + gone :]
    return content


@st.composite
def altered_json(draw, value):
    """Draw a value with one of its parts replaced, dropped or named otherwise."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 5)):
        changed = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        key = draw(st.sampled_from(list(changed)))
        how = draw(st.sampled_from(["deeper", "deeper", "deeper", "drop", "again"]))
        if how == "drop":
            del changed[key]
        elif how == "again":
            changed[draw(st.text(max_size=3)) if isinstance(value, dict) else len(value)] = changed[
                key
            ]
        else:
            changed[key] = draw(altered_json(changed[key]))
        return changed if isinstance(value, dict) else list(changed.values())
    return draw(JSON)


def with_header(content: bytes, header) -> bytes:
    """Return a safetensors file with another header over its tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    text = said(header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@st.composite
def altered(draw, tree: Tree) -> Tree:
    """Draw files of which one is altered: its bytes, or what its JSON says."""
    name = draw(st.sampled_from(sorted(tree)))
    content = tree[name]
    if not draw(st.booleans()):
        pass
    elif name.endswith(".json"):
        return tree | {name: said(draw(altered_json(json.loads(content))))}
    elif name.endswith(".jsonl"):
        first, *rest = content.split(b"\n")
        return tree | {name: b"\n".join([said(draw(altered_json(json.loads(first)))), *rest])}
    elif name.endswith(".safetensors"):
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        return tree | {name: with_header(content, draw(altered_json(header)))}
    return tree | {name: draw(altered_bytes(content))}


def fuzzed(check, strategy, seconds: float) -> None:
    """Try one round of examples after the other until the time is up."""
    end, number, failed = time.monotonic() + seconds, 0, False

    def until_then(drawn):
        nonlocal failed
        if failed or time.monotonic() < end:
            before, failed = failed, True  # a failure is made small, however long that takes
            check(drawn)
            failed = before

    while time.monotonic() < end:
        tried = hypothesis.given(strategy)(until_then)
        tried = hypothesis.settings(
            max_examples=40,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        )(tried)
        hypothesis.seed(number)(tried)()
        number += 1


def written(tree: Tree, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("kind", data())
def test_data(kind, seconds, tmp_path, monkeypatch):
    task, tree = data()[kind]
    monkeypatch.chdir(tmp_path)

    def check(files: Tree) -> None:
        folder = written(files, tmp_path / "set")
        with suppress(MMDefenseError, OSError):  # exit codes 2 and 3
            registry.load("tasks", task).load(folder, split="train").fingerprint()
        assert os.listdir(tmp_path) == ["set"]

    fuzzed(check, altered(tree), seconds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("command", ["scan", "purify"])
@pytest.mark.parametrize("kind", models())
def test_models(kind, command, seconds, place, mmdefense, monkeypatch):
    tree = models()[kind]
    monkeypatch.chdir(place.folder)

    def check(files: Tree) -> None:
        model = written(files, place.folder / "model")
        model = model / next(iter(files)) if len(files) == 1 else model
        arguments = place.purify("--evidence", "none", "--accept-low-utility", model=model)
        outcome = mmdefense(*(["scan", str(model)] if command == "scan" else arguments))
        assert outcome.code in {0, 1, 2, 3}, outcome
        shutil.rmtree(place.out, ignore_errors=True)
        if "last_good.safetensors" in outcome.err:  # of a training that diverged: said, and kept
            shutil.rmtree(place.folder / "out.partial")
        assert place.files() == ["model"], outcome

    fuzzed(check, altered(tree), seconds)
