"""Files that survive a kill: atomic writes, weights, and checkpoints keyed by what decides the result."""

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
    """Writes parameters and buffers as safetensors, in torch's default memory layout; shared ones under each name."""
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in network.state_dict().items()
    }
    write_atomically(path, lambda to: save_file(state, to))


def load_weights(network: nn.Module, path: Path) -> None:
    """Reads what ``save_weights`` wrote, in place.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise UserError(
            f"there are no weights at {path}; run `dvc repro`, or `dvc pull` if others made them"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} does not hold weights of this network: {reason[min(1, len(reason) - 1)].strip()}; run `dvc repro`"
        ) from error


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """The mapping in the file that a stage wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); run `dvc repro {stage}` again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds no mapping); run `dvc repro {stage}` again")
    return values


def run_key(**parts: object) -> str:
    """A short key of everything that defines a run; runs whose key differs in anything never share a checkpoint."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """One SHA-256 over the SHA-256 of each file, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
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
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            print(f"checkpoint {path} cannot be read ({type(error).__name__}); starting anew", file=sys.stderr)
            return None
        return state

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """The run is this process's alone: another one of the same key (in DVC's queue, say) waits for it to end."""
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
        """Removes the run's state: its results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
