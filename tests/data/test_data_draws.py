import math

import numpy as np
import pytest
from scipy import stats

from autoslim.data.augmentation import AREA, COLUMNS, crop_boxes, shuffle, uniforms

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """Returns the output for an advanced state, by the published algorithm in plain integers."""
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_draws_are_splitmix64_of_seed_and_epoch_at_the_images_position() -> None:
    key = int(np.random.SeedSequence((7, 3)).generate_state(1, np.uint64)[0])
    drawn = uniforms(7, 3, np.array([0, 5, 1_281_166]))
    for row, index in enumerate((0, 5, 1_281_166)):
        for column in (0, 1, COLUMNS - 1):
            state = (key + (index * COLUMNS + column + 1) * 0x9E3779B97F4A7C15) & MASK
            assert drawn[row, column] == (splitmix64(state) >> 11) * 2.0**-53


def test_draws_do_not_depend_on_the_other_images() -> None:
    together = uniforms(0, 0, np.array([4, 9, 2]))
    assert np.array_equal(together[1], uniforms(0, 0, np.array([9]))[0])
    assert np.array_equal(together[:, AREA], uniforms(0, 0, np.array([4, 9, 2]), AREA))


def test_draws_change_with_seed_and_epoch_and_are_uniform() -> None:
    indices = np.arange(5000)
    draws = [uniforms(seed, epoch, indices) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for drawn in draws:
        assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-4
        # Neighbouring columns and images are uncorrelated: |r| of 5000 pairs stays below 5 / sqrt(5000).
        assert np.abs(np.corrcoef(drawn.T) - np.eye(COLUMNS)).max() < 5 / math.sqrt(5000)
    assert abs(np.corrcoef(draws[0].ravel(), draws[1].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(draws[0].ravel(), draws[2].ravel())[0, 1]) < 0.015


def test_shuffles_are_permutations_that_change_with_the_epoch() -> None:
    assert sorted(shuffle(100, 0, 0)) == list(range(100))
    assert shuffle(100, 0, 0).tolist() == shuffle(100, 0, 0).tolist()
    assert shuffle(100, 0, 0).tolist() != shuffle(100, 0, 1).tolist()
    assert shuffle(100, 0, 0).tolist() != shuffle(100, 1, 0).tolist()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (375, 500), (240, 180)])
def test_area_boxes_lie_in_the_image_and_keep_area_and_ratio(height: int, width: int) -> None:
    drawn = uniforms(0, 0, np.arange(4000), AREA)
    top, left, box_height, box_width = crop_boxes(drawn, height, width, (0.25, 1.0)).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    # Each side is rounded to a pixel, and the smallest is about half of the image's.
    rounding = 1.5 / min(height, width)
    share = box_height * box_width / (height * width)
    assert share.min() > 0.25 * (1 - 2 * rounding) ** 2
    assert share.min() < 0.27  # the whole range is used
    assert share.max() > 0.9
    ratio = box_width / box_height
    assert ratio.min() > 3 / 4 * (1 - 4 * rounding)
    assert ratio.max() < 4 / 3 * (1 + 4 * rounding)
    assert ratio.min() < 0.8
    assert ratio.max() > 1.25


def test_positions_of_area_boxes_reach_both_ends() -> None:
    drawn = uniforms(0, 0, np.arange(4000), AREA)
    top, left, height, width = crop_boxes(drawn, 16, 16, (0.25, 0.25)).T
    assert {0, 1} <= set(top.tolist())
    assert (top + height == 16).any()
    assert (left + width == 16).any()


def test_without_a_fit_the_largest_centre_crop_of_an_allowed_ratio_is_taken() -> None:
    drawn = uniforms(0, 0, np.arange(50), AREA)
    assert (crop_boxes(drawn, 30, 300, (1.0, 1.0)) == (0, 130, 30, 40)).all()
    assert (crop_boxes(drawn, 300, 30, (1.0, 1.0)) == (130, 0, 40, 30)).all()
