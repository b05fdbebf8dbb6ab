"""Data files that are damaged or made to harm, a row each: one line, whatever stands in them."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdefense import registry
from mmdefense.errors import BadInputError

IMAGES, BOXES = "image-classification", "object-detection"
CLIPS, CLOUDS, TEXTS = "video-classification", "point-cloud-classification", "language-generation"


def picture(path: Path, size=(8, 8), mode="L", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **options)
    return path


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pipe(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def classes_of(*files: str, content: bytes = b""):
    """Return a maker of a folder with a sound class and one with these files."""

    def make(folder: Path) -> Path:
        picture(folder / "sound/0.png")
        for name in files:
            written(folder / name, content)
        return folder

    return make


def archive(named=None, beside=None, **arrays):
    """Return a maker of an npz archive, perhaps with class names beside it."""

    def make(folder: Path) -> Path:
        if beside is not None:
            written(folder / "classes.json", beside)
        path = folder / "a.npz"
        np.savez(path, **arrays, **(named or {}))
        return path

    return make


def pixels(**changed):
    return archive(**({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.arange(2)} | changed))


def points(**changed):
    return archive(**({"points": np.ones((2, 4, 3)), "labels": np.arange(2)} | changed))


def bytes_of_png() -> bytes:
    held = io.BytesIO()
    Image.new("L", (4, 4)).save(held, "PNG")
    return held.getvalue()


def jpeg(offsets, content=None):
    held = np.frombuffer(bytes_of_png() * 2, np.uint8)
    return archive(jpeg=held if content is None else content, offsets=offsets, labels=np.arange(2))


def coco(**changed):
    """Return a maker of COCO json, whose parts are replaced."""
    held = {
        "categories": [{"id": 1, "name": "cat"}],
        "images": [{"id": 0, "file_name": "0.png"}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 1, 4, 4]}],
    }

    def make(folder: Path) -> Path:
        picture(folder / "images/0.png")
        text = json.dumps(held | changed).replace('"@HUGE"', "9" * 3000)
        written(folder / "train.json", text)
        return folder

    return make


def thing(**changed):
    return coco(annotations=[{"image_id": 0, "category_id": 1, "bbox": [1, 1, 4, 4]} | changed])


def lines(text: str | None = None, classes: bytes | str = '["cat", "dog"]', **changed):
    """Return a maker of json lines, with parts of the one line replaced, or the text of it."""

    def make(folder: Path) -> Path:
        picture(folder / "0.png")
        written(folder / "classes.json", classes)
        row = {"file": "0.png", "boxes": [[1, 1, 5, 5]], "labels": [0]} | changed
        written(folder / "train.jsonl", json.dumps(row) if text is None else text)
        return folder

    return make


def voc(xml: bytes | str | None = None, listed: bytes | None = None, **changed):
    """Return a maker of a VOC folder, with its XML or parts of that replaced."""
    parts = {"name": "cat", "xmin": 1, "ymin": 1, "xmax": 5, "ymax": 5} | changed

    def make(folder: Path) -> Path:
        picture(folder / "JPEGImages/a.png")
        box = "".join(f"<{k}>{v}</{k}>" for k, v in parts.items() if k != "name")
        sound = f"<a><object><name>{parts['name']}</name><bndbox>{box}</bndbox></object></a>"
        written(folder / "Annotations/a.xml", sound if xml is None else xml)
        if listed is not None:
            written(folder / "ImageSets/Main/train.txt", listed)
        return folder

    return make


def text(name: str, content: bytes | str):
    return lambda folder: written(folder / name, content)


def deep(count: int = 100_000) -> str:
    return "[" * count + "]" * count


def bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as held:
        for name in ("images", "labels"):
            header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 26}, 1, 1)}}"
            header = header.ljust(117) + "\n"
            start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
            held.writestr(f"{name}.npy", start + bytes(1 << 26))
    return folder / "a.npz"


def large_claim(folder: Path) -> Path:
    """An archive whose header tells of 10^12 images, with none behind it."""
    with zipfile.ZipFile(folder / "a.npz", "w") as held:
        header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 4, 4)}"
        header = header.ljust(117) + "\n"
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        held.writestr("images.npy", start)
        held.writestr("labels.npy", start)
    return folder / "a.npz"


def model_as_data(folder: Path) -> Path:
    torch.save({"weight": torch.zeros(3)}, folder / "model.pt")
    return folder / "model.pt"


def large_picture(folder: Path) -> Path:
    """13000 x 13000 pixels in some kilobytes."""
    return picture(folder / "sound/0.png", (13_000, 13_000)).parent.parent


def animated(folder: Path) -> Path:
    frames = [Image.new("L", (4, 4), shade) for shade in (0, 200)]
    (folder / "sound").mkdir()
    frames[0].save(folder / "sound/0.gif", save_all=True, append_images=frames[1:])
    return folder


def without_frames(folder: Path) -> Path:
    import av

    (folder / "left").mkdir()
    with av.open(str(folder / "left/0.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuvj420p"
        container.start_encoding()
    return folder


def playlist(folder: Path) -> Path:
    secret = written(folder / "secret.ts", "secret")
    written(folder / "set/left/0.mp4", f"#EXTM3U\n#EXTINF:1,\nfile:{secret}\n#EXT-X-ENDLIST\n")
    return folder / "set"


def not_utf8_folder(folder: Path) -> Path:
    name = os.fsencode(folder) + b"/\xff\xfe"
    os.mkdir(name)
    Image.new("L", (4, 4)).save(os.fsdecode(name + b"/0.png"))
    return folder


def pipes_of_boxes(folder: Path) -> Path:
    lines()(folder)
    (folder / "0.png").unlink()
    pipe(folder / "0.png")
    return folder


def pipe_of(name: str):
    def make(folder: Path) -> Path:
        pipe(folder / name)
        return folder

    return make


def voc_pipe(folder: Path) -> Path:
    voc()(folder)
    (folder / "Annotations/a.xml").unlink()
    pipe(folder / "Annotations/a.xml")
    return folder


def saved_rows(change):
    """Return a maker of a data set that ``datasets`` saved, changed afterwards."""

    def make(folder: Path) -> Path:
        import datasets

        datasets.Dataset.from_dict({"text": ["a b"] * 4}).save_to_disk(folder / "set")
        change(folder / "set")
        return folder / "set"

    return make


def cut_arrow(folder: Path) -> None:
    (path,) = folder.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])


BOMB = "<!DOCTYPE a [<!ENTITY x0 'lol'>" + "".join(
    f"<!ENTITY x{n + 1} '{f'&x{n};' * 10}'>" for n in range(12)
)
LABELS = "labels .* must lie in 0..1000000, got"

ROWS = {
    # folders of classes
    "a class folder called 10**30": (
        IMAGES,
        lambda f: picture(f / str(10**30) / "0.png").parent.parent,
        "must be labels of at most 1000000, got 1000",
    ),
    "a class folder called 5000000": (
        IMAGES,
        lambda f: picture(f / "5000000/0.png").parent.parent,
        "must be labels of at most 1000000, got 5000000",
    ),
    "a class folder whose name is not UTF-8": (IMAGES, not_utf8_folder, "names in UTF-8"),
    "a class folder with a control character": (
        IMAGES,
        lambda f: picture(f / "a\x1b[2J" / "0.png").parent.parent,
        r"without control characters, got 'a\\x1b",
    ),
    "a pipe called .png alone": (
        IMAGES,
        lambda f: pipe(f / "a/0.png").parent.parent,
        "got no images",
    ),
    "a pipe as the archive of a part": (IMAGES, pipe_of("train.npz"), "is not a regular file"),
    "an image without pixels": (
        IMAGES,
        classes_of("sound/1.ppm", content=b"P6 0 0 255\n"),
        "1.ppm cannot be decoded",
    ),
    "an empty image": (IMAGES, classes_of("sound/1.png"), "1.png cannot be decoded"),
    "a cut image": (
        IMAGES,
        classes_of("sound/1.png", content=bytes_of_png()[:40]),
        "1.png cannot be decoded",
    ),
    "PostScript called .png": (
        IMAGES,
        classes_of("sound/0.png", content=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n"),
        "0.png cannot be decoded",
    ),
    "an animation": (IMAGES, animated, "2 images or frames"),
    "an image of 169 million pixels": (IMAGES, large_picture, "13000x13000 pixels"),
    # archives
    "a model given as images": (IMAGES, model_as_data, "must be an npz archive of arrays"),
    "a model given as clouds": (CLOUDS, model_as_data, "must be an npz archive of arrays"),
    "a model given as texts": (TEXTS, model_as_data, "model.pt cannot be read"),
    "a model given as clips": (CLIPS, model_as_data, "must be a folder"),
    "a model given as boxes": (BOXES, model_as_data, "must be a folder"),
    "images of 0 x 0": (
        IMAGES,
        pixels(images=np.zeros((2, 0, 0), np.uint8)),
        "cannot be decoded: it has 0x0 pixels",
    ),
    "images without a dimension": (IMAGES, pixels(images=np.uint8(1)), "must hold 'images'"),
    "images as objects": (
        IMAGES,
        pixels(images=np.array([{}, []], object)),
        "cannot be read: Object arrays",
    ),
    "labels without a dimension": (IMAGES, pixels(labels=np.int64(1)), "integer 'labels'"),
    "labels of NaN": (IMAGES, pixels(labels=np.array([0, np.nan])), "integer 'labels'"),
    "labels that are infinite": (IMAGES, pixels(labels=np.array([0, np.inf])), LABELS),
    "labels of fractions": (IMAGES, pixels(labels=np.array([0, 0.5])), "integer 'labels'"),
    "a label of -1": (IMAGES, pixels(labels=np.array([0, -1])), f"{LABELS} -1"),
    "a label of -1 beside class names": (
        IMAGES,
        pixels(labels=np.array([0, -1]), beside='["a", "b"]'),
        f"{LABELS} -1",
    ),
    "a label of 2**63": (IMAGES, pixels(labels=np.array([0, 2**63], np.uint64)), LABELS),
    "labels as objects": (IMAGES, pixels(labels=np.array([0, "a"], object)), "Object arrays"),
    "labels as dates": (
        IMAGES,
        pixels(labels=np.array(["2020-01-01"] * 2, "datetime64[D]")),
        "integer 'labels'",
    ),
    "labels as bytes": (IMAGES, pixels(labels=np.array([b"a", b"b"])), "integer 'labels'"),
    "labels as records": (
        IMAGES,
        pixels(labels=np.zeros(2, [("a", "i4")])),
        "integer 'labels'",
    ),
    "offsets without a dimension": (IMAGES, jpeg(np.int64(3)), "'offsets' as integers"),
    "offsets that are empty": (IMAGES, jpeg(np.zeros(0, int)), "'offsets' as integers"),
    "offsets of fractions": (IMAGES, jpeg(np.array([0, 1.5, 3])), "'offsets' as integers"),
    "offsets below 0": (IMAGES, jpeg(np.array([-5, 0, 3])), "must increase within"),
    "offsets that fall": (IMAGES, jpeg(np.array([9, 5, 3])), "must increase within"),
    "offsets beyond the end": (IMAGES, jpeg(np.array([0, 5, 10**18])), "must increase within"),
    "encoded images without a dimension": (
        IMAGES,
        jpeg(np.arange(3), np.uint8(1)),
        "'jpeg' as uint8",
    ),
    "encoded images that are none": (IMAGES, jpeg(np.arange(3)), "cannot be decoded"),
    "an archive that claims 10^12 images": (IMAGES, large_claim, "cannot be read"),
    "an archive of zeros that unpacks to 64 MiB": (IMAGES, bomb, "unpacks from"),
    "clouds without a dimension": (CLOUDS, points(points=np.float64(1)), "must hold 'points'"),
    "clouds of one dimension": (CLOUDS, points(points=np.ones(3)), "must hold 'points'"),
    "clouds of text": (CLOUDS, points(points=np.array([["a"]])), "must hold 'points'"),
    "clouds of complex numbers": (
        CLOUDS,
        points(points=np.ones((2, 4, 3), complex)),
        "must hold 'points'",
    ),
    "clouds that are infinite": (
        CLOUDS,
        points(points=np.full((2, 4, 3), np.inf)),
        "NaN or infinity",
    ),
    "int8 clouds without a dimension": (
        CLOUDS,
        points(points_int8=np.int8(1), points=np.float64(1)),
        "must hold 'points'",
    ),
    "clouds with a label of -1": (CLOUDS, points(labels=np.array([0, -1])), f"{LABELS} -1"),
    # class names
    **{
        f"classes.json that is {what}": (IMAGES, pixels(beside=content), words)
        for what, content, words in (
            ("a number", "7", "must be a list of names"),
            ("null", "null", "must be a list of names"),
            ("nested", '[["a"], ["b"]]', "must have a name for each label"),
            ("bytes", b"\xff\xfe\x00", "cannot be read"),
            ("too deep", deep(), "cannot be read: it must be JSON: recursion limit"),
            ("of halves of letters", '["\\ud800", "b"]', "must be JSON"),
            ("numbered by 5000 digits", f'{{"{"1" * 5000}": "a"}}', "a list of names or a map"),
            ("numbered by lists", '{"a": [0], "b": [1]}', "a list of names or a map"),
            ("empty", "", "must be JSON"),
            ("not finite", "[NaN, 1e400]", "must have a name for each label"),
        )
    },
    # COCO
    **{
        f"COCO: {what}": (BOXES, make, words)
        for what, make, words in (
            ("a list", coco(categories=3), "categories: Input should be a valid list, got 3"),
            ("annotations that are numbers", coco(annotations=[1, 2]), "annotations.0: "),
            ("annotations that are null", coco(annotations=None), "annotations: "),
            ("a box that is text", thing(bbox="1234"), "annotations.0.bbox: .* got '1234'"),
            ("a box of words", thing(bbox=["a", 1, 1, 1]), "annotations.0.bbox.0: .* got 'a'"),
            ("a nested box", thing(bbox=[[1, 1, 4, 4]]), "annotations.0.bbox"),
            ("a box of three", thing(bbox=[1, 1, 4]), "annotations.0.bbox.3"),
            ("a box of five", thing(bbox=[1, 1, 4, 4, 4]), "annotations.0.bbox"),
            ("a box that is null", thing(bbox=None), "annotations.0.bbox"),
            ("a box that is infinite", thing(bbox=[1, 1, 4, float("inf")]), "finite number"),
            ("a box of NaN", thing(bbox=[1, 1, 4, float("nan")]), "finite number"),
            ("a box of huge numbers", thing(bbox=["@HUGE"] * 4), "annotations.0.bbox.0"),
            ("an id that is a list", thing(image_id=[0]), "annotations.0.image_id"),
            ("an id of no image", thing(image_id=7), "refer to its images"),
            ("an id of no category", thing(category_id=7), "refer to its images and categories"),
            ("a category of -1", thing(category_id=-1), "annotations.0.category_id"),
            ("a file name that is a number", coco(images=[{"id": 0, "file_name": None}]),
             "images.0.file_name"),
            ("a file name with NUL", coco(images=[{"id": 0, "file_name": "a\0b"}]),
             "images.0.file_name"),
            ("a side of 10^30", coco(images=[{"id": 0, "file_name": "0.png", "width": 10**30}]),
             "images.0.width"),
            ("two categories with one id", coco(categories=[{"id": 1, "name": "a"}] * 2),
             "two categories have the same id"),
        )
    },
    "COCO: too deep": (
        BOXES,
        lambda f: written(f / "train.json", deep()).parent,
        "must be JSON: recursion limit",
    ),
    "COCO: a number": (BOXES, lambda f: written(f / "train.json", "7").parent, "got 7"),
    "COCO: a pipe": (BOXES, pipe_of("train.json"), "is not a regular file"),
    # json lines with boxes
    **{
        f"json lines: {what}": (BOXES, make, words)
        for what, make, words in (
            ("boxes that are null", lines(boxes=None), "boxes: "),
            ("boxes that are text", lines(boxes="abcd"), "boxes: "),
            ("a box of three", lines(boxes=[[1, 2, 3]]), "boxes.0.3"),
            ("a box of five", lines(boxes=[[1, 2, 3, 4, 5]]), "boxes.0"),
            ("ragged boxes", lines(boxes=[[1, 2, 3, 4], [1]], labels=[0, 0]), "boxes.1"),
            ("boxes that are objects", lines(boxes=[{"x": 1}]), "boxes.0"),
            ("boxes of huge numbers", lines(boxes=[[10**400, 1, 1, 1]]), "boxes.0.0"),
            ("boxes that are reversed", lines(boxes=[[5, 5, 1, 1]]), "is reversed"),
            ("boxes of 1e300", lines(boxes=[[0, 0, 1e300, 1e300]]), "outside the image"),
            ("labels of text", lines(labels=["cat"]), "labels.0"),
            ("labels of fractions", lines(labels=[0.5]), "labels.0"),
            ("a label of -1", lines(labels=[-1]), "labels.0"),
            ("a label of no class", lines(labels=[2]), "of the 2 classes, got label 2"),
            ("more labels than boxes", lines(labels=[0, 1]), "a label for each box"),
            ("a number", lines("7\n"), "line 1 .* got 7"),
            ("null", lines("null\n"), "line 1 .* got None"),
            ("too deep", lines(deep()), "line 1 .* recursion limit"),
            ("bytes", lines(b"\xff\n"), "cannot be read"),
            ("half of a letter", lines('{"file": "\\ud800", "boxes": [], "labels": []}'),
             "line 1 .* must be JSON"),
            ("a file that is a list", lines(file=[1]), "file: "),
            ("a file that is a folder", lines(file="."), "is not a regular file"),
            ("classes that are a number", lines(classes="3"), "must be a list of names"),
            ("classes that are too deep", lines(classes=deep()), "recursion limit"),
        )
    },
    "json lines: an image that is a pipe": (BOXES, pipes_of_boxes, "is not a regular file"),
    # VOC
    **{
        f"VOC: {what}": (BOXES, make, words)
        for what, make, words in (
            ("a list of bytes", voc(listed=b"\xff\xfe\n"), "cannot be read"),
            ("a list with NUL", voc(listed=b"a\0b\n"), "cannot be read"),
            ("a list of nothing there", voc(listed=b"b\n"), "does not exist"),
            ("entities that grow without end", voc(f"{BOMB}]><a>&x12;</a>"), "cannot be read"),
            ("an unknown encoding", voc("<?xml version='1.0' encoding='x-no'?><a/>"),
             "cannot be read"),
            ("bytes", voc(b"\xff\xff"), "cannot be read"),
            ("a corner that is text", voc(xmin="left"), "must give each box"),
            ("a corner of NaN", voc(xmin="nan"), "is reversed"),
            ("a corner beyond all numbers", voc(xmax="1e400"), "outside the image"),
            ("a class without a name", voc(name=""), "each object a name"),
        )
    },
    "VOC: a pipe": (BOXES, voc_pipe, "is not a regular file"),
    # texts
    **{
        f"texts: {what}": (TEXTS, text(name, content), words)
        for what, name, content, words in (
            ("json that is too deep", "a.json", deep(), "recursion limit"),
            ("json lines that are too deep", "a.jsonl", f"{deep()}\n{{}}\n", "recursion limit"),
            ("half of a letter", "a.jsonl", '{"text": "\\ud800"}', "must be JSON"),
            ("records that are numbers", "a.jsonl", "1\n2\n", "must be an object, got int"),
            ("a record that is null", "a.json", "[null]", "must be an object"),
            ("fields that are numbers", "a.json", '[{"prompt": 1, "answer": "b"}]', "text as"),
            ("fields that are lists", "a.json", '[{"text": ["a"]}]', "text as text"),
            ("a translation that is empty", "a.json", '[{"translation": {}}]', "two languages"),
            ("not UTF-8", "a.txt", b"\xff\xfea", "UTF-16"),
            ("Latin 1", "a.txt", "é".encode("latin-1"), "cannot be read"),
            ("gzip that is cut", "a.txt.gz", gzip.compress(b"abc" * 99)[:-9], "cannot be read"),
            ("gzip that is none", "a.txt.gz", b"abc", "cannot be read"),
            ("gzip that is damaged", "a.txt.gz",
             gzip.compress(b"abc")[:10] + b"\xff" * 9, "cannot be read"),
            ("nothing", "a.jsonl", "", "at least one text"),
        )
    },
    "texts: a pipe": (TEXTS, lambda f: pipe(f / "a.txt"), "none found"),
    "texts: a saved data set that is cut": (TEXTS, saved_rows(cut_arrow), "cannot be loaded"),
    "texts: a saved data set with a pipe": (
        TEXTS,
        saved_rows(lambda f: pipe(f / "x.arrow")),
        "is not a regular file",
    ),
    "images: a saved data set of texts": (
        IMAGES,
        saved_rows(lambda f: None),
        "must have a column of type Image",
    ),
    # clips
    "a clip without frames": (CLIPS, without_frames, "0.avi"),
    "a clip that is empty": (
        CLIPS,
        lambda f: written(f / "left/0.mp4", "").parent.parent,
        "0.mp4 cannot be decoded",
    ),
    "a clip that is a playlist": (CLIPS, playlist, "0.mp4 cannot be decoded"),
    # clouds in files
    **{
        f"a {suffix} file that claims {what}": (
            CLOUDS,
            lambda f, s=suffix, c=content: written(f / f"a/0.{s}", c).parent.parent,
            "its header claims 1e\\+12 points or faces",
        )
        for suffix, what, content in (
            ("ply", "10^12 vertices",
             f"ply\nformat ascii 1.0\nelement vertex {10**12}\nproperty float x\nend_header\n"),
            ("ply", "10^12 faces", f"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\n"
             f"element face {10**12}\nproperty list uchar int vertex_indices\nend_header\n1\n"),
            ("pcd", "10^12 points", f"VERSION .7\nFIELDS x y z\nPOINTS {10**12}\nDATA ascii\n"),
            ("off", "10^12 vertices", f"OFF\n# a word\n{10**12} 1 0\n"),
        )
    },
}  # fmt: skip


def load(task: str, where: Path):
    return registry.load("tasks", task).load(where, split="train")


SOUND = {
    "COCO: ids and flags as text": (
        BOXES,
        coco(
            images=[{"id": "0", "file_name": "0.png", "width": "8", "height": None}],
            annotations=[
                {"image_id": 0, "category_id": "1", "bbox": ["1", 1, 4, 4], "iscrowd": flag}
                for flag in ("0", 0, None, "1")
            ],
        ),
        lambda samples: samples.boxes[0].tolist() == [[16, 16, 80, 80]] * 3,
    ),
    "COCO: fields that nobody reads, and a name of two categories' supercategory": (
        BOXES,
        coco(info={"x": deep(90)}, licenses=None),
        lambda samples: samples.classes == ("cat",),
    ),
    "json lines: flags that are null, sizes of 0": (
        BOXES,
        lines(iscrowd=None, width=0, height=0),
        lambda samples: samples.labels[0].tolist() == [0],
    ),
    "labels that are whole numbers of another kind": (
        IMAGES,
        pixels(labels=np.array([0.0, 1.0], ">f4")),
        lambda samples: samples.labels.tolist() == [0, 1],
    ),
    "an archive with an array that nobody reads": (
        IMAGES,
        pixels(named={"extra": np.array([{}], object)}),
        lambda samples: len(samples) == 2,
    ),
    "images with a palette": (
        IMAGES,
        lambda f: picture(f / "sound/0.png", mode="P").parent.parent,
        lambda samples: samples.inputs.shape == (1, 3, 8, 8),
    ),
    "images in CMYK": (
        IMAGES,
        lambda f: picture(f / "sound/0.jpg", mode="CMYK").parent.parent,
        lambda samples: samples.inputs.shape == (1, 3, 8, 8),
    ),
    "a pipe beside the images": (
        IMAGES,
        lambda f: pipe(classes_of()(f) / "sound/1.png").parent.parent,
        lambda samples: len(samples) == 1,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "make", "words"), ROWS.values(), ids=ROWS.keys())
def test_one_line_and_no_crash(task, make, words, tmp_path):
    where = make(tmp_path)
    with pytest.raises(BadInputError, match=words) as refusal:
        load(task, where)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1500


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "make", "is_right"), SOUND.values(), ids=SOUND.keys())
def test_what_is_sound_is_read(task, make, is_right, tmp_path):
    assert is_right(load(task, make(tmp_path)))
