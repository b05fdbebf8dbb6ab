"""Detection sets as tools write them: category ids, files beside one another, boxes, sizes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
from everyday.rows import Refused, Row
from PIL import Image

from mmdefense.notes import Note
from mmdefense_tasks.object_detection import load_detection

WIDTH, HEIGHT = 40, 20
ANIMALS = {1: "cat", 2: "dog", 4: "owl"}


def image(path: Path, size=(WIDTH, HEIGHT), orientation=None) -> Path:
    """Write an image that is bright in its upper left corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 4, : size[0] // 4] = 255
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def coco(path: Path, categories=ANIMALS, boxes=None, images=("0.png",), **stated) -> Path:
    """Write COCO json: in each image a box of each category, or those that are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    boxes = {number: [4, 2, 8, 8] for number in categories} if boxes is None else boxes
    held = {
        "categories": [{"id": n, "name": name} for n, name in categories.items()],
        "images": [{"id": i, "file_name": name, **stated} for i, name in enumerate(images)],
        "annotations": [
            {"image_id": i, "category_id": n, "bbox": box}
            for i in range(len(images))
            for n, box in boxes.items()
        ],
    }
    path.write_text(json.dumps(held))
    return path


def load(where, numbers=None, **options):
    said = {} if numbers is None else {"numbers": numbers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        return load_detection(where, stated=said, image_size=(HEIGHT, WIDTH), **options)


def notes(where) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_detection(where)
    return [str(w.message) for w in caught if w.category is Note]


def in_annotations(folder: Path, name="instances_train2017.json", **options) -> Path:
    image(folder / "images/0.png")
    coco(folder / "annotations" / name, **options)
    return folder


def labels(folder: Path, numbers: range, **options) -> list[int]:
    return load(in_annotations(folder), numbers, **options).labels[0].tolist()


def with_other_annotations(folder: Path) -> list[str]:
    in_annotations(folder)
    captions = {"images": [], "annotations": [{"image_id": 0, "id": 1, "caption": "a cat"}]}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(captions))
    coco(folder / "annotations/person_keypoints_train2017.json", {1: "person"})
    return list(load(folder).classes)


def captions_beside(folder: Path) -> list[str]:
    in_annotations(folder, "my_train.json")
    captions = {"images": [], "annotations": [{"image_id": 0, "id": 1, "caption": "a cat"}]}
    (folder / "annotations/captions_train.json").write_text(json.dumps(captions))
    return list(load(folder).classes)


def two_instances(folder: Path):
    in_annotations(folder)
    coco(folder / "annotations/instances_train2014.json")
    return load(folder)


def trainval_alone(folder: Path):
    in_annotations(folder, "instances_trainval.json")
    return load(folder, split="test")


def roboflow(folder: Path) -> list:
    for part in ("train", "valid"):
        image(folder / part / "0.png")
        held = json.loads(coco(folder / part / "_annotations.coco.json").read_text())
        for category in held["categories"]:
            category["supercategory"] = "animals"
        held["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        (folder / part / "_annotations.coco.json").write_text(json.dumps(held))
    found = load(folder, range(1, 4), split="test")
    return [found.classes, found.labels[0].tolist()]


def boxes_of(folder: Path, boxes: dict, **stated) -> list:
    return load(in_annotations(folder, boxes=boxes, **stated)).boxes[0].tolist()


def notes_of(folder: Path, boxes: dict) -> list[str]:
    return notes(in_annotations(folder, boxes=boxes))


def turned(folder: Path) -> list:
    """An image on its side, annotated upright, as tools that follow EXIF show it."""
    image(folder / "images/0.jpg", orientation=6)
    coco(folder / "train.json", boxes={1: [2, 4, 8, 8]}, images=["0.jpg"], width=20, height=40)
    found = load_detection(folder, image_size=(40, 20))
    bright = (found.images[0, 0] > 0.5).nonzero().float().mean(0).round()
    return [found.boxes[0].tolist(), bright[1].item() > 10, bright[0].item() < 10]


def annotated_at(folder: Path, **stated) -> list:
    image(folder / "images/0.png")
    coco(folder / "train.json", boxes={1: [8, 4, 16, 16]}, **stated)
    return load(folder).boxes[0].tolist()


def voc(folder: Path, picture: str, name="cat", filename="", annotation="a", stated="") -> list:
    image(folder / "JPEGImages" / picture)
    (folder / "Annotations").mkdir()
    (folder / f"Annotations/{annotation}.xml").write_text(
        f"<annotation><filename>{filename}</filename>{stated}<object><name>{name}</name><bndbox>"
        "<xmin>\n 5 </xmin><ymin>3</ymin><xmax>12</xmax><ymax>10</ymax></bndbox></object>"
        "</annotation>"
    )
    found = load(folder)
    return [found.classes, found.boxes[0].tolist()]


def voc_list(folder: Path) -> int:
    voc(folder, "my image 1.png", annotation="my image 1")
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/train.txt").write_text("my image 1\r\n")
    return len(load(folder))


def voc_parts(folder: Path) -> list[int]:
    voc(folder, "a.png")
    (folder / "Annotations/b.xml").write_text("<annotation/>")
    image(folder / "JPEGImages/b.png")
    (folder / "ImageSets/Main").mkdir(parents=True)
    for name, text in {"train": "a", "val": "b", "trainval": "a\nb"}.items():
        (folder / f"ImageSets/Main/{name}.txt").write_text(text)
    return [len(load(folder)), len(load(folder, split="test"))]


def voc_of_fewer(folder: Path):
    voc(folder, "a.png")
    return load(folder, range(0, 3))


def same_names(folder: Path) -> float:
    """Images of one name in two parts: each part must get its own."""
    image(folder / "train2017/0.png")
    path = folder / "val2017/0.png"
    path.parent.mkdir()
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 77, np.uint8)).save(path)
    for part in ("train", "val"):
        coco(folder / f"annotations/instances_{part}2017.json")
    return float(load(folder, split="test").images[0, 0, 0, 0])


def lines(folder: Path, row: dict, classes='["cat", "dog"]', encoding="utf-8"):
    image(folder / "0.png")
    (folder / "classes.json").write_text(classes, encoding=encoding)
    text = json.dumps({"file": "0.png", **row}, ensure_ascii=False)
    (folder / "train.jsonl").write_text(text, encoding=encoding)
    return load(folder)


def sixteen_bits(folder: Path) -> float:
    pixels = np.full((HEIGHT, WIDTH), 2**15, np.uint16)
    (folder / "images").mkdir()
    Image.fromarray(pixels).save(folder / "images/0.png")
    coco(folder / "train.json")
    return float(load(folder).images.float().mean())


def captions_alone(folder: Path):
    image(folder / "images/0.png")
    held = {"images": [{"id": 0, "file_name": "0.png"}], "annotations": [{"caption": "a cat"}]}
    (folder / "captions_train.json").write_text(json.dumps(held))
    return load(folder)


def two_names_of_one_id(folder: Path):
    held = json.loads(in_annotations(folder, "train.json").joinpath("annotations/train.json")
                      .read_text())  # fmt: skip
    held["categories"].append({"id": 1, "name": "cow"})
    (folder / "annotations/train.json").write_text(json.dumps(held))
    return load(folder)


def turned_without_a_stated_size(folder: Path) -> bool:
    image(folder / "images/0.jpg", orientation=6)
    coco(folder / "train.json", images=("0.jpg",))
    return any("orientation" in text.casefold() for text in notes(folder))


BOX = [4, 2, 12, 10]
ROWS = [
    Row("captions without instances", captions_alone, Refused("as caption files do")),
    Row("two categories with one id", two_names_of_one_id,
        Refused("two categories have the same id")),
    Row("EXIF orientation without a stated size", turned_without_a_stated_size, True),
    Row("COCO ids 1, 2, 4 and outputs 0 to 4, the first the background",
        lambda f: labels(f, range(1, 5)), [0, 1, 3]),
    Row("COCO ids 1, 2, 4 and outputs 0 to 4, without a background",
        lambda f: labels(f, range(5)), [1, 2, 4]),
    Row("COCO ids 1, 2, 4 and the 91 outputs of torchvision's checkpoints",
        lambda f: labels(f, range(1, 91)), [0, 1, 3]),
    Row("COCO ids 1, 2, 4 and 4 outputs that do not fit", lambda f: labels(f, range(4)),
        Refused(r"3 classes \(cat, dog, owl\) with the COCO category ids 1, 2, 4, but the model "
                r"has 4, numbered 0 to 3.*labels=dense")),
    Row("COCO ids from 0 and an output more, perhaps a background",
        lambda f: load(in_annotations(f, categories={0: "a", 1: "b"}), range(3)),
        Refused("labels=ids uses these ids")),
    Row("COCO ids, said to be ids of a model that has not so many",
        lambda f: labels(f, range(1, 4), labels="ids"), Refused("numbers 1 to 3, got 4")),
    Row("COCO names in other case than the model's",
        lambda f: labels(f, range(5), classes=("N/A", "Cat", "Dog ", "N/A", "Owl")), [1, 2, 4]),
    Row("a VOC folder of fewer classes than the model has", voc_of_fewer,
        Refused(r"1 classes \(cat\), but the model has 3")),
    Row("captions and keypoints beside instances", with_other_annotations, ["cat", "dog", "owl"]),
    Row("captions beside boxes of another name", captions_beside, ["cat", "dog", "owl"]),
    Row("two files of instances for one part", two_instances,
        Refused("instances_train2014.json and instances_train2017.json")),
    Row("a file trainval is no test part", trainval_alone, Refused("for 'test'")),
    Row("Roboflow's folders and its category 0", roboflow, [("cat", "dog", "owl"), [0, 1, 2]]),
    Row("images of one name in two folders", same_names, 77),
    Row("a file name that is a path on another machine",
        lambda f: boxes_of(f, {1: [4, 2, 8, 8]}, images=["C:\\data\\images\\0.PNG"]), [BOX]),
    Row("a box without area", lambda f: boxes_of(f, {1: [4, 2, 8, 8], 2: [3, 3, 0, 5]}), [BOX]),
    Row("a count of boxes without area",
        lambda f: notes_of(f, {1: [4, 2, 8, 8], 2: [3, 3, 0, 5], 4: [3, 3, 1, 0]}),
        ["dropped 2 boxes without area"]),
    Row("a box one pixel over the edge",
        lambda f: boxes_of(f, {1: [-1, 2, 13, 8], 2: [30, 10, 11, 11]}),
        [[0, 2, 12, 10], [30, 10, 40, 20]]),
    Row("a count of boxes over the edge", lambda f: notes_of(f, {1: [-1, 2, 13, 8]}),
        ["clipped 1 boxes that reach beyond their image"]),
    Row("an image of 16 bits", sixteen_bits, 128),
    Row("an image turned by EXIF, annotated upright", turned,
        [[[2, 4, 10, 12]], True, True]),
    Row("an image turned after it was annotated",
        lambda f: annotated_at(f, width=20, height=40),
        Refused("0.png has 40x20 pixels, but was annotated with 20x40")),
    Row("a scaled copy of what was annotated",
        lambda f: annotated_at(f, width=80, height=40), [BOX]),
    Row("an image of another size than annotated",
        lambda f: annotated_at(f, width=60, height=60),
        Refused("0.png has 40x20 pixels, but was annotated with 60x60")),
    Row("VOC: an image whose suffix is in capitals", lambda f: voc(f, "a.JPG", filename="a.JPG"),
        [("cat",), [BOX]]),
    Row("VOC: an image that only filename names", lambda f: voc(f, "b.png", filename=" b.PNG\n"),
        [("cat",), [BOX]]),
    Row("VOC: white space around a name",
        lambda f: voc(f, "a.png", name="\n  traffic \n light "), [("traffic light",), [BOX]]),
    Row("VOC: a class without a name", lambda f: voc(f, "a.png", name=" "),
        Refused("must give each object a name")),
    Row("VOC: a scaled copy",
        lambda f: voc(f, "a.png", stated="<size><width>80</width><height>40</height></size>"),
        [("cat",), [[2, 1, 6, 5]]]),
    Row("VOC: an image name of three words in a list", voc_list, 1),
    Row("VOC: trainval where val is the test part", voc_parts, [1, 1]),
    Row("json lines: a label below 0", lambda f: lines(f, {"boxes": [BOX], "labels": [-1]}),
        Refused("line 1 .* labels.0: Input should be greater than or equal to 0, got -1")),
    Row("json lines: classes of an id2label map",
        lambda f: lines(f, {"boxes": [BOX], "labels": [0]}, classes='{"0": "cat", "1": "dog"}')
        .classes, ("cat", "dog")),
    Row("json lines: classes that are null",
        lambda f: lines(f, {"boxes": [BOX], "labels": [0]}, classes="null"),
        Refused("must be a list of names")),
    Row("json lines: a crowd",
        lambda f: len(lines(f, {"boxes": [BOX, BOX], "labels": [0, 1], "iscrowd": [0, 1]})
                      .labels[0]), 1),
    Row("json lines: a byte order mark and a line separator inside",
        lambda f: len(lines(f, {"boxes": [BOX], "labels": [0], "note": "a\u2028b"},
                            encoding="utf-8-sig").labels[0]), 1),
]  # fmt: skip
