"""Every form of video data gives the same samples, and bad data one clear line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdefense.attacks.badnets import BadNets
from mmdefense.data.batch import batches
from mmdefense.data.clips import random_clip_shift, random_clip_view
from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.registry import adapt, load
from mmdefense_tasks import video_classification
from mmdefense_tasks.clips import ClipSamples, StreamedClips, frame_indices
from mmdefense_tasks.moving_digits import MOTIONS, moving_digits
from mmdefense_tasks.video_classification import load_clips, top_accuracy
from mmdefense_tasks.video_victims import SmallVideoResNet, videomae_classifier

CLASSES = ("jump", "run", "sit")
WIDTH, HEIGHT, LENGTH = 48, 32, 12


def grey(index, frame):
    """The brightness of a frame, which tells clip and time."""
    return 10 + 12 * frame + 7 * index


def frames_of(index, length=LENGTH):
    return [np.full((HEIGHT, WIDTH, 3), grey(index, t), np.uint8) for t in range(length)]


def write_video(path, frames):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        container.start_encoding()
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_folder(where, suffix=".avi"):
    for index in range(6):
        write_video(where / CLASSES[index // 2] / f"{index}{suffix}", frames_of(index))
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("videos") / "set")


def refused(where, **options):
    with pytest.raises(BadInputError) as caught:
        load_clips(where, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_shows(clips, frames, first=0):
    """Check that clips ``(N, C, T, H, W)`` hold the frames of that number of videos in order."""
    for index, clip in enumerate(clips.float()):
        expected = torch.tensor([float(grey(first + index, t)) for t in frames])
        assert (clip - expected[:, None, None]).abs().max() < 4


class TestMovingDigits:
    @pytest.fixture(scope="class")
    @staticmethod
    def test_part():
        return moving_digits("test")

    def test_clips_of_eight_motions(self, test_part):
        assert test_part.inputs.shape == (400, 1, 8, 24, 24)
        assert test_part.inputs.dtype == torch.uint8
        assert test_part.labels.bincount().tolist() == [50] * 8
        assert test_part.classes == MOTIONS

    def test_they_depend_on_the_seed_alone(self, test_part):
        torch.rand(3)
        assert moving_digits("test").fingerprint() == test_part.fingerprint()
        assert moving_digits("test", seed=1).fingerprint() != test_part.fingerprint()

    def test_an_average_frame_tells_nothing(self, test_part):
        """The mean frame of each motion at each time is grey: no place or time is special."""
        frames = test_part.inputs.float().unflatten(0, (8, 50)).mean((1, 2))  # (8, T, H, W)
        spread = test_part.inputs.float().mean((1, 2)).std(0).mean()  # of one pixel among clips
        means = frames.mean((2, 3))
        assert means.std() < spread / 3

    @pytest.mark.parametrize(
        ("motion", "sign", "axis"),
        [("left", -1, 1), ("right", 1, 1), ("up", -1, 0), ("down", 1, 0)],
    )
    def test_shifts_go_where_they_say(self, test_part, motion, sign, axis):
        """By the shift that best maps each frame to the next, on a frame without borders."""
        clips = test_part.inputs[test_part.labels == MOTIONS.index(motion)].float()[:, 0]
        seen = torch.fft.rfft2(clips - clips.mean((2, 3), keepdim=True))
        match = torch.fft.irfft2(seen[:, 1:] * seen[:, :-1].conj(), s=(24, 24)).sum(1)
        best = match.flatten(1).argmax(1)
        step = torch.stack([best // 24, best % 24], 1)[:, axis]
        step = torch.where(step > 12, step - 24, step)
        assert (step.sign() == sign).float().mean() > 0.8

    def test_a_digit_grows_and_turns_as_it_says(self):
        """The paths themselves, without pictures."""
        from mmdefense_tasks.moving_digits import _paths

        labels = torch.arange(8).repeat_interleave(200)
        _, angle, half_side = _paths(labels, torch.Generator().manual_seed(0))
        turn, growth = angle.diff(dim=1).mean(1), half_side.log().diff(dim=1).median(1).values
        by_motion = {
            name: (turn[labels == i].median(), growth[labels == i].median())
            for i, name in enumerate(MOTIONS)
        }
        assert by_motion["clockwise"][0] > 0.1 > -0.1 > by_motion["counterclockwise"][0]
        assert by_motion["growing"][1] > 0.04 > -0.04 > by_motion["shrinking"][1]
        for name in ("left", "right", "up", "down"):
            assert max(map(abs, by_motion[name])) < 0.04

    def test_it_comes_in_one_form(self):
        assert "leave out frames" in refused("moving-digits", frames=16)
        assert "split" in refused("moving-digits", split="dev")
        assert len(load_clips("moving-digits", split="test", frames=8, image_size=24)) == 400


class TestFolders:
    def test_a_folder_of_videos_per_class(self, folder):
        samples = load_clips(folder, frames=4)
        assert samples.inputs.shape == (6, 3, 4, HEIGHT, WIDTH)
        assert samples.inputs.dtype == torch.uint8
        assert samples.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert samples.classes == CLASSES
        assert_shows(samples.inputs, [1, 4, 7, 10])

    def test_frames_are_cropped_to_the_middle_and_resized(self, tmp_path):
        frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        frame[:, WIDTH // 2 - HEIGHT // 2 : WIDTH // 2 + HEIGHT // 2] = 200
        write_video(tmp_path / "a" / "x.avi", [frame] * 3)
        samples = load_clips(tmp_path, frames=2, image_size=16)
        assert samples.inputs.shape == (1, 3, 2, 16, 16)
        assert samples.inputs.min() > 150

    def test_grey_frames_on_request(self, folder):
        samples = load_clips(folder, frames=2, channels=1)
        assert samples.inputs.shape == (6, 1, 2, HEIGHT, WIDTH)
        assert_shows(samples.inputs, [3, 9])

    def test_several_clips_a_video_lie_between_each_other(self, folder):
        samples = load_clips(folder, frames=3, clips=2)
        assert samples.videos.tolist() == [i // 2 for i in range(12)]
        assert samples.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert_shows(samples.inputs[0::2], [1, 5, 9])
        assert_shows(samples.inputs[1::2], [3, 7, 11])
        part = samples.subset(torch.tensor([5, 2]))
        assert isinstance(part, ClipSamples)
        assert part.videos.tolist() == [2, 1]

    def test_train_and_test_folders(self, tmp_path, folder):
        (tmp_path / "train").symlink_to(folder)
        assert len(load_clips(tmp_path, frames=2)) == 6
        assert "'test'" in refused(tmp_path, split="test")

    def test_labels_follow_the_models_class_names(self, folder):
        samples = load_clips(folder, frames=2, classes=("Sit", "Jump", "walk", "Run"))
        assert samples.labels.tolist() == [1, 1, 3, 3, 0, 0]
        assert "got sit" in refused(folder, frames=2, classes=("jump", "run", "walk"))

    def test_a_set_beyond_the_limit_is_streamed_and_equal(self, folder):
        streamed = load_clips(folder, frames=3, clips=2, memory_limit=0)
        held = load_clips(folder, frames=3, clips=2)
        assert isinstance(streamed, StreamedClips)
        order = torch.tensor([11, 0, 7])
        for one, other in ((streamed, held), (streamed.subset(order), held.subset(order))):
            assert one.fingerprint() == other.fingerprint()
            assert torch.equal(
                one.take(torch.tensor([2])).inputs, other.take(torch.tensor([2])).inputs
            )
            assert torch.equal(one.in_memory().videos, other.videos)


class TestBadFolders:
    def test_a_clip_that_is_too_short(self, folder):
        message = refused(folder, frames=LENGTH + 1)
        assert "0.avi must have at least 13 frames, got 12" in message

    def test_a_truncated_clip(self, tmp_path):
        path = tmp_path / "a" / "cut.avi"
        noise = np.random.default_rng(0).integers(0, 256, (LENGTH, HEIGHT, WIDTH, 3), np.uint8)
        write_video(path, list(noise))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        message = refused(tmp_path, frames=2)
        assert "cut.avi" in message
        assert "truncated" in message or "cannot be decoded" in message

    def test_a_clip_without_frames(self, tmp_path):
        write_video(tmp_path / "a" / "none.avi", [])
        message = refused(tmp_path, frames=2)
        assert "none.avi" in message
        assert "got 0" in message or "cannot be decoded" in message

    @pytest.mark.parametrize("content", [b"", b"no video", b"RIFF" + bytes(40)])
    def test_a_corrupt_clip_is_named(self, tmp_path, content):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "broken.avi").write_bytes(content)
        assert "broken.avi cannot be decoded" in refused(tmp_path, frames=2)

    def test_clips_of_different_sizes(self, tmp_path, monkeypatch):
        write_video(tmp_path / "a" / "0.avi", frames_of(0))
        monkeypatch.setattr(sys.modules[__name__], "WIDTH", 64)
        write_video(tmp_path / "a" / "1.avi", frames_of(1))
        assert "resized with image_size, got 32x48 and 32x64" in refused(tmp_path, frames=2)
        assert len(load_clips(tmp_path, frames=2, image_size=16)) == 2

    def test_no_videos(self, tmp_path):
        assert "none found" in refused(tmp_path / "nowhere")
        (tmp_path / "a").mkdir()
        assert "got no video" in refused(tmp_path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"frames": 0}, "frames must"),
            ({"image_size": 0}, "image_size must"),
            ({"clips": 0}, "clips must"),
            ({"channels": 2}, "channels must"),
            ({"split": "dev"}, "split must"),
        ],
    )
    def test_bad_arguments(self, folder, options, message):
        assert message in refused(folder, **options)

    def test_without_pyav_what_brings_it_is_named(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(UnsupportedError, match="needs the package 'av'"):
            load_clips(folder, frames=2)


class TestPictures:
    """Sets of ``MMDEFENSE_DATA`` whose clips are pictures of frames side by side."""

    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MMDEFENSE_DATA", str(tmp_path))
        for index in range(2):
            rows = [[np.full((8, 8, 3), grey(index, 4 * r + c), np.uint8) for c in range(4)]
                    for r in range(4)]  # fmt: skip
            path = tmp_path / "ucf101_mini" / "train" / CLASSES[index] / f"{index}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in rows])).save(path)
        return tmp_path

    def test_frames_are_read_row_by_row(self, root):
        samples = load_clips("ucf101_mini", frames=16, image_size=8)
        assert samples.inputs.shape == (2, 3, 16, 8, 8)
        assert_shows(samples.inputs, range(16))
        assert load_clips("ucf101_mini").inputs.shape == (2, 3, 8, 32, 32)
        assert set(load("tasks", "video-classification")().data()) == {
            "moving-digits",
            "ucf101_mini",
        }

    def test_more_frames_than_there_are(self, root):
        assert "at least 17 frames, got 16" in refused("ucf101_mini", frames=17)

    def test_a_broken_picture_is_named(self, root):
        path = root / "ucf101_mini" / "train" / "jump" / "0.png"
        path.write_bytes(path.read_bytes()[:60])
        assert "0.png cannot be decoded" in refused("ucf101_mini")


@pytest.mark.parametrize(("count", "frames"), [(5, 5), (16, 8), (100, 7)])
def test_frames_are_taken_evenly_from_the_whole_video(count, frames):
    chosen = frame_indices(count, frames)
    assert len(set(chosen)) == frames
    assert 0 <= chosen[0] < count / frames
    assert count - count / frames <= chosen[-1] < count
    assert np.ptp(np.diff(chosen)) <= 1


@pytest.mark.parametrize("alter", [random_clip_shift, random_clip_view])
def test_augmentation_alters_all_frames_alike(alter):
    picture = torch.rand(8, 1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    still = picture.expand(8, 1, 5, 12, 12).contiguous()
    altered = alter(still, torch.Generator().manual_seed(1))
    assert altered.shape == still.shape
    assert not torch.equal(altered, still)
    assert torch.equal(altered, altered[:, :, :1].expand_as(altered))
    assert torch.equal(alter(still, torch.Generator().manual_seed(1)), altered)


class TestMetrics:
    """Against a table of answers that is small enough to count by hand."""

    @pytest.fixture
    def adapter(self):
        class Table(torch.nn.Module):
            def forward(self, clips):
                return clips.flatten(1)[:, :3]

        return SimpleNamespace(model=Table(), answer=lambda batch: batch.inputs.flatten(1)[:, :3])

    @pytest.fixture
    def samples(self):
        logits = torch.tensor(
            [[3.0, 0.0, 1.0], [0.0, 1.0, 0.5], [0.0, 2.0, 1.0], [2.0, 0.0, 1.0]]
        ).view(4, 1, 1, 1, 3)
        labels, videos = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])
        return ClipSamples(logits, labels, videos=videos)

    def test_clip_level(self, adapter, samples):
        assert top_accuracy(adapter, samples, level="clip") == 0.5
        assert top_accuracy(adapter, samples, level="clip", top=3) == 1

    def test_video_level_averages_the_clips_of_a_video(self, adapter, samples):
        """Softmax means: video 0 is [.56, .22, .22]-like for 0; video 1 is near even, for 0."""
        p = samples.inputs.flatten(1).softmax(1).view(2, 2, 3).mean(1)
        expected = (p.argmax(1) == torch.tensor([0, 1])).float().mean()
        assert top_accuracy(adapter, samples) == expected
        assert expected == 0.5
        assert top_accuracy(adapter, samples, top=2) == (p.topk(2).indices == torch.tensor(
            [[0], [1]])).any(1).float().mean()  # fmt: skip

    def test_without_videos_both_are_one(self, adapter, samples):
        plain = LabelledSamples(samples.inputs, samples.labels)
        assert top_accuracy(adapter, plain) == top_accuracy(adapter, samples, level="clip")

    def test_a_top_beyond_the_classes_is_refused(self, adapter, samples):
        with pytest.raises(BadInputError, match=r"top must lie in 1\.\.3"):
            top_accuracy(adapter, samples, top=5)


def test_the_task_is_found_by_name_and_describes_its_victims():
    task = load("tasks", "video-classification")()
    test_part = task.load("moving-digits", split="test")
    described = task.describe(test_part)
    assert described == {"classes": 8, "channels": 1, "frames": 8, "size": 24}
    assert {case.task for case in task.cases()} == {task.name}
    assert task.cases()[0].data == "moving-digits"
    assert len({case.name for case in task.cases()}) == len(task.cases())
    nets = [SmallVideoResNet(8, 1, width=4), videomae_classifier(8, 24, 8, 1, hidden=8, layers=1)]
    batch = next(batches(test_part, 2))
    for net in nets:
        assert adapt(net).logits(batch.inputs).shape == (2, 8)
    assert 0 <= task.measure(adapt(nets[0]), test_part.subset(torch.arange(16))) <= 1


def test_a_trigger_is_shown_frame_by_frame():
    task = load("tasks", "video-classification")()
    clean = moving_digits("test").subset(torch.arange(0, 400, 40))
    attack = BadNets(target=0)
    triggered = attack.triggered(clean, SimpleNamespace(chance=1 / 8))
    grids = task.show(triggered.clean, triggered.samples).panels()
    assert len(grids) == 3
    for grid in grids:
        assert grid.title in MOTIONS
        assert [len(row.images) for row in grid.rows] == [8, 8, 8]
        assert (grid.rows[0].images != grid.rows[1].images).any()


@pytest.mark.real_data
class TestRealSets:
    def test_ucf101(self):
        samples = load_clips("ucf101_mini", split="test")
        assert samples.inputs.shape == (104, 3, 8, 32, 32)
        assert samples.classes == ("BabyCrawling", "Punch", "PushUps")
        assert samples.labels.bincount().tolist() == [35, 39, 30]
        assert samples.inputs.float().std() > 30

    def test_its_untouched_videos(self, tmp_path):
        root = Path(os.environ[video_classification.DATA_VARIABLE]) / "ucf101_mini"
        found = sorted((root / "raw_samples").glob("*.avi"))
        for path in found:
            where = tmp_path / path.name.split("_")[1] / path.name
            where.parent.mkdir(exist_ok=True)
            where.symlink_to(path)
        videos = load_clips(tmp_path, frames=16, image_size=112)
        assert videos.inputs.shape == (len(found), 3, 16, 112, 112)
        assert videos.inputs.float().std() > 30
