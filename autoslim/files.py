"""Atomic files with digests: a file that is read back is the one that was written, or an error names it.

Every file that a later run reads contains a SHA-256 digest of its content: JSON files as the entry ``digest``, lines of
a log in each line, weights in the metadata of safetensors, and checkpoints after the content. (SHA-256 takes about half
the time of BLAKE2b on processors with SHA instructions.) Files without a digest are read without this check, because
users make some of them.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autoslim.errors import UserError, first_line

DIGEST = "digest"
_TAIL = 80  # bytes at the end of a line that contain its digest
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PROTECTED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_OF_ANOTHER_KIND = frozenset({errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOENT})
_OF_THE_DISK = frozenset({errno.EIO, errno.ESTALE})


class DamagedError(ValueError):
    """Raised for content that does not match its digest."""


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


def sha256(path: Path) -> str:
    """Returns the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(
    path: Path, write: Callable[[Path], object], *, keep: Path | None = None, needed: int | None = None
) -> None:
    """Calls ``write`` with a temporary path and moves the file to ``path``. If interrupted, the old file remains.

    The temporary file has a fixed name, so that one that a killed process left is replaced by the next write.

    Args:
        keep: where the old file is moved to. Otherwise it is replaced.
        needed: the size of the file in bytes, if it is known, for the error.

    Raises:
        UserError: the disk is full or fails, the folder is not writable, or something else is in the file's place.
    """
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.chmod(temporary, 0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power cut after the move may leave an empty file
        if keep is not None and path.is_file():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise os_error(error, path, needed) or error from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, *parts: bytes | memoryview, keep: Path | None = None) -> None:
    """Writes ``parts`` one after the other to a file, atomically. For ``keep`` and errors see ``write_atomically``."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)

    write_atomically(path, write, keep=keep, needed=sum(len(part) for part in parts))


def os_error(error: OSError, path: Path | str | None = None, needed: int | None = None) -> UserError | None:
    """Returns the error for the user if a file could not be written or read; None if the reason is another one.

    Args:
        path: the file; by default, the one that ``error`` names.
        needed: its size in bytes, if it is known.
    """
    named, reason = path or error.filename or "a file", os.strerror(error.errno or 0)
    sizes = [] if needed is None else [f"{format_bytes(needed)} needed"]
    resume = "run again; files written before, such as the last checkpoint, are intact"
    if error.errno in _FULL:
        if path is not None:
            sizes.append(f"{format_bytes(free_bytes(Path(path)))} free")
        details = f" ({', '.join(sizes)})" if sizes else ""
        return UserError(f"{named} could not be written: {reason}{details}; free space and {resume}")
    if error.errno in _PROTECTED:
        return UserError(f"{named} could not be accessed: {reason}; correct the permissions and {resume}")
    if error.errno in _OF_THE_DISK:
        return UserError(f"{named} could not be accessed: {reason}; check the disk and {resume}")
    if path is not None and error.errno in _OF_ANOTHER_KIND and (obstacle := in_place_of(Path(path))):
        return UserError(f"{path} could not be written: {obstacle}; move it away and {resume}")
    return None


def in_place_of(path: Path) -> str:
    """Returns what is in the place of a file to be written, or of a folder above it; "" if nothing is."""
    for folder in reversed(path.parents):
        if folder.is_symlink() and not folder.exists():
            return f"{folder} is a symbolic link to {os.readlink(folder)}, which does not exist"
        if folder.exists() and not folder.is_dir():
            return f"{folder} is not a folder"
    return f"{path} is a folder" if path.is_dir() else ""


def check_space(path: Path, needed: int, what: str) -> None:
    """Raises ``UserError`` if fewer than ``needed`` bytes are free where ``path`` will be. Quotas are not seen."""
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            f"{what} need {format_bytes(needed)}, but only {format_bytes(free)} are free at {path}; free space, or "
            "move the project to a larger disk"
        )


def free_bytes(path: Path) -> int:
    """Returns the free bytes of the disk with ``path``, which need not exist."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def format_bytes(count: int) -> str:
    """Formats a number of bytes, for example as ``1.5 MB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"


def parse_json(text: str | bytes) -> Any:
    """Parses JSON.

    Raises:
        ValueError: it is not valid, or nested too deeply for Python's recursion limit.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``values``, which JSON can store, with their digest."""
    return {**values, DIGEST: _digest(values)}


def unsealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts ``sealed``. Values without a digest are returned unchanged.

    Raises:
        DamagedError: the values do not match their digest.
    """
    content = {name: value for name, value in values.items() if name != DIGEST}
    if DIGEST in values and values[DIGEST] != _digest(content):
        raise DamagedError("it does not match its digest: it was changed or damaged")
    return content


def _digest(values: Mapping[str, Any], before: str = "") -> str:
    return hashlib.sha256(f"{before}{json.dumps(values, sort_keys=True)}".encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that no later run reads, such as metrics, without a digest."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping with its digest to a JSON file, for ``read_json``."""
    write_json(path, sealed(values))


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """Returns the mapping in a JSON file that ``stage`` wrote, without its digest.

    Raises:
        UserError: the file is damaged.
    """
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping")
        return unsealed(values)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}); delete it and run `dvc repro {stage}` again"
        ) from error


def append_line(log: Path, values: Mapping[str, Any]) -> None:
    """Adds a line to a log. Its digest covers the lines before it, so that none of them can be lost unnoticed."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        before = _last_digest(log)
        values = json.loads(json.dumps(values))  # as it will be read: tuples become lists, keys become text
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**values, DIGEST: _digest(values, before)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise os_error(error, log) or error from error


def _last_digest(log: Path) -> str:
    if not log.exists() or not log.stat().st_size:
        return ""
    with log.open("rb") as file:
        file.seek(-min(log.stat().st_size, _TAIL), os.SEEK_END)
        return file.read().decode().rstrip()[-66:-2]  # "digest": "..."} is the end of a line


def read_lines(log: Path) -> list[dict[str, Any]]:
    """Returns the undamaged lines at the beginning of a log, one mapping per line, and removes the others.

    A run that was killed may have written half of its last line. If any other line is damaged or missing, this is
    printed on stderr, and the run continues after the line before it.
    """
    if log.is_dir():
        print(f"{log} is a folder instead of a log; starting from scratch", file=sys.stderr)
        shutil.rmtree(log)
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    found: list[dict[str, Any]] = []
    before = ""
    for line in lines:
        try:
            values = parse_json(line)
            digest = values.pop(DIGEST)
            if digest != _digest(values, before):
                raise DamagedError
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        found.append(values)
        before = digest
    if len(found) < len(lines):
        if len(found) < len(lines) - 1 or lines[-1].endswith(b"\n"):
            print(
                f"{log} is damaged or incomplete at line {len(found) + 1} of {len(lines)}; "
                + (f"continuing after line {len(found)}" if found else "starting from scratch"),
                file=sys.stderr,
            )
        write_bytes(log, *lines[: len(found)])
    return found
