"""Predictions for images as they are in files: the preprocessing of the evaluation, the network, and its classes."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from autoslim.data.images import evaluation_pixels
from autoslim.errors import UserError, first_line
from autoslim.export.predictions import Prediction, predictions


class Predictor:
    """A network with the preprocessing of its input.

    Args:
        about: description of the input and the classes (see ``formats.description``).
        run: computes logits (N, classes) from normalised float32 images (N, C, H, W).

    Raises:
        UserError: the network was trained on data of the user's own, which are not image files.
    """

    def __init__(self, about: Mapping[str, Any], run: Callable[[np.ndarray], np.ndarray]) -> None:
        if not (about["classes"] and about["input"]["mean"]):
            raise UserError(
                "the network does not classify image files: its data are your own, without normalisation or classes; "
                "run an exported file with its runtime"
            )
        self.classes: list[str] = about["classes"]
        self._input: Mapping[str, Any] = about["input"]
        self._run = run

    def pixels(self, image: Path | bytes, name: str = "the image") -> np.ndarray:
        """Returns the pixels of an image file, or of its contents, after the evaluation transform: uint8 (C, H, W).

        Raises:
            UserError: it is not an image that can be decoded. The message contains its path, or ``name``.
        """
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                opened.load()
                if opened.mode == "F":
                    raise ValueError("floating-point pixels have no known range: save it with 8 bits")
                channels, height, width = self._input["shape"]
                return evaluation_pixels(
                    opened, channels, self._input["shorter_side"], (height, width), self._input["bits"]
                )
        except Exception as error:  # such as OSError, SyntaxError, zlib.error, struct.error, DecompressionBombError
            what = name if isinstance(image, bytes) else image
            raise UserError(
                f"{what} is not a readable image ({first_line(error)}); use an image file, such as .png or .jpg"
            ) from error

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """Scales uint8 pixels (N, C, H, W) to [0, 1] and normalises each channel: float32."""
        mean, std = (np.array(self._input[key], np.float32)[:, None, None] for key in ("mean", "std"))
        normal: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
        return normal

    def predict(self, pixels: Iterable[np.ndarray], top: int = 5) -> list[Prediction]:
        """Returns the most probable classes of a batch of images, each uint8 (C, H, W)."""
        return predictions(self._run(self.normalised(np.stack(list(pixels)))), self.classes, top)
