"""Compares pixels with torchvision's transforms, and checks that data modules do not import torchvision."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from paths import ROOT
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as reference

from autoslim.data.images import area_pixels, evaluation_pixels, to_array
from autoslim.data.sources import IMAGE_SUFFIXES


def noise(width: int, height: int, mode: str) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng((width, height)).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("sides", [(8, 8), (9, 8), (8, 10), (13, 8), (16, 15)])
def test_evaluation_pixels_are_torchvisions_resize_and_centre_crop(mode: str, sides: tuple[int, int]) -> None:
    """They are bitwise equal for odd and even margins, larger and smaller sizes, wide and tall images."""
    shorter_side, size = max(sides), min(sides)
    for width, height in product((3, 8, 13, 31, 40), repeat=2):
        image = noise(width, height, mode)
        expected = reference.center_crop(reference.resize(image, [shorter_side], antialias=True), [size, size])
        assert np.array_equal(
            evaluation_pixels(image, len(image.getbands()), shorter_side, size), to_array(expected)
        ), f"{width}x{height}"


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("box", [(0, 0, 20, 30), (3, 5, 8, 8), (2, 1, 17, 9), (10, 20, 3, 5)])
def test_area_pixels_are_torchvisions_resized_crop(mode: str, box: tuple[int, int, int, int]) -> None:
    image = noise(30, 20, mode)
    expected = reference.resized_crop(image, *box, size=[8, 8], antialias=True)
    assert np.array_equal(area_pixels(image, len(image.getbands()), box, 8), to_array(expected))


def test_image_suffixes_are_those_of_torchvisions_image_folder() -> None:
    assert IMAGE_SUFFIXES == IMG_EXTENSIONS


def test_batches_and_preparation_import_neither_torchvision_nor_scikit_learn() -> None:
    code = (
        "import sys, autoslim.data.batches, autoslim.data.prepare, autoslim.data.prepared, autoslim.training.loop;"
        "print([name for name in ('torchvision', 'sklearn', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
