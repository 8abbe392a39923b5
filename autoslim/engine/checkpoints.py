"""Checkpoints that survive a kill, keyed by what defines the run."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def run_key(**parts: object) -> str:
    """A short key of everything that defines a run; runs whose key differs in anything never share a checkpoint."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """SHA-256 over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path`` and puts it in place whole: a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda to: to.write_text(json.dumps(value, indent=1) + "\n"))


class Checkpoints:
    """The folder of one run's state, outside DVC's outputs (DVC deletes those before a rerun).

    Args:
        root: the folder of all runs' checkpoints.
        stage: names the run for people.
        key: ``run_key`` of what defines it.
    """

    def __init__(self, root: Path, stage: str, key: str) -> None:
        self.folder = root / f"{stage}-{key}"

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        write_atomically(self.folder / f"{name}.pt", lambda to: torch.save(dict(state), to))

    def load(self, name: str) -> dict[str, Any] | None:
        """The state saved last under this name, on the CPU, or None."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def clear(self) -> None:
        """Removes the run's state: its results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
