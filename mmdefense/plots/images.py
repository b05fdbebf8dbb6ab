"""Rows of images as a panel, each pixel as it is where the image is small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmdefense.errors import BadInputError
from mmdefense.plots.base import Numbers, Panel, as_array, say
from mmdefense.plots.colors import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLUMNS", "ImageGrid", "ImageRow", "visible_channels", "with_and_without"]

_TILES = 96  # ours
_LABEL_INCHES = 0.2  # a line of small type and a gap
COLUMNS = 10
"""Ours: samples side by side, so that pages stay readable."""


@dataclass(frozen=True, eq=False)
class ImageRow:
    """Images of one kind, side by side.

    Attributes:
        label: What they are.
        images: Shape ``(N, C, H, W)``; floats in ``[0, 1]`` or whole numbers to 255. Of 2 channels
            the first is kept, of more than 3 the first three.
        names: What stands below each image; may be empty.
        total: Number of images given; of long rows only those that can be shown are kept. By
            default as many as there are.
    """

    label: str
    images: Any
    names: Sequence[str] = ()
    total: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.total or len(self.images))
        images = as_array(self.images[:_TILES])
        if images.ndim != 4 or not all(images.shape):
            raise BadInputError(
                f"images {self.label!r} must have shape (N, C, H, W), got {images.shape}"
            )
        shown, channels = visible_channels(images.shape[1]), images.shape[1]
        if shown < channels:
            part = "channel 1" if shown == 1 else f"channels 1 to {shown}"
            object.__setattr__(self, "label", f"{self.label} ({part} of {channels})")
            images = images[:, :shown]
        if _holds_integers(self.images):
            images = images / 255
        object.__setattr__(self, "images", np.nan_to_num(images).clip(0, 1))


@dataclass(frozen=True, eq=False)
class ImageGrid(Panel):
    """Rows of images; long rows are cut, and say so.

    Attributes:
        rows: The rows.
        columns: Images per row, so that rows line up; none lets long rows wrap.
    """

    rows: Sequence[ImageRow]
    columns: int | None = None

    @property
    def most(self) -> int:
        """Number of images of a row that are shown."""
        return self.columns or max(4, _TILES // max(1, len(self.rows)))

    @property
    def size(self) -> tuple[float, float]:
        """Width and height on a page, in inches."""
        return 9.2, 1.0 * max(1, len(self.rows))

    def describe(self) -> str:
        """Return what the rows are."""
        rows = "; ".join(f"{row.label} ({row.total} images)" for row in self.rows)
        return say(self.title, f"Images: {rows}.")

    def draw(self, axes: Axes) -> None:
        """Draw on a pair of axes, a strip of images for each row; names are left out."""
        axes.set_axis_off()
        height = 1 / max(1, len(self.rows))
        label = _LABEL_INCHES / (axes.bbox.height / axes.figure.dpi)
        for number, row in enumerate(self.rows):
            strip = axes.inset_axes(
                (0.0, 1 - height * (number + 1), 1.0, height - min(label, height / 2))
            )
            images = row.images[: self.most].transpose(0, 2, 3, 1)
            edged = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=np.nan)
            joined = np.concatenate(list(edged), 1)[:, :-1]
            if joined.shape[2] == 1:
                strip.imshow(joined[:, :, 0], cmap="gray", vmin=0, vmax=1)
            else:
                strip.imshow(np.nan_to_num(joined, nan=1.0))
            strip.set(xticks=[], yticks=[])
            strip.spines[:].set_color(MUTED)
            strip.set_title(row.label, loc="left", color=INK, fontsize="small")


def with_and_without(
    clean: Numbers, triggered: Numbers, names: Sequence[str] = ()
) -> tuple[list[ImageRow], float]:
    """Return rows of samples without and with a trigger and of the change, and the largest one.

    Args:
        clean: Images ``(N, C, H, W)`` in ``[0, 1]``; the first ten are shown.
        triggered: The same images with the trigger.
        names: What stands below each.
    """
    before, after = as_array(clean[:COLUMNS]), as_array(triggered[:COLUMNS])
    change = after - before
    largest = float(np.abs(change).max(initial=0))
    magnified = 0.5 + change / (2 * largest) if largest else np.full_like(change, 0.5)
    rows = [
        ImageRow("clean", before, names),
        ImageRow("with trigger", after),
        ImageRow("difference", magnified),
    ]
    return rows, largest


def visible_channels(channels: int) -> int:
    """Return how many of an image's channels make a picture: one in grey, or three in colour."""
    return 3 if channels >= 3 else 1


def _holds_integers(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return not values.is_floating_point()
    return bool(np.issubdtype(np.asarray(values).dtype, np.integer))
