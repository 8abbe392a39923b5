"""Converts image files to pixels: decoding, conversion of colours, and the evaluation transform.

The evaluation transform resizes the shorter side to ``shorter_side`` and cuts out the centre of ``size`` x ``size``
pixels. ``shorter_side`` is the same for all images of a data set. If the images are larger than ``size`` * 256/224, it
is that number, which is ImageNet's ratio (resize to 256, crop 224). Otherwise it is ``size``: small square images are
only resized, or unchanged if they have that size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from autoslim.errors import UserError, first_line

MARGIN = 256 / 224
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I"})
_TOP_BYTE = 8  # bits to shift a 16-bit pixel down


def is_grey(mode: str) -> bool:
    """Returns whether images of a PIL mode have no colours."""
    return mode in _GREY_MODES or mode.startswith("I;16")


def shorter_side_for(native: float, size: int) -> int:
    """Returns the shorter side before the centre crop. ``native`` is the typical shorter side of the images."""
    return round(size * MARGIN) if native > size * MARGIN else size


def unreadable(path: Path | str, error: Exception) -> UserError:
    """Returns the error for an image that cannot be decoded."""
    reason = first_line(error).replace(repr(str(path)), "it")
    return UserError(f"{path} is not a readable image ({reason}); repair or remove the file and prepare the data again")


def open_image(path: Path, channels: int | None) -> Image.Image:
    """Decodes a file to grey (1 channel), RGB (3) or its own mode (None).

    Raises:
        UserError: the file cannot be decoded. The message contains its path.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range: save it with 8 bits")
            return image if channels is None else with_channels(image, channels)
    except Exception as error:  # such as OSError, SyntaxError, zlib.error, struct.error, DecompressionBombError
        raise unreadable(path, error) from error


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Converts an image to grey (ITU-R 601 luma) or RGB, without transparency. 16-bit grey keeps its upper byte."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL would clip these at 255 instead of scaling them.
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> _TOP_BYTE, 0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an "L" or "RGB" image as uint8, channels first."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))  # -> (C, H, W)


# Pillow is used directly, because torchvision takes seconds to import, also in every worker process. torchvision's
# resize and crop call Pillow with the same arguments.


def evaluation_pixels(image: Image.Image, channels: int, shorter_side: int, size: int) -> np.ndarray:
    """Applies the evaluation transform: uint8 (channels, size, size). ``shorter_side`` must be at least ``size``."""
    assert shorter_side >= size
    image = with_channels(image, channels)
    width, height = image.size
    if width <= height:
        image = _resized(image, shorter_side, int(shorter_side * height / width))
    else:
        image = _resized(image, int(shorter_side * width / height), shorter_side)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_array(image.crop((left, top, left + size, top + size)))


def area_pixels(image: Image.Image, channels: int, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cuts out ``box`` (top, left, height, width) and resizes it: uint8 (channels, size, size)."""
    top, left, height, width = box
    image = with_channels(image, channels).crop((left, top, left + width, top + height))
    return to_array(_resized(image, size, size))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resizes an image bilinearly, with antialiasing."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
