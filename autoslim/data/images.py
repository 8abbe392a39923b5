"""Converts image files to pixels: decoding, conversion of colours, and the evaluation transform.

The evaluation transform resizes an image until it just covers a box, and cuts out the centre of ``size`` (height,
width). The box has the aspect ratio of ``size``; its ``shorter_side`` is the same for all images of a data set. If the
images are larger than ``size`` * 256/224, the box is that large, which is ImageNet's ratio (resize to 256, crop 224).
Otherwise it is ``size``: small images of the same aspect ratio are only resized, or unchanged if they have that size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from autoslim.errors import UserError, first_line

MARGIN = 256 / 224
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I"})
_BYTE = 8  # bits of a pixel after conversion
DEEP_BITS = 16  # of the grey images that PIL opens with more than 8 bits

Size = tuple[int, int]  # height and width in pixels


def is_grey(mode: str) -> bool:
    """Returns whether images of a PIL mode have no colours."""
    return mode in _GREY_MODES or mode.startswith("I;16")


def is_deep(mode: str) -> bool:
    """Returns whether images of a PIL mode have integer pixels of more than 8 bits."""
    return mode == "I" or mode.startswith("I;16")


def shorter_side_for(native: float, size: int) -> int:
    """Returns the shorter side of the box before the centre crop.

    ``size`` is the shorter side of the crop, and ``native`` that of the largest such crop from a typical image.
    """
    return round(size * MARGIN) if native > size * MARGIN else size


def unreadable(path: Path | str, error: Exception) -> UserError:
    """Returns the error for an image that cannot be decoded."""
    reason = first_line(error).replace(repr(str(path)), "it")
    return UserError(f"{path} is not a readable image ({reason}); repair or remove the file and prepare the data again")


def decoded(image: Image.Image, channels: int | None, bits: int = DEEP_BITS) -> Image.Image:
    """Decodes an opened image to grey (1 channel), RGB (3) or its own mode (None). For ``bits`` see ``with_channels``.

    Raises an error of any class if the image cannot be decoded.
    """
    image.load()
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save it with 8 bits")
    return image if channels is None else with_channels(image, channels, bits)


def open_image(path: Path, channels: int | None, bits: int = DEEP_BITS) -> Image.Image:
    """Decodes a file, see ``decoded``.

    Raises:
        UserError: the file cannot be decoded. The message contains its path.
    """
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise ValueError("it is not a file" if path.exists() else "it does not exist")
        with Image.open(path) as image:
            return decoded(image, channels, bits)
    except Exception as error:  # such as OSError, SyntaxError, zlib.error, struct.error, DecompressionBombError
        raise unreadable(path, error) from error


def with_channels(image: Image.Image, channels: int, bits: int = DEEP_BITS) -> Image.Image:
    """Converts an image to grey (ITU-R 601 luma) or RGB, without transparency.

    Integer pixels of more than 8 bits are divided by 2 ** (bits - 8). ``bits`` is the number that the values of the
    data set use, so that 12-bit values in 16-bit files do not become nearly black.
    """
    if is_deep(image.mode):
        # PIL would clip these at 255 instead of scaling them.
        values = (np.asarray(image).astype(np.int64) << _BYTE) >> bits
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def used_bits(image: Image.Image) -> int:
    """Returns the number of bits that the values of a deep image (see ``is_deep``) use; 0 for other images."""
    if not is_deep(image.mode):
        return 0
    return int(np.asarray(image).max(initial=0)).bit_length()


def to_array(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an "L" or "RGB" image as uint8, channels first."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))  # -> (C, H, W)


# Pillow is used directly, because torchvision takes seconds to import, also in every worker process. torchvision's
# resize and crop call Pillow with the same arguments.


def evaluation_pixels(
    image: Image.Image, channels: int, shorter_side: int, size: Size, bits: int = DEEP_BITS
) -> np.ndarray:
    """Applies the evaluation transform: uint8 (channels, *size).

    ``shorter_side`` must be at least the shorter side of ``size``. For ``bits`` see ``with_channels``.
    """
    height, width = size
    assert shorter_side >= min(size)
    box_height, box_width = (round(side * shorter_side / min(size)) for side in size)
    image = with_channels(image, channels, bits)
    if image.width * box_height <= image.height * box_width:
        image = _resized(image, box_width, max(box_height, int(box_width * image.height / image.width)))
    else:
        image = _resized(image, max(box_width, int(box_height * image.width / image.height)), box_height)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return to_array(image.crop((left, top, left + width, top + height)))


def area_pixels(
    image: Image.Image, channels: int, box: tuple[int, int, int, int], size: Size, bits: int = DEEP_BITS
) -> np.ndarray:
    """Cuts out ``box`` (top, left, height, width) and resizes it: uint8 (channels, *size)."""
    top, left, height, width = box
    image = with_channels(image, channels, bits).crop((left, top, left + width, top + height))
    return to_array(_resized(image, size[1], size[0]))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resizes an image bilinearly, with antialiasing."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
