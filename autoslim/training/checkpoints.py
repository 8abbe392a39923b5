"""Atomic writes, weights files, and checkpoints keyed by everything that affects the result."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autoslim.errors import UserError, first_line


def save_weights(network: nn.Module, path: Path) -> None:
    """Writes parameters and buffers as contiguous safetensors. Shared tensors are written under each of their names."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }
    write_atomically(path, lambda temporary: save_file(state, temporary))


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads weights that ``save_weights`` wrote into ``network``, in place.

    Raises:
        UserError: the file is missing or damaged, or contains the weights of another network.
    """
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise UserError(
            f"there are no weights at {path}; run `dvc repro`, or `dvc pull` if someone else has trained them"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} does not contain weights of this network: {reason[min(1, len(reason) - 1)].strip()}; run "
            "`dvc repro`"
        ) from error


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """Returns the mapping in a JSON file that ``stage`` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); run `dvc repro {stage}` again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it is not a mapping); run `dvc repro {stage}` again")
    return values


def run_key(**parts: object) -> str:
    """Returns a short hash of everything that defines a run. Runs that differ in any part do not share checkpoints."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """Returns a SHA-256 digest of the SHA-256 digests of the files, in the order of ``paths``."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path and moves the file to ``path``. If interrupted, the old file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # mkstemp creates it readable by the owner only
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


class Checkpoints:
    """The checkpoints of one run, in a folder outside DVC's outputs (DVC deletes those before a rerun).

    Args:
        root: the folder with the checkpoints of all runs.
        stage: the readable part of the folder's name.
        key: ``run_key`` of everything that defines the run.
    """

    def __init__(self, root: Path, stage: str, key: str) -> None:
        self.folder = root / f"{stage}-{key}"

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        write_atomically(self.folder / f"{name}.pt", lambda temporary: torch.save(dict(state), temporary))

    def load(self, name: str) -> dict[str, Any] | None:
        """Returns the last state saved under this name, on the CPU; None if there is none or it cannot be read."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises errors of many classes for a damaged file
            print(f"checkpoint {path} cannot be read ({type(error).__name__}); starting from scratch", file=sys.stderr)
            return None
        return state

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run's lock. Another process with the same key, for example in DVC's queue, waits for it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another run with the same checkpoints ({self.folder.name})", file=sys.stderr)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Removes the checkpoints. Call it once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
