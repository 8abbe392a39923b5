"""Weights files, and checkpoints keyed by everything that affects the result."""

import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autoslim.errors import UserError, first_line
from autoslim.files import DIGEST, DamagedError, check_space, os_error, write_bytes


def save_weights(network: nn.Module | None, path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Writes parameters and buffers as contiguous safetensors with a digest; without a network, an empty file.

    Shared tensors are written under each of their names. ``metadata`` are further entries of the file's metadata. Equal
    tensors and metadata produce equal bytes.

    Returns:
        The digest of the tensors (see ``weights_digest``).
    """
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in ({} if network is None else network.state_dict()).items()
    }
    digest = _tensors_digest(state)
    content = safetensors.torch.save(state, metadata={**(metadata or {}), DIGEST: digest})
    start = 8 + int.from_bytes(content[:8], "little")  # of the tensors, after the header and its length
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes it in a random order
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the tensors
    write_bytes(path, len(text).to_bytes(8, "little"), text, memoryview(content)[start:])
    return digest


def _tensors_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_digest(path: Path) -> str | None:
    """Returns the digest of the tensors that ``save_weights`` wrote to ``path``; None if the file has none.

    Files that belong together name each other by it. The tensors are not read.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            digest: str | None = (file.metadata() or {}).get(DIGEST)
            return digest
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({first_line(error)}); run `dvc repro`") from error


def check_described(path: Path, digest: str | None, description: Path) -> None:
    """Checks that weights are those that another file describes, and not those of another run.

    Args:
        path: a file of ``save_weights``.
        digest: ``weights_digest`` of the weights that ``description`` describes. Nothing is checked without it, or if
            the weights have none.

    Raises:
        UserError: they are other weights.
    """
    if digest and (weights_digest(path) or digest) != digest:
        raise UserError(
            f"{path} does not contain the weights that {description} belongs to: one of the two files is from another "
            "run; run `dvc repro`"
        )


def load_weights(network: nn.Module, path: Path, expected: Mapping[str, str] | None = None) -> None:
    """Loads weights that ``save_weights`` wrote into ``network``, in place.

    Args:
        expected: values that entries of the file's metadata must have, if they exist.

    Raises:
        UserError: the file is missing or damaged, or contains the weights of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        if DIGEST in metadata and metadata[DIGEST] != _tensors_digest(state):
            raise DamagedError("they do not match their digest: the file was damaged; delete it")
        for name, value in (expected or {}).items():
            if metadata.get(name, value) != value:
                raise DamagedError(f"they are those of {name} {metadata[name][:12]}, not {value[:12]}")
        network.load_state_dict(state)
    except FileNotFoundError as error:
        raise UserError(
            f"there are no weights at {path}; run `dvc repro`, or `dvc pull` if someone else has trained them"
        ) from error
    except (SafetensorError, RuntimeError, OSError, DamagedError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{path} does not contain weights of this network: {reason[min(1, len(reason) - 1)].strip()}; run "
            "`dvc repro`"
        ) from error


def has_weights(path: Path) -> bool:
    """Returns whether ``save_weights`` wrote ``path`` for a network, and not an empty file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return bool(file.keys())
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing or damaged ({first_line(error)}); run `dvc repro`") from error


_TRAILER = b"\nsha256 "
_TRAILER_BYTES = len(_TRAILER) + 64

Restored = TypeVar("Restored")


class Checkpoints:
    """The checkpoints of one run, in a folder outside DVC's outputs (DVC deletes those before a rerun).

    Args:
        root: the folder with the checkpoints of all runs.
        stage: the readable part of the folder's name.
        key: ``run_key`` of everything that defines the run.
    """

    def __init__(self, root: Path, stage: str, key: str) -> None:
        self.folder = root / f"{stage}-{key}"
        self._intact: set[str] = set()  # names whose last file this process wrote or read

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Writes a state with its digest, and keeps the one before.

        Raises:
            UserError: it could not be written, for example because the disk is full.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content, path = buffer.getbuffer(), self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        # A damaged file must not replace the good one before it.
        keep = self._previous(name) if name in self._intact else None
        write_bytes(path, content, _TRAILER + hashlib.sha256(content).hexdigest().encode(), keep=keep)
        self._intact.add(name)

    def load(self, name: str) -> dict[str, Any] | None:
        """Returns the last undamaged state saved under this name, on the CPU; None if there is none."""
        return self.restore(name, lambda state: state)

    def restore(self, name: str, use: Callable[[dict[str, Any]], Restored]) -> Restored | None:
        """Calls ``use`` with the last state saved under this name, on the CPU, and returns its result.

        If the file is damaged, or if ``use`` raises an error because it contains something else, this is printed on
        stderr, and the state saved before it is used. ``use`` must undo its changes before it raises.

        Returns:
            None if there is no usable state.
        """
        latest, previous = self.path(name), self._previous(name)
        for path in (latest, previous):
            if not path.exists():
                continue
            try:
                result = use(_read(path))
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # torch raises errors of many classes for a damaged file
                earlier = path == latest and previous.exists()
                next_step = "continuing from the one before" if earlier else "starting from scratch"
                reason = first_line(error) if isinstance(error, ValueError | OSError) else type(error).__name__
                print(f"checkpoint {path} cannot be used ({reason}); {next_step}", file=sys.stderr)
                continue
            if path == latest:
                self._intact.add(name)
            return result
        return None

    def check_space(self, network: nn.Module, optimiser: torch.optim.Optimizer, averaged: bool = False) -> None:
        """Raises ``UserError`` if the disk has no room for three checkpoints: the last, the one before and the next.

        A checkpoint is estimated as the tensors of the network, once more if they are ``averaged``, and one more of
        each trained parameter (momentum; two for AdamW).
        """
        tensors = (1 + averaged) * sum(tensor.nbytes for tensor in network.state_dict().values())
        momentum = sum(parameter.nbytes for group in optimiser.param_groups for parameter in group["params"])
        momentum *= 2 if isinstance(optimiser, torch.optim.AdamW) else 1
        existing = sum(path.stat().st_size for path in self.folder.glob("*.pt") if path.is_file())
        check_space(self.folder, max(0, 3 * (tensors + momentum) - existing), "the checkpoints of this training")

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def _previous(self, name: str) -> Path:
        return self.folder / f"{name}.previous.pt"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run's lock. Another process with the same key, for example in DVC's queue, waits for it."""
        file = self.folder.with_name(f"{self.folder.name}.lock")
        lock = FileLock(file)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another run with the same checkpoints ({self.folder.name})", file=sys.stderr)
            lock.acquire()
        except OSError as error:
            raise os_error(error, file) or error from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()  # a process that waits notices this, and makes a new file
            lock.release()

    def clear(self) -> None:
        """Removes the checkpoints. Call it once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    start = len(content) - _TRAILER_BYTES
    if start < 0 or content[start : start + len(_TRAILER)] != _TRAILER:
        raise DamagedError("it has no digest: it is incomplete, or another program wrote it")
    body = memoryview(content)[:start]
    if hashlib.sha256(body).hexdigest().encode() != content[-64:]:
        raise DamagedError("it does not match its digest: it is damaged")
    state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    return state
