"""Open detection sets: VOC folders, COCO json, and JSON lines."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mmdefense.class_names import read_class_names
from mmdefense.errors import BadInputError, one_line
from mmdefense.files import parse_json, read_bytes, read_json
from mmdefense.forms import checked_form
from mmdefense.notes import note
from mmdefense_tasks.detection_forms import COCO, LINE, Coco
from mmdefense_tasks.parts import PARTS, note_part
from mmdefense_tasks.reading import lines_of, read_text

__all__ = ["ObjectFile", "ObjectSet", "open_objects"]

_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
_NAMES = ("trainval", *PARTS["train"], *PARTS["test"])
_ROBOFLOW = "_annotations.coco.json"
_DRIVE = re.compile(r"[A-Za-z]:")
_FLAGGED = re.compile(r"\s+(-1|0|1)$")  # flag in VOC's per-class image lists


@dataclass(frozen=True)
class ObjectFile:
    """An image file and the objects in it.

    Attributes:
        path: Path of the image.
        boxes: Corners x1, y1, x2, y2 in pixels of the image as annotated.
        kinds: The class of each box, as an index into the names of the set.
        size: Width and height of the image as annotated, if stated in the file.
    """

    path: Path
    boxes: list[list[float]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ObjectSet:
    """The content of a folder.

    Attributes:
        files: Images and their objects.
        names: Names of the classes.
        ids: The id of each class in COCO json; empty for other formats.
    """

    files: list[ObjectFile]
    names: tuple[str, ...]
    ids: tuple[int, ...] = ()


def open_objects(folder: Path, split: str) -> ObjectSet:
    """Return the images and objects of a set; the format is detected from the folder's content.

    Supported are JSON lines ``train.jsonl`` / ``test.jsonl`` (``file``, ``boxes``, ``labels``) with
    a ``classes.json``; a VOC folder (``Annotations/*.xml``, ``JPEGImages``, ``ImageSets/Main``);
    and COCO json: ``annotations/instances_train2017.json`` and similar, ``train.json``, or
    Roboflow's ``train/_annotations.coco.json``. The test split may also be named ``val``, ``valid``
    or ``validation``. Crowd regions are left out, as in training.

    Raises:
        BadInputError: If there is none of them, several for one split, or a damaged one.
    """
    exact = (folder / f"{name}.jsonl" for name in _NAMES)
    if lines := _named((path for path in exact if path.is_file()), split):
        return _json_lines(lines[0])
    if (folder / "Annotations").is_dir():
        return _voc(folder, split)
    if (coco := _coco_file(folder, split)) is not None:
        return _coco(coco, folder, split)
    raise BadInputError(
        f"data folder {folder} must hold {split}.jsonl, a VOC folder Annotations, or COCO json "
        f"for {split!r}; it has "
        f"{', '.join(sorted(p.name for p in folder.iterdir())[:6]) or 'nothing'}; if it holds "
        "the other split, give --split"
    )


def _named(paths: Iterable[Path], split: str) -> list[Path]:
    """Return the files or folders with the first existing name of a split.

    ``trainval`` is the training split only beside a ``test`` split; else ``val`` would be in both.
    """
    there = sorted(paths)
    held = {name: [path for path in there if _bears(path, name)] for name in _NAMES}
    names = PARTS[split]
    if split == "train":
        names = ("trainval", *names) if held["test"] else (*names, "trainval")
    for name in names:
        if held[name]:
            if split == "test":
                note_part(name, split, held[name][0].parent)
            return [path for path in held[name] if path.stem == name] or held[name]
    return []


def _bears(path: Path, name: str) -> bool:
    return re.search(rf"(?<![a-z]){name}(?![a-z])", path.stem.casefold()) is not None


# --- json lines


def _json_lines(path: Path) -> ObjectSet:
    names = read_class_names(path.parent / "classes.json")
    files, crowds = [], 0
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        row = checked_form(LINE, parse_json(line, where), where, "an image with boxes and labels")
        crowded = row.iscrowd or [False] * len(row.boxes)
        if not len(row.boxes) == len(row.labels) == len(crowded):
            raise BadInputError(
                f"{where} must have a label for each box, and a flag if there is iscrowd, got "
                f"{len(row.boxes)} boxes, {len(row.labels)} labels and {len(crowded)} flags"
            )
        objects = zip(row.boxes, row.labels, crowded, strict=True)
        kept = [(list(box), label) for box, label, crowd in objects if not crowd]
        if wrong := [label for _, label in kept if label >= len(names)]:
            raise BadInputError(
                f"{where} must have labels of the {len(names)} classes, got label {wrong[0]}"
            )
        size = _stated(row.width, row.height)
        boxes, kinds = [box for box, _ in kept], [label for _, label in kept]
        files.append(ObjectFile(path.parent / row.file, boxes, kinds, size))
        crowds += sum(crowded)
    _say_crowds(crowds, path)
    return ObjectSet(files, names)


def _say_crowds(count: int, path: Path) -> None:
    if count:
        note(f"ignored {count} crowd regions of {path.name}")


def _stated(width: int | None, height: int | None) -> tuple[int, int] | None:
    """Return the size stated in a file; None if missing or 0, as some tools write."""
    sides = width or 0, height or 0
    return sides if min(sides) > 0 else None


# --- COCO


def _coco_file(folder: Path, split: str) -> Path | None:
    """Return the COCO json of a split; of several, the one with instances."""
    if (own := folder / _ROBOFLOW).is_file():
        return own
    parts = _named((path.parent for path in folder.glob(f"*/{_ROBOFLOW}")), split)
    if parts:
        return parts[0] / _ROBOFLOW
    found = _named(folder.glob("*.json"), split) or _named(folder.glob("annotations/*.json"), split)
    named = [path for path in found if path.name.startswith("instances")]
    kept = named or found
    if len(kept) > 1:
        boxed = {path: _boxes_in(read_json(path)) for path in kept}
        kept = [path for path in kept if boxed[path] and boxed[path] == max(boxed.values())] or kept
    if len(kept) > 1:
        raise BadInputError(
            f"data folder {folder} must hold one file of boxes for {split!r}, got "
            f"{' and '.join(path.name for path in kept[:3])}; move the others away"
        )
    return kept[0] if kept else None


def _boxes_in(held: Any) -> int:
    """Return whether a COCO json has no boxes (0), boxes of keypoints (1), or of objects (2)."""
    try:
        boxed = {"bbox", "category_id"} <= set(held["annotations"][0])
        keypoints = any("keypoints" in category for category in held["categories"])
    except (KeyError, TypeError, IndexError):  # files that are not COCO json fail validation later
        return 0
    return (1 if keypoints else 2) if boxed else 0


def _coco(path: Path, folder: Path, split: str) -> ObjectSet:
    """Read COCO json: boxes are x, y, width, height."""
    held = read_json(path)
    if isinstance(held, Mapping) and "annotations" in held and "categories" not in held:
        raise BadInputError(
            f"{path} has annotations but no categories (as caption files do), and so no boxes; "
            "give the instances file"
        )
    coco = checked_form(
        COCO,
        held,
        path,
        "COCO json with images, annotations (bbox, image_id, category_id) and categories",
    )
    names = {entry.id: entry.name for entry in coco.categories}
    if len(names) < len(coco.categories):
        raise BadInputError(f"{path} must be COCO json: two categories have the same id")
    if (unused := _roboflow_dummy(coco)) is not None:
        del names[unused]
    place = {key: index for index, key in enumerate(sorted(names))}
    images = _Images([path.parent, folder / "images", folder], split)
    files = {
        entry.id: ObjectFile(images.find(entry.file_name), size=_stated(entry.width, entry.height))
        for entry in coco.images
    }
    things = [entry for entry in coco.annotations if not entry.iscrowd]
    for entry in things:
        if entry.image_id not in files or entry.category_id not in place:
            raise BadInputError(
                f"{path} must be COCO json whose annotations refer to its images and categories, "
                f"got image_id {entry.image_id!r:.60} and category_id {entry.category_id}"
            )
        x, y, width, height = entry.bbox
        files[entry.image_id].boxes.append([x, y, x + width, y + height])
        files[entry.image_id].kinds.append(place[entry.category_id])
    _say_crowds(len(coco.annotations) - len(things), path)
    ids = tuple(sorted(names))
    return ObjectSet(list(files.values()), tuple(names[key] for key in ids), ids)


def _roboflow_dummy(coco: Coco) -> int | None:
    """Return the id of the parent category that Roboflow adds, if it has no objects."""
    top = next((c for c in coco.categories if c.id == 0), None)
    others = [c for c in coco.categories if c.id != 0]
    if top is None or not others or any(c.supercategory != top.name for c in others):
        return None
    used = any(entry.category_id == 0 for entry in coco.annotations)
    return None if used or top.supercategory != "none" else 0


class _Images:
    """Finds images by their names in annotations."""

    def __init__(self, places: Sequence[Path], split: str) -> None:
        self._split = split
        self._places = list(dict.fromkeys(places))
        self._below = [d for place in self._places[1:] for d in _folders(place)]
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, name: str) -> Path:
        """Return the file of that name; if there is none, its expected path.

        Names may be absolute paths from another machine, and differ in case.

        Raises:
            BadInputError: If several folders have a file of that name.
        """
        wanted = PurePosixPath(name.strip().replace("\\", "/"))
        elsewhere = wanted.is_absolute() or _DRIVE.match(str(wanted))
        short = wanted.name if elsewhere else str(wanted)
        found = next(filter(None, (self._in(place / short) for place in self._places)), None)
        if found is not None:
            return found
        below = {place: path for place in self._below if (path := self._in(place / short))}
        if len(below) > 1:  # such as train/1.jpg and val/1.jpg
            below = {place: below[place] for place in _named(below, self._split)} or below
        if len(below) > 1:
            first, second, *_ = below.values()
            raise BadInputError(
                f"image {name} must be in only one folder, got {first} and {second}"
            )
        return next(iter(below.values()), self._places[-1] / short)

    def of_stem(self, stem: str) -> Path | None:
        """Return the first image with this stem, with any suffix."""
        names = [f"{stem}{suffix}" for suffix in _SUFFIXES]
        paths = (self._in(place / name) for place in self._places for name in names)
        return next(filter(None, paths), None)

    def _in(self, path: Path) -> Path | None:
        if path.parent not in self._listed:
            there = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
            self._listed[path.parent] = {p.name.casefold(): p for p in there if p.is_file()}
        return path if path.is_file() else self._listed[path.parent].get(path.name.casefold())


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


# --- VOC


def _voc(folder: Path, split: str) -> ObjectSet:
    roots = {name: _voc_root(folder, name) for name in _voc_names(folder, split)}
    every = [
        roots[path.stem] if path.stem in roots else _voc_root(folder, path.stem)
        for path in sorted((folder / "Annotations").glob("*.xml"))
    ]
    names = tuple(sorted({name for root in every for name in _voc_classes(root)}))
    images = _Images([folder / "JPEGImages", folder / "images", folder], split)
    place = {name: index for index, name in enumerate(names)}
    return ObjectSet([_voc_file(name, root, images, place) for name, root in roots.items()], names)


def _voc_names(folder: Path, split: str) -> list[str]:
    if listed := _named(folder.glob("ImageSets/Main/*.txt"), split):
        lines = (line.strip() for line in lines_of(read_text(listed[0])))
        return [_voc_name(folder, line) for line in lines if line]
    if (folder / "ImageSets").is_dir():
        raise BadInputError(f"{folder}/ImageSets/Main must hold a list for {split!r}, got none")
    return sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))


def _voc_name(folder: Path, line: str) -> str:
    """Return the name in a line, which may contain white space, or end in a flag."""
    whole = (folder / "Annotations" / f"{line}.xml").is_file()
    return line if whole else _FLAGGED.sub("", line)


def _voc_root(folder: Path, name: str) -> ET.Element:
    path = folder / "Annotations" / f"{name}.xml"
    try:
        root = ET.fromstring(read_bytes(path))  # expat in the library refuses entity bombs
    except (ET.ParseError, ValueError, LookupError) as error:
        raise BadInputError(f"annotation {path} cannot be read: {one_line(error)}") from error
    if not all(_voc_classes(root)):
        raise BadInputError(f"annotation {path} must give each object a name, got none for one")
    return root


def _voc_classes(root: ET.Element) -> Iterator[str]:
    yield from (" ".join(entry.findtext("name", "").split()) for entry in root.iter("object"))


def _voc_file(name: str, root: ET.Element, images: _Images, place: Mapping[str, int]) -> ObjectFile:
    """Read VOC XML: corners are 1-based and inclusive, hence the shift by one."""
    boxes = []
    for entry in root.iter("object"):
        corners = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = (float(corner) for corner in corners)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise BadInputError(
                f"annotation {name}.xml must give each box xmin, ymin, xmax and ymax, got {corners}"
            ) from error
        corner = [max(value - 1, min(value, 0.0)) for value in (left, top)]  # some count from 0
        boxes.append([*corner, right, bottom])
    path = images.of_stem(name) or images.find(root.findtext("filename", "").strip() or name)
    if not path.is_file():
        raise BadInputError(f"image {name} of Annotations/{name}.xml is not in {path.parent}")
    size = _stated(*(_pixels(root.findtext(f"size/{side}", "")) for side in ("width", "height")))
    return ObjectFile(path, boxes, [place[kind] for kind in _voc_classes(root)], size)


def _pixels(text: str) -> int | None:
    """Return a number of pixels; None if the text is not a number."""
    stated = re.fullmatch(r"\s*(\d{1,7})\s*", text)
    return int(stated[1]) if stated else None
