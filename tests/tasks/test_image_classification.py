"""Every form of image data gives the same samples, and bad data one clear line."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mmdefense.errors import BadInputError
from mmdefense.notes import Note
from mmdefense.registry import adapt, load
from mmdefense_tasks.image_classification import load_data, load_digits
from mmdefense_tasks.image_sets import StreamedImages, squashed
from mmdefense_tasks.victims import SmallResNet

CLASSES = ("bird", "cat", "dog")
SIDE = 6


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (9, SIDE, SIDE, 3), dtype=np.uint8)


LABELS = np.arange(9) // 3  # in the order in which a folder per class is read


@pytest.fixture
def folder(tmp_path, pixels):
    write_folder(tmp_path / "set", pixels)
    return tmp_path / "set"


def write_folder(where, pixels, classes=CLASSES):
    for index, (image, label) in enumerate(zip(pixels, LABELS, strict=True)):
        path = where / classes[label] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_archive(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def encoded(pixels):
    parts = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        parts.append(np.frombuffer(file.getvalue(), np.uint8))
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return {"jpeg": np.concatenate(parts), "offsets": offsets}


def refused(where, **options):
    with pytest.raises(BadInputError) as caught:
        load_data(where, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_holds(samples, pixels):
    batch = samples.take(torch.arange(len(pixels)))
    expected = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(batch.inputs, expected, rtol=0, atol=0)
    assert batch.labels.tolist() == LABELS.tolist()


def test_digits_are_real_scans_in_fixed_parts():
    train, test = load_digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.inputs.shape[1:] == (1, 16, 16)
    assert train.inputs.min() == 0
    assert train.inputs.max() == 1
    assert test.labels.bincount().min() >= 35
    assert load_digits()[1].fingerprint() == test.fingerprint()
    assert load_digits(seed=1)[1].fingerprint() != test.fingerprint()
    whole = torch.cat([train.inputs, test.inputs]).flatten(1).unique(dim=0)
    assert len(whole) == 1797  # no image is in both parts


def test_the_task_is_found_by_name():
    task = load("tasks", "image-classification")
    train, _ = task.embedded()
    model = task.victim(10)
    assert adapt(model, example=train.inputs[:1]).chance == 0.1
    assert len(task.load("digits", split="test")) == 359
    assert task.metric == "accuracy"


def test_a_folder_per_class(folder, pixels):
    samples = load_data(folder)
    assert_holds(samples, pixels)
    assert samples.classes == CLASSES
    assert samples.inputs.dtype == torch.uint8


def test_train_and_test_folders(tmp_path, pixels):
    write_folder(tmp_path / "set" / "train", pixels)
    assert "'test'" in refused(tmp_path / "set", split="test")
    write_folder(tmp_path / "set" / "val", pixels[::-1])
    assert_holds(load_data(tmp_path / "set"), pixels)
    assert_holds(load_data(tmp_path / "set", split="test"), pixels[::-1])


def test_folders_named_by_numbers_are_labels(tmp_path, pixels):
    write_folder(tmp_path / "set", pixels, ("2", "10", "00001"))
    labels = load_data(tmp_path / "set").labels
    assert sorted(labels.tolist()) == [1] * 3 + [2] * 3 + [10] * 3


@pytest.mark.parametrize("form", ["pixels", "encoded"])
def test_archives(tmp_path, pixels, form, monkeypatch):
    arrays = {"images": pixels} if form == "pixels" else encoded(pixels)
    path = tmp_path / "root" / "mine" / "train.npz"
    write_archive(path, labels=LABELS.astype(np.uint8), **arrays)
    (path.parent / "classes.json").write_text(json.dumps([{"name": name} for name in CLASSES]))
    monkeypatch.setenv("MMDEFENSE_DATA", str(tmp_path / "root"))
    for where in (path, path.parent, "mine"):
        samples = load_data(where)
        assert_holds(samples, pixels)
        assert samples.classes == CLASSES


def test_grey_images_have_one_channel_and_can_be_given_three(tmp_path, pixels):
    grey = pixels[..., 0]
    write_archive(tmp_path / "a.npz", images=grey, labels=LABELS)
    assert load_data(tmp_path / "a.npz").inputs.shape == (9, 1, SIDE, SIDE)
    three = load_data(tmp_path / "a.npz", channels=3).inputs
    assert torch.equal(three, torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_data_set_of_the_library_saved_to_disk(tmp_path, pixels, split):
    import datasets

    features = datasets.Features(
        {
            "number": datasets.Value("int64"),
            "picture": datasets.Image(),
            "what": datasets.ClassLabel(names=list(CLASSES)),
        }
    )
    rows = {
        "number": list(range(9)),
        "picture": [Image.fromarray(image) for image in pixels],
        "what": LABELS.tolist(),
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({split: data}).save_to_disk(tmp_path / "set")
    samples = load_data(tmp_path / "set", split=split)
    assert_holds(samples, pixels)
    assert samples.classes == CLASSES
    data.save_to_disk(tmp_path / "one")
    assert_holds(load_data(tmp_path / "one", split=split), pixels)


def test_a_data_set_without_images_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "set")
    assert "column of type Image" in refused(tmp_path / "set")


def test_images_are_resized_on_request_only(folder, pixels):
    Image.fromarray(pixels[0]).resize((9, 4)).save(folder / "cat" / "odd.png")
    message = refused(folder)
    assert "odd.png" in message
    assert "image_size" in message
    assert load_data(folder, image_size=5).inputs.shape == (10, 3, 5, 5)


def test_images_of_several_sizes_are_resized_where_a_size_is_at_hand(folder):
    even = load_data(folder, fit=squashed((5, 6)))
    assert even.inputs.shape == load_data(folder).inputs.shape
    first = next(path for path in sorted(folder.rglob("*.png")))
    Image.open(first).resize((7, 9)).save(first)
    with pytest.raises(BadInputError, match="same size, or be resized"):
        load_data(folder)
    assert load_data(folder, fit=squashed((5, 6))).inputs.shape[-2:] == (5, 6)
    assert load_data(folder, fit=squashed((5, 6)), image_size=4).inputs.shape[-2:] == (4, 4)


def test_labels_follow_the_models_class_names(folder):
    samples = load_data(folder, classes=("Dog", "fish", "Bird", "Cat"))
    assert samples.labels.tolist() == [2] * 3 + [3] * 3 + [0] * 3
    assert samples.classes == ("Dog", "fish", "Bird", "Cat")


def test_classes_that_the_model_does_not_know_are_named(folder):
    assert "got cat" in refused(folder, classes=("bird", "dog", "fish"))
    assert "bird, cat, dog" in refused(folder, classes=[f"c{n}" for n in range(5)])


def test_ids_of_wordnet_count_the_classes_of_imagenet(tmp_path, pixels):
    ids = ("n01440764", "n01443537", "n01484850")
    write_folder(tmp_path / "set", pixels, ids)
    said = {"classes": ("tench, Tinca tinca", "goldfish", "great white shark")}
    with pytest.warns(Note, match="WordNet ids"):
        assert load_data(tmp_path / "set", stated=said).labels.tolist() == LABELS.tolist()
    (tmp_path / "set" / ids[1]).rename(tmp_path / "gone")
    assert "got n01440764, n01484850" in refused(tmp_path / "set", stated=said)


def test_class_names_of_another_language_need_a_word(folder):
    said = {"classes": ("Vogel", "Katze", "Hund")}
    assert "(Vogel, Katze, Hund), got bird, cat, dog" in refused(folder, stated=said)
    counted = load_data(folder, stated=said, order="text")
    assert counted.labels.tolist() == LABELS.tolist()
    named = load_data(folder, stated=said, classes=("bird", "dog", "cat"))
    assert named.labels.tolist() == [0] * 3 + [2] * 3 + [1] * 3


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_corrupt_image_is_named(folder, content):
    (folder / "cat" / "broken.png").write_bytes(content)
    assert "broken.png cannot be decoded" in refused(folder)


def test_a_truncated_image_is_named(folder):
    path = folder / "dog" / "08.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "08.png cannot be decoded" in refused(folder)


def test_bad_folders(tmp_path, pixels):
    assert "none found" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "got no image" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "cat").mkdir()
    assert "got no image" in refused(tmp_path / "empty")


def test_colour_images_do_not_fit_one_channel(folder):
    assert "must have 1 channel, got 3" in refused(folder, channels=1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "'labels'"),
        ({"labels": np.zeros(2, np.int64)}, "'images'"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int)}, "uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.full(2, 0.5)}, "integer 'labels'"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "3 for 2"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "at least one"),
        ({"jpeg": np.zeros(9, np.uint8), "labels": np.zeros(2, int)}, "'offsets'"),
    ],
)
def test_archives_that_do_not_hold_images(tmp_path, arrays, message):
    write_archive(tmp_path / "a.npz", **arrays)
    assert message in refused(tmp_path / "a.npz")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickled_archive_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "pwned"
    bomb = np.empty(1, object)
    bomb[0] = Bomb(mark)
    write_archive(tmp_path / "a.npz", images=bomb, labels=np.zeros(1, int))
    assert "cannot be read" in refused(tmp_path / "a.npz")
    assert not mark.exists()


def test_bad_arguments(folder):
    assert "split" in refused(folder, split="dev")
    assert "image_size" in refused(folder, image_size=0)
    assert "channels" in refused(folder, channels=2)


class TestStreaming:
    @pytest.fixture
    def both(self, folder):
        streamed = load_data(folder, memory_limit=0)
        assert isinstance(streamed, StreamedImages)
        return streamed, load_data(folder)

    def test_a_set_beyond_the_limit_is_streamed_and_equal(self, both, pixels):
        streamed, held = both
        assert_holds(streamed, pixels)
        assert len(streamed) == len(held) == 9
        assert torch.equal(streamed.strata(), held.strata())
        assert streamed.fingerprint() == held.fingerprint()
        assert streamed.classes == held.classes

    def test_subsets_of_subsets_hold_the_same_samples(self, both):
        first, second = torch.tensor([7, 1, 4, 3]), torch.tensor([2, 0])
        streamed, held = (samples.subset(first).subset(second) for samples in both)
        assert streamed.fingerprint() == held.fingerprint()
        assert streamed.in_memory().fingerprint() == held.fingerprint()

    def test_augmentation_draws_alike(self, both):
        drawn = [
            samples.augment(samples.take(torch.arange(9)), torch.Generator().manual_seed(0))
            for samples in both
        ]
        assert torch.equal(drawn[0].inputs, drawn[1].inputs)

    def test_an_adapter_takes_it(self, both):
        adapter = adapt(SmallResNet(3, width=4))
        streamed, held = (adapter.samples(samples) for samples in both)
        batch = streamed.take(torch.tensor([8, 0]))
        assert torch.equal(
            adapter.per_sample_loss(batch), adapter.per_sample_loss(held.take(torch.tensor([8, 0])))
        )

    def test_a_corrupt_image_is_named_when_it_is_reached(self, both, folder):
        (folder / "cat" / "04.png").write_bytes(b"gone")
        with pytest.raises(BadInputError, match=r"04\.png cannot be decoded"):
            both[0].take(torch.tensor([4]))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("cifar10_lossless5k", (1000, 3, 32, 32), 10),
        ("cifar10", (10000, 3, 32, 32), 10),
        ("gtsrb32", (1056, 3, 32, 32), 43),
        ("mnist", (10000, 1, 28, 28), 10),
        ("tiny_imagenet10", (500, 3, 64, 64), 10),
    ],
)
def test_real_sets(name, shape, classes):
    samples = load_data(name, split="test")
    assert tuple(samples.inputs.shape) == shape
    assert int(samples.labels.max()) == classes - 1
    assert len(samples.labels.unique()) == classes
    assert samples.inputs.float().std() > 30  # pictures, not blanks


@pytest.mark.parametrize("shape", [(2, 8, 9, 4), (2, 4, 8, 9)])
def test_archives_of_four_channels(tmp_path, shape):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, shape, dtype=np.uint8)
    write_archive(tmp_path / "a.npz", images=images, labels=np.array([0, 1]))
    last = images if shape[3] == 4 else images.transpose(0, 2, 3, 1)
    found = load_data(tmp_path / "a.npz").inputs
    assert np.array_equal(found.numpy().transpose(0, 2, 3, 1), last)


def test_a_palette_with_transparency_comes_out_in_its_colours(tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("P", (2, 3))
    image.putpalette([9, 8, 7] * 256)
    image.save(tmp_path / "a/0.png", transparency=0)
    assert load_data(tmp_path).inputs[0, :, 0, 0].tolist() == [9, 8, 7]


def test_a_photograph_that_is_turned_has_the_size_of_what_is_seen(tmp_path):
    """Of one size with the others, so that nothing is resized."""
    (tmp_path / "a").mkdir()
    turned = Image.Exif()
    turned[274] = 8
    Image.new("RGB", (4, 2)).save(tmp_path / "a/0.png")
    Image.new("RGB", (2, 4)).save(tmp_path / "a/1.png", exif=turned)
    assert load_data(tmp_path, fit=squashed((7, 7))).inputs.shape == (2, 3, 2, 4)
