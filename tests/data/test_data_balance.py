from itertools import pairwise

import numpy as np
import pytest

from autoslim.data.prepare import balanced_quotas, choose_balanced


@pytest.mark.parametrize("seed", range(20))
def test_quotas_have_the_total_and_are_as_even_as_available(seed: int) -> None:
    rng = np.random.default_rng(seed)
    available = rng.integers(0, 30, size=7)
    total = int(rng.integers(0, available.sum() + 1))
    quotas = balanced_quotas(available, total, rng.permutation(7))
    assert quotas.sum() == total
    assert (quotas <= available).all()
    # A class may have more than one image less than the largest only if all its images are used.
    behind = quotas < quotas.max() - 1
    assert (quotas[behind] == available[behind]).all()


def test_a_choice_has_equal_classes_and_no_image_twice() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    chosen = choose_balanced(labels, 50, np.random.default_rng(1))
    assert np.bincount(labels[chosen]).tolist() == [10] * 5
    assert len(set(chosen.tolist())) == 50
    assert (np.diff(chosen) > 0).all()


def test_smaller_choices_of_a_seed_are_subsets_of_larger_ones() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    choices = [set(choose_balanced(labels, total, np.random.default_rng(3)).tolist()) for total in (5, 18, 90, 200)]
    assert all(small < large for small, large in pairwise(choices))


def test_available_bounds_each_class() -> None:
    labels = np.repeat([0, 1], [10, 100])
    chosen = choose_balanced(labels, 40, np.random.default_rng(0), available=np.array([5, 50]))
    assert np.bincount(labels[chosen]).tolist() == [5, 35]
