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

from autoslim.data.images import area_pixels, evaluation_pixels, to_array, used_bits, with_channels
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
            evaluation_pixels(image, len(image.getbands()), shorter_side, (size, size)), to_array(expected)
        ), f"{width}x{height}"


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("box", [(0, 0, 20, 30), (3, 5, 8, 8), (2, 1, 17, 9), (10, 20, 3, 5)])
def test_area_pixels_are_torchvisions_resized_crop(mode: str, box: tuple[int, int, int, int]) -> None:
    image = noise(30, 20, mode)
    expected = reference.resized_crop(image, *box, size=[8, 8], antialias=True)
    assert np.array_equal(area_pixels(image, len(image.getbands()), box, (8, 8)), to_array(expected))


def test_image_suffixes_are_those_of_torchvisions_image_folder() -> None:
    assert IMAGE_SUFFIXES == IMG_EXTENSIONS


def test_batches_and_preparation_import_neither_torchvision_nor_scikit_learn() -> None:
    code = (
        "import sys, autoslim.data.batches, autoslim.data.prepare, autoslim.data.prepared, autoslim.training.loop;"
        "print([name for name in ('torchvision', 'sklearn', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("sides", [(8, 12), (12, 8), (5, 20)])
@pytest.mark.parametrize("shown", [(12, 8), (30, 31), (16, 24), (24, 16), (7, 50)])
def test_a_size_that_is_not_square_is_covered_and_its_centre_is_cut_out(
    sides: tuple[int, int], shown: tuple[int, int]
) -> None:
    """The image is scaled by one factor, at least one side becomes that of the box, and the other is cropped."""
    image, (height, width) = noise(*shown, "RGB"), sides
    factor = max(height / image.height, width / image.width)
    scaled = [max(side, int(factor * length + 1e-9)) for side, length in zip(sides, shown[::-1], strict=True)]
    expected = reference.center_crop(reference.resize(image, scaled, antialias=True), sides)
    assert np.array_equal(evaluation_pixels(image, 3, min(sides), sides), to_array(expected))


def test_an_image_of_the_size_is_unchanged() -> None:
    image = noise(12, 8, "RGB")
    assert np.array_equal(evaluation_pixels(image, 3, 8, (8, 12)), to_array(image))


@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_values_are_scaled_by_the_bits_that_the_data_use(bits: int, dtype: type) -> None:
    values = np.linspace(0, 2**bits - 1, 64).astype(dtype).reshape(8, 8)
    image = Image.fromarray(values)
    assert used_bits(image) == bits
    pixels = evaluation_pixels(image, 1, 8, (8, 8), bits)[0]
    assert np.array_equal(pixels, (values.astype(float) * 2.0 ** (8 - bits)).astype(np.uint8))


def test_values_beyond_the_bits_are_clipped() -> None:
    image = Image.fromarray(np.full((2, 2), 5000, np.uint16))
    assert np.asarray(with_channels(image, 1, 12)).tolist() == [[255, 255], [255, 255]]
