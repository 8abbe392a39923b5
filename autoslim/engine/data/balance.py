"""Class-balanced choices of images."""

from __future__ import annotations

import numpy as np


def balanced_quotas(available: np.ndarray, total: int, order: np.ndarray) -> np.ndarray:
    """How many of each class to take so that they sum to ``total`` and are as even as ``available`` (K,) allows.

    Every class gets the same number, a smaller class all it has; what is left over goes one each to the classes first
    in ``order`` (K,). Larger totals give element-wise larger quotas. ``total`` must not exceed ``available.sum()``.
    """
    assert 0 <= total <= available.sum()
    low, high = 0, int(available.max(initial=0))
    while low < high:  # the highest common level that stays within the total
        level = (low + high + 1) // 2
        if np.minimum(available, level).sum() <= total:
            low = level
        else:
            high = level - 1
    quotas: np.ndarray = np.minimum(available, low)
    open_classes = order[available[order] > low]
    quotas[open_classes[: total - int(quotas.sum())]] += 1
    return quotas


def choose_balanced(
    labels: np.ndarray, total: int, rng: np.random.Generator, *, available: np.ndarray | None = None
) -> np.ndarray:
    """Sorted positions of ``total`` images of ``labels`` (N,), class-balanced, drawn by ``rng``.

    ``available`` (K,) bounds the number by class (None: all images). The same generator state gives nested choices:
    those of a smaller total are among those of a larger one.
    """
    counts = np.bincount(labels)
    quotas = balanced_quotas(counts if available is None else available, total, rng.permutation(len(counts)))
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # class after class, shuffled within each
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(labels)) - starts[labels[by_class]]  # 0, 1, ... within the class
    chosen: np.ndarray = np.sort(by_class[rank < quotas[labels[by_class]]])
    return chosen
