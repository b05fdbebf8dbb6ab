"""Labelled clips, decoded one by one: video files with PyAV, or frames tiled in a picture.

Frames are sampled evenly from the whole video. With several clips per video, their frames
interleave, so that each clip covers the whole video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mmdefense.data.labelled import LabelledSamples
from mmdefense.errors import BadInputError, UnsupportedError, one_line
from mmdefense.files import plain_file
from mmdefense.libraries import needed
from mmdefense.pictures import check_size, open_picture
from mmdefense_tasks.class_folders import class_files
from mmdefense_tasks.image_sets import Fit, fitted
from mmdefense_tasks.streamed import StreamedSamples

__all__ = ["ClipSamples", "ClipSet", "StreamedClips", "frame_indices", "open_clips"]

_VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
_PICTURES = frozenset({".jpeg", ".jpg", ".png"})
_FORMATS = "avi,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,mpegvideo"  # of FFmpeg
_WHOLE = 0.9  # our choice: an intact file may have slightly fewer frames than its header says


@dataclass(frozen=True)
class ClipSamples(LabelledSamples):
    """Clips ``(N, C, T, H, W)`` in memory; several may come from the same video.

    Attributes:
        videos: Video index of each clip, shape ``(N,)``; None if there is one clip per video.
    """

    videos: Tensor | None = None

    def subset(self, indices: Tensor) -> ClipSamples:
        """Return the subset of samples at ``indices``."""
        indices = indices.to(self.labels.device)
        videos = None if self.videos is None else self.videos[indices.to(self.videos.device)]
        return replace(
            self, inputs=self.inputs[indices], labels=self.labels[indices], videos=videos
        )


@dataclass(frozen=True)
class ClipSet:
    """Videos that have not been decoded yet.

    Attributes:
        files: One file per video.
        labels: Label of each clip, shape ``(N,)``, int64.
        classes: The name of each label, if known.
        clips: Clips per video; the i-th clip is from video ``i // clips``.
        tiles: Frames along each side of a picture, if the files are pictures; 0 for videos.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    clips: int = 1
    tiles: int = 0

    @property
    def videos(self) -> Tensor:
        """Video index of each clip, shape ``(N,)``."""
        return torch.arange(len(self.labels)) // self.clips

    def read(self, index: int, frames: int, side: int | None) -> NDArray[np.uint8]:
        """Return the clip at ``index``, shape ``(T, H, W, 3)``.

        Args:
            index: Index of the clip.
            frames: Number of frames T.
            side: Resize the shorter side to this many pixels and centre-crop the longer one; None
                leaves frames unchanged.

        Raises:
            BadInputError: If it cannot be decoded, is truncated, or has too few frames.
        """
        file = self.files[index // self.clips]
        reader = _read_picture if self.tiles else _read_video
        phase = (index % self.clips + 0.5) / self.clips

        def chosen(count: int) -> list[int]:
            if count < frames:
                raise BadInputError(f"clip {file} must have at least {frames} frames, got {count}")
            return frame_indices(count, frames, phase)

        with _naming(file):
            return np.stack(
                [np.asarray(_fitted(i, side)) for i in reader(file, chosen, self.tiles)]
            )


def frame_indices(count: int, frames: int, phase: float = 0.5) -> list[int]:
    """Return the indices of ``frames`` evenly spaced frames out of ``count``.

    Args:
        count: Frames of the video.
        frames: Frames T to take.
        phase: Position within each of the T equal parts of the video, in ``[0, 1)``; 0.5 takes the
            middle.
    """
    return [int((part + phase) * count / frames) for part in range(frames)]


def open_clips(folder: Path, clips: int = 1, tiles: int = 0) -> ClipSet:
    """Open a folder with one sub-folder of videos per class.

    Args:
        folder: The folder; labels number its sub-folders in text order.
        clips: Clips per video.
        tiles: Frames along each side of a picture, if the files are pictures of frames, row by row;
            0 for videos.

    Raises:
        BadInputError: If there is no class folder or no video.
    """
    held = class_files(folder, _PICTURES if tiles else _VIDEOS, "videos")
    labels = held.labels.repeat_interleave(clips)
    return ClipSet(held.files, labels, held.classes, clips, tiles)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except (BadInputError, UnsupportedError):
        raise
    except Exception as error:  # decoders raise many exception types
        raise BadInputError(f"clip {file} cannot be decoded: {one_line(error)}") from error


Chosen = Callable[[int], list[int]]


def _read_picture(file: Path, chosen: Chosen, tiles: int) -> list[Image.Image]:
    """Return the chosen frames of a picture of ``tiles`` x ``tiles`` frames."""
    with open_picture(file) as opened:
        image = opened.convert("RGB")
    width, height = image.width // tiles, image.height // tiles
    check_size(width, height)
    corners = [(i % tiles * width, i // tiles * height) for i in chosen(tiles * tiles)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]


def _read_video(file: Path, chosen: Chosen, _: int) -> list[Image.Image]:
    """Return the chosen frames of a video; it is decoded twice, since headers miscount frames."""
    with _container(file) as container:
        if not container.streams.video:
            raise BadInputError(f"clip {file} must have a video stream, got none")
        check_size(container.streams.video[0].width, container.streams.video[0].height)
        announced = container.streams.video[0].frames
        count = sum(1 for _ in container.decode(video=0))
    if count < _WHOLE * announced:
        raise BadInputError(
            f"clip {file} is truncated: its header announces {announced} frames, but only "
            f"{count} can be decoded"
        )
    wanted = set(chosen(count))
    with _container(file) as container:
        return [
            frame.to_image()
            for index, frame in enumerate(container.decode(video=0))
            if index in wanted
        ]


def _container(file: Path) -> Any:
    """Open a video of the known formats; a playlist could open other files, or the network.

    The path is absolute, so that no part of it is interpreted as a protocol.
    """
    with needed(f"decoding {file}"):
        import av
    return av.open(str(plain_file(file).absolute()), options={"format_whitelist": _FORMATS})


def _fitted(image: Image.Image, side: int | None) -> Image.Image:
    """Return the middle square of an image, resized to ``side``."""
    if side is None or image.size == (side, side):
        return image
    shorter = min(image.size)
    left, top = (image.width - shorter) / 2, (image.height - shorter) / 2
    return image.resize(
        (side, side),
        Image.Resampling.BILINEAR,
        box=(left, top, left + shorter, top + shorter),
    )


@dataclass(frozen=True, kw_only=True)
class StreamedClips(StreamedSamples[ClipSet]):
    """Labelled clips that are decoded on ``take``; their shape is (C, T, H, W).

    Attributes:
        side: Size in pixels that frames are cropped and resized to; None leaves them unchanged.
        fit: Applied to frames if no side is given; all results must have the same size.
    """

    side: int | None
    fit: Fit | None

    @classmethod
    def of(
        cls,
        clips: ClipSet,
        *,
        frames: int,
        side: int | None,
        fit: Fit | None,
        channels: int,
    ) -> StreamedClips:
        """Return the whole set; all frames must end up with the size of the first.

        Raises:
            BadInputError: If the first clip cannot be decoded.
        """
        held = cls(
            source=clips,
            shape=(channels, frames, 1, 1),
            side=side,
            fit=fit,
            indices=torch.arange(len(clips.labels)),
        )
        return replace(held, shape=(channels, frames, *held._frames(0).shape[2:]))

    def in_memory(self) -> ClipSamples:
        """Return the set decoded, as uint8."""
        held = super().in_memory()
        videos = self.source.videos[self.indices]
        return ClipSamples(held.inputs, held.labels, held.augmentation, held.classes, videos)

    def _array(self, index: int) -> NDArray[np.uint8]:
        frames = self._frames(index)
        if frames.shape[2:] != self.shape[2:]:
            (height, width), (found, wide) = self.shape[2:], frames.shape[2:]
            raise BadInputError(
                "clips must have the same size, or be resized with image_size, got "
                f"{height}x{width} and {found}x{wide} in "
                f"{self.source.files[index // self.source.clips]}"
            )
        return np.ascontiguousarray(frames.transpose(1, 0, 2, 3))

    def _frames(self, index: int) -> NDArray[np.uint8]:
        """Return the frames of a clip, ``(T, C, H, W)``."""
        channels, length = self.shape[:2]
        clip = self.source.read(index, length, self.side)
        if channels == 1:
            clip = (clip @ np.array([0.299, 0.587, 0.114]))[..., None].round().astype(np.uint8)
        frames = clip.transpose(0, 3, 1, 2)
        return fitted(frames, self.fit) if self.fit and not self.side else frames
