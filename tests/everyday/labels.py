"""Labels that were renumbered or guessed, and options that a reader does not use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from everyday.rows import Command, Refused, Row
from PIL import Image
from torch import nn

from mmdefense.notes import Note
from mmdefense.registry import adapt
from mmdefense_tasks.image_classification import load_data
from mmdefense_tasks.point_clouds import load_clouds
from mmdefense_tasks.video_classification import load_clips

ANIMALS = ("ant", "bee", "cat", "dog")
SOME = ("ant", "cat", "dog")
NUMBERS = tuple(str(number) for number in range(12))


def image(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), shade).save(path, None if path.suffix else "png")


def images(folder: Path, names: tuple[str, ...] = SOME) -> Path:
    for name in names:
        image(folder / name / "0.png")
    return folder


def clips(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "0.mp4").write_bytes(b"not decoded here")
    return folder


def clouds(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "0.off").write_text("OFF\n")
    return folder


def archive(path: Path, **arrays: Any) -> Path:
    held = {"images": np.zeros((4, 4, 4), np.uint8), "labels": np.arange(4)}
    np.savez(path, **(held | arrays))
    return path


def beside(content: str, name: str = "classes.json") -> Callable[[Path], Path]:
    """Return what makes an archive of four labels with class names beside it."""

    def make(folder: Path) -> Path:
        (folder / name).write_text(content)
        return archive(folder / "set.npz")

    return make


def rows(folder: Path, kinds: dict[str, Any], part: str | None = None, **columns: Any) -> Path:
    """Save a data set of ``datasets`` with an image a row."""
    import datasets

    pictures = {"image": [Image.new("L", (4, 4))] * 3}
    features = datasets.Features({"image": datasets.Image()} | kinds)
    data = datasets.Dataset.from_dict(pictures | columns, features=features)
    saved = data if part is None else datasets.DatasetDict({part: data})
    saved.save_to_disk(folder / "set")
    return folder / "set"


def labelled(*names: str) -> Any:
    import datasets

    return datasets.ClassLabel(names=list(names))


def value(kind: str) -> Any:
    import datasets

    return datasets.Value(kind)


def labels(where: object, **options: Any) -> list[int]:
    found: list[int] = load_data(where, **options).labels.tolist()  # type: ignore[arg-type]
    return found


def told(where: object, **options: Any) -> str:
    """Return what was noted while data was read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_data(where, **options)  # type: ignore[arg-type]
    return "; ".join(str(each.message) for each in caught if each.category is Note)


def cloud_labels(folder: Path, **options: Any) -> list[int]:
    """Return the labels of a folder of clouds, whose files are not opened."""
    with patch("mmdefense_tasks.point_files.read_cloud", lambda *_, **__: torch.rand(8, 3)):
        return load_clouds(folder, **options).labels.tolist()


def clip_labels(folder: Path, **options: Any) -> list[int]:
    """Return the labels of a folder of clips, whose files are not opened."""
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    with patch("mmdefense_tasks.clips.ClipSet.read", lambda *_: frames):
        return load_clips(folder, frames=2, **options).labels.tolist()


def of_outputs(count: int) -> Any:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, count))


def refused(name: str, read: Callable[[Path], Any], line: str, code: int = 2) -> Row:
    return Row(name, read, Refused(line, code))


def hf_said(*names: str) -> dict[str, Any]:
    return {"stated": {"classes": names}}


def scores(folder: Path, count: int, *more: str) -> list[str]:
    """Return the arguments that evaluate a net which tells ``count`` shades apart."""
    net, shades = of_outputs(count), torch.linspace(0, 1, count)
    net[1].weight.data = 2 * shades[:, None].expand(-1, 16) / 16
    net[1].bias.data = -(shades**2)
    torch.save(net.state_dict(), folder / "net.pt")
    (folder / "net.py").write_text(
        "from torch import nn\ndef net():\n"
        f"    return nn.Sequential(nn.Flatten(), nn.Linear(16, {count}))\n"
    )
    return ["evaluate", "net.pt", "--data", "data", "--arch", "net.py:net", *more]


def with_data(make: Callable[[Path], Any], count: int, *more: str) -> Callable[[Path], list[str]]:
    def made(folder: Path) -> list[str]:
        make(folder / "data")
        return scores(folder, count, *more)

    return made


def with_names(folder: Path) -> list[str]:
    (folder / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    for name, shade in (("ant", 0), ("cat", 170), ("dog", 255)):
        image(folder / "data" / name / "0.png", shade)
        image(folder / "data" / name / "1.png", shade)
    return scores(folder, 4, "--classes", "names.txt", "--split", "train")


MODELS_NAMES = [
    Row(
        "folders of some of the model's classes",
        lambda f: labels(images(f), **hf_said(*ANIMALS)),
        [0, 2, 3],
    ),
    Row(
        "folders named with other case, spaces, hyphens and composed letters",
        lambda f: labels(
            images(f, ("Great-White_Shark", "cafe\u0301", "GreyWolf")),
            **hf_said("caf\u00e9", "grey wolf", "great white shark"),
        ),
        [2, 1, 0],
    ),
    Row(
        "folders named by one of several synonyms",
        lambda f: labels(
            images(f, ("goldfish", "tench")),
            **hf_said("tench, Tinca tinca", "goldfish, Carassius auratus"),
        ),
        [1, 0],
    ),
    refused(
        "folders that are none of the model's classes",
        lambda f: labels(images(f, ("Hund", "Katze")), **hf_said("cat", "dog")),
        r"model's 2 \(cat, dog\), got Hund, Katze; .*--classes FILE.*--read order=text",
    ),
    refused(
        "a name that two of the model's classes have",
        lambda f: labels(images(f, ("crane", "ox")), **hf_said("crane", "ox", "crane")),
        r"'crane' matches several of the model's classes \(0, 2\)",
    ),
    refused(
        "two folders of one of the model's classes",
        lambda f: labels(images(f, ("Cat", "cat", "dog")), **hf_said("cat", "dog")),
        "'Cat' and 'cat' of .* are both the model's class 0",
    ),
    Row(
        "clips of some of the model's classes, named otherwise",
        lambda f: clip_labels(
            clips(f, ("ApplyEyeMakeup", "YoYo")), **hf_said("apply eye makeup", "archery", "yo yo")
        ),
        [0, 2],
    ),
    Row(
        "names that the user gives in place of the model's",
        lambda f: labels(images(f), classes=("dog", "cat", "ant"), **hf_said(*"xyz")),
        [2, 1, 0],
    ),
    refused(
        "a file of three names for a model of four",
        lambda f: labels(images(f), classes=SOME, **hf_said(*ANIMALS)),
        r"match the model's 4 \(ant, bee, cat, dog\), got 3",
    ),
    refused(
        "a count in text order of three folders for a model of four",
        lambda f: labels(images(f), order="text", **hf_said(*ANIMALS)),
        "match the model's 4",
    ),
    refused(
        "three folders, and a model of four outputs without names",
        lambda f: adapt(of_outputs(4)).samples(load_data(images(f))),
        r"model's 4 classes, got 3 \(ant, cat, dog\).*--classes FILE",
    ),
    Command(
        "three folders, and a model of four outputs, on the command line",
        with_data(images, 4, "--split", "train"),
        2,
        "model's 4 classes, got 3",
    ),
    Command("three folders, and a file with the four names", with_names, 0, "ACC 100"),
    refused(
        "data that was loaded in another order than the model's",
        lambda f: adapt(named_model("dog", "cat", "ant")).samples(load_data(images(f))),
        "got 'ant' as 0 of ant, cat, dog, while the model's classes are dog, cat, ant",
    ),
]


def named_model(*names: str) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=4,
            hidden_sizes=[4],
            depths=[1],
            layer_type="basic",
            id2label=dict(enumerate(names)),
            label2id={name: label for label, name in enumerate(names)},
        )
    )


AS_TEXT = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]  # in the order in which folders are read

ORDER = [
    Row("clip folders 0 to 11", lambda f: clip_labels(clips(f, NUMBERS)), AS_TEXT),
    Row("cloud folders 0 to 11", lambda f: cloud_labels(clouds(f, NUMBERS)), AS_TEXT),
    Row(
        "image folders 0 to 11, counted as ImageFolder counts them",
        lambda f: labels(images(f, NUMBERS), order="text"),
        list(range(12)),
    ),
    Row(
        "image folders 0 to 11 are said to be taken by number",
        lambda f: "taken as labels" in told(images(f, NUMBERS)) and "order=text" in told(f),
        True,
    ),
    Row(
        "clip folders of numbers that are the model's names",
        lambda f: clip_labels(clips(f, ("3", "7")), **hf_said("7", "5", "3")),
        [2, 0],
    ),
    refused(
        "numbers asked for where folders have names",
        lambda f: labels(images(f), order="number"),
        "order=number .* must be integers, got ant, cat, dog",
    ),
    refused(
        "folders 1 and 01",
        lambda f: labels(images(f, ("01", "1"))),
        "must be different, got 01, 1",
    ),
    refused(
        "an order of labels that stand in an archive without names",
        lambda f: labels(archive(f / "set.npz"), order="text"),
        "order=text has no effect on",
    ),
]


def with_litter(folder: Path) -> Path:
    image(folder / "__MACOSX" / "cat" / "._0.png")
    image(folder / "@eaDir" / "0.png")
    (folder / "empty").mkdir()
    image(folder / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    return images(folder)


def with_file(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("no image")
    return folder


def flat(folder: Path) -> Path:
    image(folder / "0.png")
    return folder


FOLDERS = [
    Row(
        "folders that an archiver, a disk station, a notebook and nobody filled",
        lambda f: labels(with_litter(f)),
        [0, 1, 2],
    ),
    Row(
        "an empty folder is named",
        lambda f: "without images: empty" in told(with_litter(f)),
        True,
    ),
    Row(
        "a clip folder that is empty",
        lambda f: (f / "aaa").mkdir() or clip_labels(clips(f, SOME)),
        [0, 1, 2],
    ),
    Row(
        "a cloud folder that an archiver left",
        lambda f: (f / "__MACOSX").mkdir() or cloud_labels(clouds(f, SOME)),
        [0, 1, 2],
    ),
    *[
        Row(
            f"images that end in {suffix}",
            lambda f, suffix=suffix: image(f / "a" / f"0{suffix}") or labels(images(f)),
            [0, 1, 2, 3],
        )
        for suffix in (".jfif", ".JPE", ".avif")
    ],
    refused(
        "images of a kind that is not read",
        lambda f: labels(with_file(f, "cat/0.heic")),
        "got no images but 1 .heic; supported suffixes are",
    ),
    Row(
        "files that are left out are counted",
        lambda f: "not one of images: 1 .heic" in told(with_file(images(f), "cat/1.heic")),
        True,
    ),
    refused(
        "images directly in the folder",
        lambda f: labels(flat(f)),
        "got 1 images directly in it, which have no label; sort them into one folder per class",
    ),
    refused(
        "images directly in the folder of a part",
        lambda f: flat(f / "train") and labels(f),
        "train must hold one folder of images per class, got 1 images directly",
    ),
    refused(
        "class folders a level too deep",
        lambda f: images(f / "images") and labels(f),
        r"only the folder 'images' with the folders ant, cat, dog; .*give \S+images",
    ),
    Row(
        "a class that is called train",
        lambda f: labels(images(f, ("car", "plane", "train"))),
        [0, 1, 2],
    ),
    Row(
        "folders Train and Test",
        lambda f: images(f / "Test") and labels(images(f / "Train").parent, split="test"),
        [0, 1, 2],
    ),
    refused(
        "a part for training alone where the test part is asked for",
        lambda f: images(f / "val") and labels(f, split="train"),
        "has no split 'train', only 'val'",
    ),
    Row(
        "a test part that is called validation is named",
        lambda f: "using 'validation'" in told(images(f / "validation").parent, split="test"),
        True,
    ),
]


def as_strings(folder: Path) -> Path:
    return rows(folder, {"label": value("string")}, label=["dog", "ant", "dog"])


def of_two_columns(folder: Path) -> Path:
    kinds = {"coarse": labelled("pet", "insect"), "fine": labelled(*SOME)}
    return rows(folder, kinds, coarse=[0, 1, 0], fine=[2, 0, 1])


DATASETS = [
    Row("labels that are names", lambda f: labels(as_strings(f)), [1, 0, 1]),
    Row(
        "labels that are names of the model's classes",
        lambda f: labels(as_strings(f), **hf_said("dog", "cat", "ant")),
        [0, 2, 0],
    ),
    refused(
        "a row without a label",
        lambda f: labels(rows(f, {"label": labelled(*SOME)}, label=[0, None, 1])),
        "must have a label in 'label', got none in 1 rows, the first of which is 1",
    ),
    refused(
        "a test part whose labels are kept secret",
        lambda f: labels(rows(f, {"label": labelled(*SOME)}, label=[-1, -1, -1])),
        "got none in 3 rows",
    ),
    refused(
        "several labels an image",
        lambda f: labels(
            rows(f, {"labels": datasets_list(value("int64"))}, labels=[[0], [0, 1], []])
        ),
        "images with several labels are not supported",
    ),
    Row(
        "of two label columns the one that fits the model",
        lambda f: labels(of_two_columns(f), **hf_said(*SOME)),
        [2, 0, 1],
    ),
    refused(
        "two label columns, and nothing to choose by",
        lambda f: labels(of_two_columns(f)),
        "got coarse, fine; say which: --read label=coarse",
    ),
    Row(
        "a label column that is named", lambda f: labels(of_two_columns(f), label="fine"), [2, 0, 1]
    ),
    Row(
        "a part validation in place of test",
        lambda f: labels(
            rows(f, {"label": labelled(*SOME)}, "validation", label=[1, 0, 1]), split="test"
        ),
        [1, 0, 1],
    ),
    refused(
        "a column of a folder",
        lambda f: labels(images(f), label="fine"),
        "label=fine has no effect on",
    ),
]


def datasets_list(kind: Any) -> Any:
    import datasets

    return datasets.List(kind)


ARCHIVES = [
    Row(
        "class names as a map of labels",
        lambda f: (
            load_data(beside('{"0": "a", "3": "d", "1": "b", "2": "c"}')(f)).classes[3] == "d"
        ),
        True,
    ),
    refused("class names that are no JSON", lambda f: labels(beside("[")(f)), "cannot be read"),
    refused("class names that are null", lambda f: labels(beside("null")(f)), "got null"),
    refused(
        "a class without a name",
        lambda f: labels(beside('[{"name": "a"}, {"id": 1}]')(f)),
        r"must have a name for each label, got \{\"id\": 1\} for 1",
    ),
    refused(
        "fewer class names than labels",
        lambda f: labels(beside('["a", "b"]')(f)),
        "got 2 names .* and a label 3",
    ),
    Row(
        "class names in a text file",
        lambda f: load_data(beside("a\nb\nc\nd\n", "classes.txt")(f)).classes[3] == "d",
        True,
    ),
    Row(
        "an archive of Keras",
        lambda f: labels(
            saved(
                f / "mnist.npz",
                x_train=np.zeros((2, 4, 4), np.uint8),
                y_train=np.array([1, 0], np.uint8),
                x_test=np.zeros((3, 4, 4), np.uint8),
                y_test=np.array([0, 1, 1], np.uint8),
            ),
            split="test",
        ),
        [0, 1, 1],
    ),
    Row(
        "an archive of MedMNIST",
        lambda f: labels(
            saved(
                f / "pathmnist.npz",
                train_images=np.zeros((2, 4, 4, 3), np.uint8),
                train_labels=np.array([[1], [0]], np.uint8),
                val_images=np.zeros((1, 4, 4, 3), np.uint8),
                val_labels=np.array([[1]], np.uint8),
            )
        ),
        [1, 0],
    ),
    Row(
        "labels as rows with a single one",
        lambda f: labels(archive(f / "set.npz", labels=np.eye(4)[[2, 0, 1, 3]])),
        [2, 0, 1, 3],
    ),
    Row(
        "labels as names",
        lambda f: labels(archive(f / "set.npz", labels=np.array(["b", "a", "c", "a"]))),
        [1, 0, 2, 0],
    ),
    Row(
        "channels first",
        lambda f: tuple(
            load_data(archive(f / "set.npz", images=np.zeros((4, 3, 6, 5), np.uint8))).inputs.shape
        ),
        (4, 3, 6, 5),
    ),
    Row(
        "labels of clouds as a column",
        lambda f: load_clouds(
            saved(f / "a.npz", points=np.random.rand(2, 8, 3), labels=np.array([[1], [0]]))
        ).labels.tolist(),
        [1, 0],
    ),
    refused(
        "a blank among the class names of clouds",
        lambda f: (
            (f / "classes.txt").write_text("a\n\nb\n")
            and load_clouds(saved(f / "a.npz", points=np.ones((2, 8, 3)), labels=np.array([1, 0])))
        ),
        "must have a name for each label",
    ),
]


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


ROWS = [*MODELS_NAMES, *ORDER, *FOLDERS, *DATASETS, *ARCHIVES]
