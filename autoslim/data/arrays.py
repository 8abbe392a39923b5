"""Reads arrays from ``.npy`` files that others may have written."""

import tokenize
from pathlib import Path
from typing import Literal

import numpy as np

from autoslim.errors import first_line


def read_array(path: Path, mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """Returns the array in a ``.npy`` file. No code in the file is executed.

    Args:
        mode: maps the file into memory instead of reading it, see ``numpy.memmap``.

    Raises:
        ValueError: the file is not a complete ``.npy`` file of an array without Python objects.
        OSError: it cannot be read.
    """
    try:
        # Mapped first, because numpy would allocate memory for the shape in the header, whatever the file's size.
        mapped = np.load(path, mmap_mode=mode or "r", allow_pickle=False)
        if not isinstance(mapped, np.ndarray):
            mapped.close()
            raise ValueError("it is an archive of arrays")
        if min(mapped.shape, default=0) < 0:
            raise ValueError(f"its shape is {mapped.shape}")
        return mapped if mode is not None else np.array(mapped, order="K")
    except (EOFError, OverflowError, SyntaxError, tokenize.TokenError, TypeError) as error:
        raise ValueError(first_line(error)) from error
