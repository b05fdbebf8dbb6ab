"""Images as HTML, each pixel as it is where the image is small."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from mmdefense.plots.base import as_array
from mmdefense.plots.images import ImageGrid, ImageRow, visible_channels

__all__ = ["data_address", "image_markup", "is_picture"]

_PICTURE = re.compile(r"data:image/(png|webp);base64,[A-Za-z0-9+/=]+")
_TILE_PX = 144  # ours; a tile is shown at half that, so it is sharp on fine screens


def image_markup(grid: ImageGrid) -> Markup:
    """Return a table-like group of ``<img>`` elements."""
    form, kind = ("row aligned", "images scroll") if grid.columns else ("row", "images")
    rows = Markup().join(_row_markup(row, grid.most, form) for row in grid.rows)
    return Markup('<div class="{}" role="group" aria-label="{}"{}>{}</div>').format(
        kind, grid.describe(), Markup(' tabindex="0"') if grid.columns else "", rows
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


def data_address(image: Any) -> str:
    """Return an image ``(C, H, W)`` in ``[0, 1]`` as a data URI; only large ones lose detail."""
    pixels = (
        (as_array(image)[: visible_channels(len(image))].clip(0, 1) * 255)
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
