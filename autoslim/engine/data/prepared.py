"""A prepared data folder, opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoslim.engine.data.info import SPLITS, DataInfo, read_info
from autoslim.engine.data.schemes import located
from autoslim.engine.data.storage import images_path, labels_path, read_manifest
from autoslim.vocabulary.errors import UserError

RESIDENT_LIMIT = 4 * 2**30  # bytes; a larger split stays on the host and its batches are moved


class PreparedData:
    """Splits "train", "search" and "test" as ``prepare`` wrote them; images are memory-mapped or in their files."""

    def __init__(self, info: DataInfo, folder: Path, root: Path) -> None:
        """Use ``open``. ``root`` is where a manifest's paths start."""
        self.info = info
        self.folder = folder
        self.root = root
        self._resident: dict[tuple[str, torch.device], Tensor] = {}
        self._paths: dict[str, np.ndarray] = {}
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}
        if info.storage == "files":
            for split, (paths, labels) in read_manifest(folder).items():
                self._paths[split], self._labels[split] = paths, labels
        else:
            for split in SPLITS:
                # Copy-on-write: torch wants writable memory, the file stays as it is.
                self._images[split] = np.load(images_path(folder, split), mmap_mode="c")
                self._labels[split] = np.load(labels_path(folder, split))

    @classmethod
    def open(cls, folder: Path, *, relative_to: Path = Path()) -> PreparedData:
        """``UserError`` if ``folder`` is missing or not a prepared folder, or if a manifest's images are gone.

        ``relative_to``: where the relative root of a manifest starts (as given to ``prepare``).
        """
        info = read_info(folder)
        root = located(info.root, relative_to) if info.storage == "files" else folder
        if not root.is_dir():
            raise UserError(f"the images of {folder} lie in {root}, which does not exist; run the prepare stage again")
        try:
            data = cls(info, folder, root)
        except (OSError, ValueError, KeyError, StopIteration) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is incomplete ({reason}); run the prepare stage again") from error
        found = {split: len(data.labels(split)) for split in SPLITS}
        if found != info.counts:
            raise UserError(f"{folder} is incomplete (images {found}, data.json says {info.counts}); prepare it again")
        return data

    def labels(self, split: str) -> np.ndarray:
        """int64 (N,), in the stored order (class after class for a folder: shuffle before cutting into chunks)."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        return self._labels[split]

    def images(self, split: str) -> np.ndarray:
        """uint8 (N, C, S, S), memory-mapped; only of storage "arrays"."""
        if self.info.storage != "arrays":
            raise ValueError("data stored as files has no array of images; use eval_batches")
        self.labels(split)
        return self._images[split]

    def paths(self, split: str) -> np.ndarray:
        """Paths relative to ``root`` (N,) as bytes; only of storage "files"."""
        if self.info.storage != "files":
            raise ValueError("data stored as arrays has no files; use images")
        self.labels(split)
        return self._paths[split]

    def resident(self, split: str, device: torch.device) -> Tensor:
        """The images of a split (uint8) on ``device``, moved once and kept; on the host where they are too many."""
        images = self.images(split)
        if images.nbytes > RESIDENT_LIMIT:
            device = torch.device("cpu")
        if (split, device) not in self._resident:
            self._resident[split, device] = torch.from_numpy(images).to(device)
        return self._resident[split, device]
