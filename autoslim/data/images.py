"""From an image file to pixels: decoding, colours, and the evaluation transform.

The evaluation transform, the same for every image of a data set: the shorter side is resized to ``shorter_side`` and
the centre of ``size`` x ``size`` is cut out. Where the images are larger than ``size`` by more than ImageNet's margin
of 256/224, ``shorter_side`` is ``size`` * 256/224 (resize to 256, crop 224); otherwise it is ``size``, so that small
square images are only resized, and left as they are where the size fits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.v2 import functional

from autoslim.errors import UserError, first_line

MARGIN = 256 / 224
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I"})
_TOP_BYTE = 8  # bits to shift a 16-bit pixel down


def is_grey(mode: str) -> bool:
    """Whether a PIL mode has no colours."""
    return mode in _GREY_MODES or mode.startswith("I;16")


def shorter_side_for(native: float, size: int) -> int:
    """The shorter side before the centre crop, for images whose own shorter side is ``native`` (typically)."""
    return round(size * MARGIN) if native > size * MARGIN else size


def unreadable(path: Path | str, error: Exception) -> UserError:
    """The error for an image that does not decode."""
    reason = first_line(error).replace(repr(str(path)), "it")
    return UserError(f"{path} is not a readable image ({reason}); repair or remove the file and prepare the data again")


def open_image(path: Path, channels: int | None) -> Image.Image:
    """Decode a file to grey (1 channel), RGB (3) or its own mode (None). ``UserError`` with the path if it fails."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range: save it with 8 bits")
            return image if channels is None else with_channels(image, channels)
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, zlib.error, struct.error, bombs
        raise unreadable(path, error) from error


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """Convert to grey (ITU-R 601 luma) or RGB; transparency is dropped, 16-bit grey keeps its upper byte."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL would clip these at 255 instead of scaling them.
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> _TOP_BYTE, 0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 pixels of an "L" or "RGB" image, channels first."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))  # -> (C, H, W)


def evaluation_pixels(image: Image.Image, channels: int, shorter_side: int, size: int) -> np.ndarray:
    """The evaluation transform: uint8 (channels, size, size)."""
    image = with_channels(image, channels)
    image = functional.resize(image, [shorter_side], antialias=True)
    return to_array(functional.center_crop(image, [size, size]))


def area_pixels(image: Image.Image, channels: int, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cut ``box`` (top, left, height, width) out and resize it: uint8 (channels, size, size)."""
    image = with_channels(image, channels)
    return to_array(functional.resized_crop(image, *box, size=[size, size], antialias=True))
