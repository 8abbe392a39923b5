"""``digits``: the 1,797 handwritten digits (8x8, grey) that scikit-learn installs."""

from __future__ import annotations

import numpy as np
from PIL import Image

from autoslim.engine.data.source import Part, Source

BRIGHTEST = 16  # scikit-learn's pixels are counts from 0 to 16


def load_digits_source() -> Source:
    """All digits as one part: scikit-learn ships the test half of the original set only."""
    from sklearn.datasets import load_digits  # here: a second to import, needed once

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8)  # (1797, 8, 8)
    part = Part(
        labels=digits.target.astype(np.int64),
        read=lambda index: Image.fromarray(pixels[index]),
        paths=None,
    )
    return Source(classes=tuple(str(name) for name in digits.target_names), train=part, test=None)
