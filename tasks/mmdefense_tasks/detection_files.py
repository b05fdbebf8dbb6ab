"""Opens detection sets: VOC folders, COCO json, and json lines; decodes and resizes them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdefense.batches import DetectionSamples
from mmdefense.errors import BadInputError, one_line

__all__ = ["ObjectFile", "decode", "open_objects"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_LISTS = {"train": ("trainval", "train"), "test": ("test", "val", "validation")}


@dataclass(frozen=True)
class ObjectFile:
    """An image file and the objects in it.

    Attributes:
        path: Of the image.
        boxes: Corners x1, y1, x2, y2 in pixels of the file.
        names: The class of each box.
    """

    path: Path
    boxes: list[list[float]]
    names: list[str]


def open_objects(folder: Path, split: str) -> tuple[list[ObjectFile], tuple[str, ...]]:
    """Return the files of a set and its class names, by what the folder holds.

    Json lines ``train.jsonl`` / ``test.jsonl`` (``file``, ``boxes``, ``labels``) with a
    ``classes.json``; a VOC folder (``Annotations/*.xml``, ``JPEGImages``, ``ImageSets/Main``); or
    COCO json (``annotations/*train*.json``, or ``train.json``).

    Raises:
        BadInputError: If it holds none of them, or one that is damaged.
    """
    if (lines := _first(folder, split, "{}.jsonl")) is not None:
        return _json_lines(lines)
    if (folder / "Annotations").is_dir():
        return _voc(folder, split)
    coco = _first(folder, split, "{}.json") or _first(folder, split, "annotations/*{}*.json")
    if coco is not None:
        return _coco(coco, folder)
    raise BadInputError(
        f"data folder {folder} must hold {split}.jsonl, a VOC folder Annotations, or COCO json for "
        f"{split!r}; it has {', '.join(sorted(p.name for p in folder.iterdir())[:6]) or 'nothing'}"
        "; if it holds another part, name that (--split)"
    )


def _first(folder: Path, split: str, pattern: str) -> Path | None:
    """Return the first file whose name fits one of the names of a split."""
    found = (path for name in _LISTS[split] for path in sorted(folder.glob(pattern.format(name))))
    return next(found, None)


def _json_lines(path: Path) -> tuple[list[ObjectFile], tuple[str, ...]]:
    classes = tuple(str(name) for name in _json(path.parent / "classes.json"))
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            row = json.loads(line)
            names = [classes[label] for label in row["labels"]]
            rows.append(ObjectFile(path.parent / row["file"], row["boxes"], names))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise BadInputError(
                f"line {number + 1} of {path} must hold file, boxes and labels of the "
                f"{len(classes)} classes: {type(error).__name__} {one_line(error)}"
            ) from error
    return rows, classes


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {one_line(error)}") from error


def _coco(path: Path, folder: Path) -> tuple[list[ObjectFile], tuple[str, ...]]:
    """Read COCO json: boxes are x, y, width, height; crowds are left out, as in training."""
    held = _json(path)
    try:
        names = {entry["id"]: str(entry["name"]) for entry in held["categories"]}
        files = {entry["id"]: entry["file_name"] for entry in held["images"]}
        objects: dict[Any, ObjectFile] = {
            key: ObjectFile(_image_path(folder, name), [], []) for key, name in files.items()
        }
        for entry in held["annotations"]:
            if entry.get("iscrowd"):
                continue
            x, y, width, height = entry["bbox"]
            objects[entry["image_id"]].boxes.append([x, y, x + width, y + height])
            objects[entry["image_id"]].names.append(names[entry["category_id"]])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{path} must be COCO json with images, annotations and categories that refer to one "
            f"another: {type(error).__name__} {one_line(error)}"
        ) from error
    ordered = tuple(names[key] for key in sorted(names))
    return list(objects.values()), ordered


def _image_path(folder: Path, name: str) -> Path:
    places = (folder / "images" / name, folder / name, *folder.glob(f"*/{name}"))
    return next((path for path in places if path.is_file()), folder / name)


def _voc(folder: Path, split: str) -> tuple[list[ObjectFile], tuple[str, ...]]:
    """Read VOC XML: corners count from 1 and are part of the box, hence the shift by one."""
    files = [_voc_file(folder, name) for name in _voc_names(folder, split)]
    names = {name for path in (folder / "Annotations").glob("*.xml") for name in _voc_classes(path)}
    return files, tuple(sorted(names))


def _voc_names(folder: Path, split: str) -> list[str]:
    listed = _first(folder, split, "ImageSets/Main/{}.txt")
    if listed is not None:
        return [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    if (folder / "ImageSets").is_dir():
        raise BadInputError(f"{folder}/ImageSets/Main must hold a list for {split!r}, got none")
    return sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))


def _voc_root(path: Path) -> ET.Element:
    try:
        return ET.parse(path).getroot()  # expat in the library refuses entity bombs
    except (OSError, ET.ParseError) as error:
        raise BadInputError(f"annotation {path} cannot be read: {one_line(error)}") from error


def _voc_classes(path: Path) -> Iterator[str]:
    yield from (entry.findtext("name", "") for entry in _voc_root(path).iter("object"))


def _voc_file(folder: Path, name: str) -> ObjectFile:
    annotation = folder / "Annotations" / f"{name}.xml"
    boxes, names = [], []
    for entry in _voc_root(annotation).iter("object"):
        corners = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            values = [float(corner) for corner in corners]  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise BadInputError(
                f"annotation {annotation} must give each box xmin, ymin, xmax and ymax, got "
                f"{corners}"
            ) from error
        boxes.append([max(0.0, values[0] - 1), max(0.0, values[1] - 1), values[2], values[3]])
        names.append(entry.findtext("name", ""))
    images = (folder / "JPEGImages" / f"{name}{suffix}" for suffix in _SUFFIXES)
    path = next((path for path in images if path.is_file()), None)
    if path is None:
        raise BadInputError(f"image {name} of {annotation} is not in {folder / 'JPEGImages'}")
    return ObjectFile(path, boxes, names)


def decode(
    files: Sequence[ObjectFile],
    classes: Sequence[str],
    size: tuple[int, int],
    channels: int,
) -> DetectionSamples:
    """Return the images in memory, in ``size``, and their objects moved along.

    An image keeps its proportions: it fills one side, and what is left of the other is black.

    Args:
        files: Images and objects.
        classes: The model's class names, in order.
        size: Height and width in pixels.
        channels: 1 or 3.

    Raises:
        BadInputError: If an image is damaged, a box is not a box in its image, or a class is not
            one of ``classes``.
    """
    place = {name: label for label, name in enumerate(classes)}
    images = torch.zeros(len(files), channels, *size, dtype=torch.uint8)
    boxes, labels = [], []
    for index, entry in enumerate(files):
        if unknown := [name for name in entry.names if name not in place]:
            raise BadInputError(
                f"classes must be among the model's {len(classes)} ({', '.join(classes[:6])}), got "
                f"{unknown[0]!r} in {entry.path.name}"
            )
        pixels, whole, scale = _pixels(entry.path, size, channels)
        images[index, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        boxes.append(_scaled(entry, whole, scale))
        labels.append(torch.tensor([place[name] for name in entry.names], dtype=torch.int64))
    return DetectionSamples(images, tuple(boxes), tuple(labels), classes=tuple(classes))


def _pixels(
    path: Path, size: tuple[int, int], channels: int
) -> tuple[Tensor, tuple[int, int], tuple[float, float]]:
    """Return an image as uint8 ``(C, h, w)``, its own width and height, and the scales of both."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # decoders raise many kinds, for damage of many kinds
        raise BadInputError(f"image {path} cannot be decoded: {one_line(error)}") from error
    scale = min(size[1] / image.width, size[0] / image.height)
    sides = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    array = np.array(image.resize(sides, Image.Resampling.BILINEAR), dtype=np.uint8)
    pixels = torch.from_numpy(array)
    pixels = pixels[None] if channels == 1 else pixels.movedim(-1, 0)
    return pixels, image.size, (sides[0] / image.width, sides[1] / image.height)


def _scaled(entry: ObjectFile, whole: tuple[int, int], scale: tuple[float, float]) -> Tensor:
    """Return boxes in pixels of the resized image, checked in pixels of the file."""
    boxes = torch.tensor(entry.boxes, dtype=torch.float32).reshape(-1, 4)
    limits = torch.tensor([*whole, *whole])
    empty = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
    outside = ((boxes < 0) | (boxes > limits + 0.5)).any(1)  # files round to the pixel beyond
    for wrong, what in ((empty, "empty or reversed"), (outside, "outside the image")):
        if wrong.any():
            raise BadInputError(
                f"a box of {entry.path.name} is {what} ({whole[0]}x{whole[1]} pixels), got "
                f"{boxes[wrong][0].tolist()} as x1, y1, x2, y2"
            )
    sides = [round(side * factor) for side, factor in zip(whole, scale, strict=True)]
    # The product may round to a little beyond the side.
    return (boxes * torch.tensor([*scale, *scale])).minimum(torch.tensor([*sides, *sides]))
