"""Finds images that are in more than one split, by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoslim.data.prepared import over_images
from autoslim.data.sources import Part
from autoslim.files import sha256

_END = 4096  # bytes at the end of a file that are compared first
_PAIRS = (("test", "train"), ("test", "search"), ("search", "train"))


def shared_images(contents: Mapping[str, Sequence[bytes]]) -> dict[tuple[str, str], int]:
    """Returns (split, other split) -> number of images of the first whose content is also in the other; no zeros."""
    counts = {pair: len(_indices(contents[pair[0]], set(contents[pair[1]]))) for pair in _PAIRS}
    return {pair: count for pair, count in counts.items() if count}


def describe_shared(shared: Mapping[tuple[str, str], int], what: str = "images") -> str:
    """Returns a warning that names the counts; "" if no image is in two splits."""
    if not shared:
        return ""
    counts = ", ".join(f"{count} of {split} are also in {other}" for (split, other), count in shared.items())
    return (
        f"identical {what} are in more than one split: {counts}; accuracies that are measured on them are too high: "
        "remove the copies"
    )


def file_contents(
    chosen: Mapping[str, tuple[Part, np.ndarray]],
    root: Path,
    progress: Callable[[Iterable[Any], str, int], Iterable[Any]],
) -> dict[str, list[bytes]]:
    """Returns a digest of the content of each image by split; equal files have equal digests, and only they.

    The sizes and last 4 KiB of all files are compared first. Only files that agree in both with a file of another split
    are read as a whole.
    """
    keys: dict[str, list[bytes]] = {}
    for split, (part, indices) in chosen.items():

        def end_of(index: int, part: Part = part) -> bytes:
            assert part.paths is not None
            return _end(root / part.paths[index]) if part.content is None else part.content(index)

        keys[split] = list(progress(over_images(end_of, part, indices), f"comparing {split}", len(indices)))
    whole = {split: list(values) for split, values in keys.items()}
    for split, (part, indices) in chosen.items():
        if part.content is not None:
            continue
        assert part.paths is not None
        others = {key for other, values in keys.items() if other != split for key in values}
        for position in _indices(keys[split], others):
            whole[split][position] = sha256(root / part.paths[int(indices[position])]).encode()
    return whole


def _indices(values: Sequence[bytes], others: set[bytes]) -> list[int]:
    return [index for index, value in enumerate(values) if value in others]


def _end(path: Path) -> bytes:
    """Returns the size of a file and a digest of its end; b"" with the path for a file that cannot be read."""
    try:
        if not path.is_file():
            raise OSError
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _END))
            return size.to_bytes(8, "big") + hashlib.sha256(file.read(_END)).digest()[:16]
    except OSError:
        return str(path).encode(errors="surrogateescape")
