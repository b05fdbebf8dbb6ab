"""Open images within limits; files that are not in a known image format are not decoded."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image

from mmdefense.files import plain_file

__all__ = ["MOST_PIXELS", "SUFFIXES", "check_size", "open_picture"]

MOST_PIXELS = 1 << 26
"""Most pixels of an image, 8192 x 8192; each takes a few bytes once decoded. Our choice."""

_KNOWN = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
Image.init()
SUFFIXES = frozenset(suffix for suffix in _KNOWN if Image.EXTENSION.get(suffix) in Image.OPEN)
"""Suffixes of the files that are read as images, as far as this Pillow build supports them."""

_FORMATS = sorted({Image.EXTENSION[suffix] for suffix in SUFFIXES})
# Our limit is stricter and raises an error: the warning would be a second line.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def open_picture(source: Path | bytes) -> Image.Image:
    """Return an image whose size is known and whose pixels are not decoded yet.

    Only formats that Pillow decodes itself are allowed: it would pass PostScript to another
    program.

    Args:
        source: A file, or what stands in one.

    Raises:
        BadInputError: If it is not a regular file.
        ValueError: If the picture has no pixels, or too many; and errors of many other kinds, where
            it is damaged or no picture.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else plain_file(source)
    image = Image.open(file, formats=_FORMATS)
    check_size(image.width, image.height)
    return image


def check_size(width: int, height: int) -> None:
    """Refuse an image without pixels, or with more than :data:`MOST_PIXELS`.

    Raises:
        ValueError: Naming the size.
    """
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"it has {width}x{height} pixels; the limits are 1 and {MOST_PIXELS}")
