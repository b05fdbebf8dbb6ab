"""Rows of images as HTML, each pixel as it is where the image is small."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from mmdefense.errors import BadInputError
from mmdefense.report.plots import as_array, say

__all__ = ["ImageGrid", "ImageRow", "data_address", "is_picture"]

Array = NDArray[np.float64]
_PICTURE = re.compile(r"data:image/(png|webp);base64,[A-Za-z0-9+/=]+")
_TILES, _TILE_PX = 96, 144  # ours; a tile is shown at half that, so it is sharp on fine screens


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
        shown, channels = _visible(images.shape[1]), images.shape[1]
        if shown < channels:
            part = "channel 1" if shown == 1 else f"channels 1 to {shown}"
            object.__setattr__(self, "label", f"{self.label} ({part} of {channels})")
            images = images[:, :shown]
        if _holds_integers(self.images):
            images = images / 255
        object.__setattr__(self, "images", np.nan_to_num(images).clip(0, 1))


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Rows of images; long rows are cut, and say so.

    Attributes:
        rows: The rows.
        title: Heading of this panel; may be empty.
        columns: Images per row, so that rows line up; none lets long rows wrap.
    """

    rows: Sequence[ImageRow]
    title: str = ""
    columns: int | None = None

    def describe(self) -> str:
        """Return what the rows are."""
        rows = "; ".join(f"{row.label} ({row.total} images)" for row in self.rows)
        return say(self.title, f"Images: {rows}.")

    def markup(self, prefix: str) -> Markup:
        """Return a table-like group of ``<img>`` elements."""
        most = self.columns or max(4, _TILES // max(1, len(self.rows)))
        form = "row aligned" if self.columns else "row"
        rows = Markup().join(_row_markup(row, most, form) for row in self.rows)
        return Markup('<div class="images" role="group" aria-label="{}">{}</div>').format(
            self.describe(), rows
        )


def _row_markup(row: ImageRow, most: int, form: str) -> Markup:
    shown, tiles = row.images[:most], []
    for number, image in enumerate(shown):
        name = row.names[number] if number < len(row.names) else ""
        alt = f"{row.label}: {name or f'image {number + 1}'}"
        caption = Markup("<small>{}</small>").format(name) if name else ""
        tiles.append(
            Markup('<span class="tile"><img src="{}" alt="{}"{}>{}</span>').format(
                data_address(image),
                alt,
                Markup(' class="pixels"') if image.shape[1] < 64 else "",
                caption,
            )
        )
    cut = f" (first {most} of {row.total})" if row.total > most else ""
    return Markup('<div class="{}"><span class="label">{}</span><div>{}</div></div>').format(
        form, row.label + cut, Markup().join(tiles)
    )


def is_picture(address: str) -> bool:
    """Whether an address is a picture's own bytes, so that nothing else is ever shown for it."""
    return bool(_PICTURE.fullmatch(address))


def _visible(channels: int) -> int:
    """Return how many of an image's channels make a picture: one in grey, or three in colour."""
    return 3 if channels >= 3 else 1


def data_address(image: Any) -> str:
    """Return an image ``(C, H, W)`` in ``[0, 1]`` as a data URI; only large ones lose detail."""
    pixels = (
        (as_array(image)[: _visible(len(image))].clip(0, 1) * 255)
        .round()
        .astype(np.uint8)
        .transpose(1, 2, 0)
    )
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    kind = "png" if max(picture.size) <= _TILE_PX else "webp"
    picture.thumbnail((_TILE_PX, _TILE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=88, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _holds_integers(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return not values.is_floating_point()
    return bool(np.issubdtype(np.asarray(values).dtype, np.integer))
