"""Pictures, opened within bounds: of what is no picture in a known format nothing is decoded."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image

from mmdefense.files import plain_file

__all__ = ["MOST_PIXELS", "SUFFIXES", "check_size", "open_picture"]

MOST_PIXELS = 1 << 26
"""Of one picture, 8192 x 8192; what is decoded takes some bytes for each. Ours."""

_KNOWN = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
Image.init()
SUFFIXES = frozenset(suffix for suffix in _KNOWN if Image.EXTENSION.get(suffix) in Image.OPEN)
"""Of the files that are read as pictures, as far as Pillow was built for them."""

_FORMATS = sorted({Image.EXTENSION[suffix] for suffix in SUFFIXES})
# Ours is stricter, and is an error: the warning would be a second line.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def open_picture(source: Path | bytes) -> Image.Image:
    """Return a picture whose size is known and whose pixels are still to be decoded.

    Its format is one of those that Pillow decodes by itself: it would hand PostScript to another
    program.

    Args:
        source: A file, or what stands in one.

    Raises:
        BadInputError: If the file is none.
        ValueError: If the picture has no pixels, or too many; and errors of many other kinds, where
            it is damaged or no picture.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else plain_file(source)
    image = Image.open(file, formats=_FORMATS)
    check_size(image.width, image.height)
    return image


def check_size(width: int, height: int) -> None:
    """Refuse a picture without pixels, or of more than can be decoded at ease.

    Raises:
        ValueError: Telling the size.
    """
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"it has {width}x{height} pixels; the limits are 1 and {MOST_PIXELS}")
