"""Every form of detection data gives the same samples, and bad data one clear line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmdefense.data.detection import Detections, DetectionSamples, random_boxed_view
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.kernels.hooks import mode
from mmdefense.metrics.detection import (
    average_precisions,
    box_iou,
    found,
    mean_average_precision,
)
from mmdefense.notes import Note
from mmdefense.registry import adapt, load
from mmdefense.report.panels import markup
from mmdefense_tasks.detection_scenes import CLASSES, digit_scenes
from mmdefense_tasks.detection_victims import small_fcos, small_rt_detr, small_yolos
from mmdefense_tasks.object_detection import load_detection

WIDTH, HEIGHT = 40, 20
BOXES = [[[4, 2, 12, 10], [20, 4, 40, 20]], [[0, 0, 8, 8]], []]
NAMES = [["cat", "dog"], ["dog"], []]


def write_images(folder):
    folder.mkdir(parents=True)
    for index in range(3):
        pixels = np.full((HEIGHT, WIDTH, 3), 60 * (index + 1), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture
def lines(tmp_path):
    write_images(tmp_path / "lines")
    rows = [
        {"file": f"{index}.png", "boxes": BOXES[index],
         "labels": [("cat", "dog").index(name) for name in NAMES[index]]}
        for index in range(3)
    ]  # fmt: skip
    (tmp_path / "lines/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lines/classes.json").write_text('["cat", "dog"]')
    return tmp_path / "lines"


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "voc"
    write_images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/trainval.txt").write_text("0\n1\n2\n")
    for index in range(3):
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for (x1, y1, x2, y2), name in zip(BOXES[index], NAMES[index], strict=True)
        )
        (folder / f"Annotations/{index}.xml").write_text(f"<annotation>{objects}</annotation>")
    return folder


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    write_images(folder / "images")
    (folder / "annotations").mkdir()
    ids = {"cat": 7, "dog": 9}
    held = {
        "categories": [{"id": value, "name": name} for name, value in ids.items()],
        "images": [{"id": 10 + index, "file_name": f"{index}.png"} for index in range(3)],
        "annotations": [
            {"image_id": 10 + index, "category_id": ids[name],
             "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
            for index in range(3)
            for box, name in zip(BOXES[index], NAMES[index], strict=True)
        ],
    }  # fmt: skip
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(held))
    return folder


@pytest.fixture(params=["lines", "voc", "coco"])
def folder(request):
    return request.getfixturevalue(request.param)


def test_every_form_gives_the_same_samples(folder):
    samples = load_detection(folder, image_size=(HEIGHT, WIDTH))
    assert samples.classes == ("cat", "dog")
    assert samples.images.shape == (3, 3, HEIGHT, WIDTH)
    assert samples.images[:, 0, 0, 0].tolist() == [60, 120, 180]
    for index in range(3):
        assert samples.boxes[index].tolist() == BOXES[index]
        assert [samples.classes[label] for label in samples.labels[index]] == NAMES[index]


def test_images_keep_their_proportions_and_boxes_follow(lines):
    samples = load_detection(lines, image_size=(20, 20), channels=1)
    assert samples.images.shape == (3, 1, 20, 20)
    assert samples.images[0, 0, :10].min() == 60
    assert samples.images[0, 0, 10:].max() == 0
    assert samples.boxes[0].tolist() == [[2, 1, 6, 5], [10, 2, 20, 10]]


def test_labels_follow_the_models_class_names(lines):
    samples = load_detection(lines, classes=("dog", "bird", "cat"))
    assert samples.labels[0].tolist() == [2, 0]
    with pytest.raises(BadInputError, match=r"must be among the model's 1 \(dog\), got cat"):
        load_detection(lines, classes=("dog",))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([12, 2, 4, 10], "reversed"),
        ([4, 2, 60, 10], r"outside the image \(40x20 pixels\)"),
        ([-3, 2, 6, 10], "outside the image"),
    ],
)
def test_a_box_that_cannot_be_is_refused(lines, box, message):
    (lines / "train.jsonl").write_text(json.dumps({"file": "0.png", "boxes": [box], "labels": [0]}))
    with pytest.raises(BadInputError, match=f"0.png is {message}"):
        load_detection(lines)


def test_damaged_sets_are_refused(lines, voc, coco, tmp_path):
    (lines / "test.jsonl").touch()
    with pytest.raises(BadInputError, match="must hold at least one image"):
        load_detection(lines, split="test")
    (lines / "train.jsonl").write_text('{"file": "0.png", "boxes": [], "labels": [5]}')
    with pytest.raises(BadInputError, match=r"line 1 of .* must have a label for each box"):
        load_detection(lines)
    (lines / "train.jsonl").write_text('{"file": "none.png", "boxes": [], "labels": []}')
    with pytest.raises(BadInputError, match=r"none.png cannot be read: it does not exist"):
        load_detection(lines)
    with pytest.raises(BadInputError, match="must hold a list for 'test'"):
        load_detection(voc, split="test")
    (voc / "Annotations/1.xml").write_text("<annotation>")
    with pytest.raises(BadInputError, match="cannot be read"):
        load_detection(voc)
    (voc / "Annotations/1.xml").write_text(
        "<annotation><object><name>cat</name><bndbox/></object></annotation>"
    )
    with pytest.raises(BadInputError, match="give each box xmin"):
        load_detection(voc)
    (coco / "annotations/instances_train2017.json").write_text('{"images": []}')
    with pytest.raises(BadInputError, match="must be COCO json"):
        load_detection(coco)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="it has nothing"):
        load_detection(tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split must"),
        ({"channels": 2}, "channels must"),
        ({"image_size": (0, 3)}, "image_size must"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(BadInputError, match=message):
        load_detection(tmp_path, **options)


def test_an_unknown_name_is_refused():
    with pytest.raises(BadInputError, match="must be a folder or one of digit-scenes"):
        load_detection("nothing-of-that-name")


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "counts", "classes"), [("bccd_voc", (292, 72), 3), ("coco128_416", (96, 32), 80)]
)
def test_real_sets_are_read(name, counts, classes):
    for split, count in zip(("train", "test"), counts, strict=True):
        samples = load_detection(name, split=split, image_size=(48, 64))
        assert samples.images.shape == (count, 3, 48, 64)
        assert len(samples.classes) == classes
    assert name in load("tasks", "object-detection")().data()


def test_scenes_are_the_same_each_time_and_hold_their_digits():
    scenes = digit_scenes("test", count=12)
    assert scenes.fingerprint() == digit_scenes("test", count=12).fingerprint()
    assert scenes.fingerprint() != digit_scenes("train", count=12).fingerprint()
    assert scenes.images.shape == (12, 1, 48, 48)
    assert all(1 <= len(boxes) <= 3 for boxes in scenes.boxes)
    for image, boxes in zip(scenes.images, scenes.boxes, strict=True):
        for left, top, right, bottom in boxes.long().tolist():
            inside = image[0, top:bottom, left:right]
            assert inside.max() > 0.5
            assert inside.std() > 0.1
    assert scenes.classes == CLASSES


def test_a_view_moves_the_boxes_along():
    image = torch.zeros(64, 1, 40, 60)
    image[:, :, 10:22, 15:35] = 1
    boxes = (torch.tensor([[15.0, 10.0, 35.0, 22.0]]),) * 64
    labels = (torch.tensor([1]),) * 64
    generator = torch.Generator().manual_seed(0)
    views, moved, kept = random_boxed_view(
        image, boxes, labels, generator, light=0, erase=0, flip=True
    )
    assert not torch.equal(views, image)
    changed = 0
    for view, box, label in zip(views, moved, kept, strict=True):
        assert label.tolist() == [1]
        changed += not torch.equal(box, boxes[0])
        lit = (view[0] > 0.5).nonzero()
        drawn = torch.cat([lit.amin(0).flip(0), lit.amax(0).flip(0) + 1]).float()
        assert (drawn - box[0]).abs().max() <= 1.0
    assert 20 < changed < 64
    again = random_boxed_view(
        image, boxes, labels, torch.Generator().manual_seed(0), light=0, erase=0, flip=True
    )
    torch.testing.assert_close(again[0], views)


def test_a_view_hides_parts_of_objects():
    box = torch.tensor([[20.0, 10.0, 36.0, 26.0]])
    views, _, _ = random_boxed_view(
        torch.zeros(64, 1, 40, 40), (box,) * 64, (torch.tensor([0]),) * 64,
        torch.Generator().manual_seed(0), scale=0, shift=0, light=0, erase=1, keep=0,
    )  # fmt: skip
    inside = (views[:, 0, 10:26, 20:36] > 0).flatten(1)
    assert inside.any(1).all()
    assert inside.float().mean() < 0.3


def test_a_view_drops_objects_that_leave_the_image():
    boxes = (torch.tensor([[0.0, 0.0, 4.0, 4.0], [18.0, 18.0, 22.0, 22.0]]),) * 200
    labels = (torch.tensor([0, 1]),) * 200
    _, moved, kept = random_boxed_view(
        torch.rand(200, 1, 40, 40), boxes, labels, torch.Generator().manual_seed(0), shift=0.3
    )
    assert {tuple(part.tolist()) for part in kept} == {(0, 1), (1,)}
    assert all(len(box) == len(label) for box, label in zip(moved, kept, strict=True))
    everything = torch.cat(moved)
    assert everything.min() >= 0
    assert everything.max() <= 40
    assert (everything[:, 2:] > everything[:, :2]).all()


TWO = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
NOTHING = Detections(TWO[:0], torch.tensor([], dtype=torch.int64), torch.zeros(0))


def test_iou_and_found():
    labels = torch.tensor([0, 1])
    torch.testing.assert_close(
        box_iou(TWO[:1], torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [50, 50, 60, 60]])),
        torch.tensor([[1.0, 1 / 3, 0.0]]),
    )
    right = Detections(TWO, labels, torch.tensor([0.9, 0.3]))
    assert found(right, TWO, labels).tolist() == [True, False]  # the other is not sure enough
    assert found(right, TWO, labels, confidence=0.2).tolist() == [True, True]
    assert found(NOTHING, TWO, labels).tolist() == [False, False]


def test_average_precision_in_one_image():
    labels = torch.tensor([0, 0])

    def one(boxes, scores, labels=labels, truth=(TWO, labels)):
        detected = Detections(boxes, labels[: len(boxes)], torch.tensor(scores))
        return average_precisions([(detected, *truth)])[0]

    assert one(TWO, [0.9, 0.3]) == 1.0
    threefold = torch.zeros(3, dtype=torch.int64)
    twice = one(TWO[[0, 0, 1]], [0.9, 0.8, 0.4], threefold)
    assert twice == pytest.approx((1 + 2 / 3) / 2)  # a second one on an object is a false one
    assert one(TWO + 50, [0.9, 0.8]) == 0.0
    assert one(TWO, [0.9, 0.3], labels=labels + 1) == 0.0
    nothing = (TWO[:0], labels[:0])
    assert one(TWO, [0.9, 0.3], truth=nothing) == pytest.approx(0.1)
    assert average_precisions([(NOTHING, *nothing), (NOTHING, TWO, labels)]) == [1.0, 0.0]


def test_a_surer_error_in_another_image_costs_precision():
    label = torch.tensor([0])
    right = Detections(TWO[:1], label, torch.tensor([0.6]))
    wrong = Detections(TWO[:1] + 50, label, torch.tensor([0.9]))
    other = Detections(TWO[:1] + 50, label + 1, torch.tensor([0.9]))  # of another class
    truth = (TWO[:1], label)
    assert average_precisions([(right, *truth), (wrong, *truth)]) == [0.5, 0.0]
    assert average_precisions([(right, *truth), (other, *truth)]) == [1.0, 0.0]


def test_shares_of_the_average_precision_add_up_to_that_of_each_class():
    """Against ranking by loops, on random boxes that lie on objects or do not."""
    draw = torch.Generator().manual_seed(0)
    images = []
    for _ in range(6):
        chosen = torch.randint(0, 2, (5,), generator=draw)
        far = 50.0 * (torch.rand(5, generator=draw) < 0.3)
        scores = torch.rand(5, generator=draw)
        labels = torch.randint(0, 2, (5,), generator=draw)
        detected = Detections(TWO[chosen] + far[:, None], labels, scores)
        images.append((detected, TWO, torch.randint(0, 2, (2,), generator=draw)))
    ranked = sorted(
        ((float(d.scores[k]), n, k) for n, (d, _, _) in enumerate(images) for k in range(5)),
        reverse=True,
    )
    taken, seen, precision = set(), {0: 0, 1: 0}, {}
    right = {0: 0, 1: 0}
    for _, n, k in ranked:
        detected, boxes, labels = images[n]
        label = int(detected.labels[k])
        seen[label] += 1
        for m in range(2):
            on = torch.equal(detected.boxes[k], boxes[m]) and int(labels[m]) == label
            if on and (n, m) not in taken:
                taken.add((n, m))
                right[label] += 1
                precision[n, m] = right[label] / seen[label]
    expected = [sum(precision.get((n, m), 0) for m in range(2)) / 2 for n in range(6)]
    assert average_precisions(images) == pytest.approx(expected)
    assert 0 < sum(expected) < 6


class Oracle:
    """Finds what is there, and a false object less surely."""

    def __init__(self, model):
        self.model = model

    def detect(self, batch):
        false = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        return [
            Detections(
                torch.cat([boxes, false]),
                torch.cat([labels, torch.tensor([0])]),
                torch.cat([torch.full((len(boxes),), 0.9), torch.tensor([0.1])]),
            )
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]


def test_mean_average_precision_is_that_of_coco():
    samples = digit_scenes("test", count=8)
    values = mean_average_precision(Oracle(torch.nn.Identity()), samples)
    assert values == {"map50": pytest.approx(1.0), "map": pytest.approx(1.0)}


def test_without_its_package_the_metric_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.detection", None)
    samples = digit_scenes("test", count=1)
    with pytest.raises(UnsupportedError, match=r"needs the packages 'pycocotools'"):
        mean_average_precision(Oracle(torch.nn.Identity()), samples)


def test_the_task_describes_its_victims_and_shows_a_trigger():
    task = load("tasks", "object-detection")()
    samples = digit_scenes("test", count=6)
    assert task.describe(samples) == {"classes": 4, "channels": 1, "size": (48, 48)}
    names = [case.name for case in task.cases()]
    assert len(names) == len(set(names))
    assert task.cases()[0].data == "digit-scenes"
    attack = load("attacks", task.cases()[0].attack)()
    triggered = attack.triggered(samples, None)
    (grid,) = task.show(triggered.clean, triggered.samples).panels()
    assert len(grid.rows) == 3
    assert "as the attacker wants it" in markup(grid, "p")


@pytest.mark.parametrize("build", [small_fcos, small_rt_detr, small_yolos])
def test_victims_are_detectors_for_their_image_size(build):
    model = build(3, 1, (48, 64)).eval()
    adapter = adapt(model)
    samples = DetectionSamples(
        torch.rand(2, 1, 48, 64),
        (torch.tensor([[4.0, 4, 20, 20]]),) * 2,
        (torch.tensor([2]),) * 2,
    )
    assert adapter.samples(samples) is not None
    assert adapter.per_sample_loss(samples.everything()).shape == (2,)
    assert model.training is False


IDS = {1: "cat", 2: "dog", 4: "owl"}


@pytest.fixture
def gaps(tmp_path):
    """COCO json with the category ids 1, 2 and 4, an object of each in every image."""
    write_images(tmp_path / "images")
    corners = {1: [0, 0], 2: [12, 0], 4: [24, 8]}
    held = {
        "categories": [{"id": number, "name": name} for number, name in IDS.items()],
        "images": [{"id": index, "file_name": f"{index}.png"} for index in range(3)],
        "annotations": [
            {"image_id": index, "category_id": number, "bbox": [*corner, 10, 10]}
            for index in range(3)
            for number, corner in corners.items()
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps(held))
    return tmp_path


@pytest.mark.parametrize(("outputs", "offset"), [(5, None), (5, 1), (91, None), (91, 1)])
def test_coco_ids_with_gaps_are_the_numbers_of_a_model_that_has_them(gaps, outputs, offset):
    """Three classes have AP 1.0 where the model answers with ids, and its loss gets the ids."""
    model = small_fcos(outputs, 3, (HEIGHT, WIDTH)).eval()
    adapter = adapt(model) if offset is None else adapt(model, offset=offset)
    with pytest.warns(Note, match="using the COCO category ids"):
        samples = load_detection(gaps, stated=adapter.reading(), image_size=(HEIGHT, WIDTH))
    boxes = torch.tensor([[0.0, 0, 10, 10], [12, 0, 22, 10], [24, 8, 34, 18]])
    targets = {"boxes": boxes, "labels": torch.tensor(list(IDS))}
    batch = adapter.samples(samples).take(torch.tensor([0]))
    with mode(model, train=False):
        model.training = True
        expected = sum(model(list(batch.images), [targets]).values())
    torch.testing.assert_close(adapter.per_sample_loss(batch)[0], expected)
    model.forward = lambda images: [targets | {"scores": torch.ones(3)} for _ in images]
    measured = mean_average_precision(adapter, adapter.samples(samples))
    assert measured == {"map50": pytest.approx(1.0), "map": pytest.approx(1.0)}
    assert samples.labels[0].tolist() == [number - (offset or 0) for number in IDS]


def test_as_many_classes_as_the_model_has_are_counted(gaps):
    adapter = adapt(small_fcos(3, 3, (HEIGHT, WIDTH)))
    samples = load_detection(gaps, stated=adapter.reading())
    assert samples.labels[0].tolist() == [0, 1, 2]
    forced = load_detection(gaps, stated={"numbers": range(1, 6)}, labels="dense")
    assert forced.labels[0].tolist() == [0, 1, 2]
    assert forced.classes == ("cat", "dog", "owl", "(no name) 3", "(no name) 4")


def test_data_loaded_without_the_model_must_fit_it(gaps):
    adapter = adapt(small_fcos(5, 3, (HEIGHT, WIDTH)))
    with pytest.raises(BadInputError, match="the model's 5 classes, got 3: cat, dog, owl"):
        adapter.samples(load_detection(gaps, image_size=(HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "names"}, "labels must be one of ids, dense"),
        ({"labels": "ids", "classes": ("cat", "dog")}, "classes=.* has no effect"),
    ],
)
def test_wrong_ways_to_number_are_refused(gaps, options, message):
    with pytest.raises(BadInputError, match=message):
        load_detection(gaps, **options)


def test_ids_are_of_coco_json_alone(lines):
    with pytest.raises(BadInputError, match="labels=ids needs COCO json"):
        load_detection(lines, labels="ids")
