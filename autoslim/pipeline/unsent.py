"""Keeps what MLflow has not received in journals of tracked runs, below ``checkpoints/mlflow`` in the repository.

Each tracked run has a journal while its process runs. If MLflow received everything, the journal is removed at the end.
Otherwise, or if the process was killed, it stays, and the next stage that reaches MLflow sends it (see ``tracking``).
A journal is a folder with a log of plain JSON and copies of the run's files. The owner holds a lock, which the system
releases when the process ends.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from autoslim.files import append_line, read_lines
from autoslim.pipeline.project import repository_root

_LOG = "events.jsonl"
_LOCK = "lock"


def unsent_folder() -> Path:
    return repository_root() / "checkpoints" / "mlflow"


class Journal:
    """The journal of one run. Its first event describes the run. This process holds its lock."""

    def __init__(self, folder: Path, lock: FileLock) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def start(cls, header: Mapping[str, Any]) -> "Journal":
        """Creates a journal.

        Raises:
            OSError, UserError: it cannot be written.
        """
        name = f"{time.time_ns()}-{os.getpid()}"
        hidden = unsent_folder() / f".{name}"  # no other process sees the journal before it is locked
        try:
            hidden.mkdir(parents=True)
            lock = FileLock(hidden / _LOCK)
            lock.acquire(timeout=0)
            append_line(hidden / _LOG, header)
            return cls(hidden.rename(hidden.with_name(name)), lock)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise

    @classmethod
    def open(cls, folder: Path) -> "Journal | None":
        """Opens a journal whose process has ended; returns None if there is none, or if a process uses it."""
        if not (folder / _LOG).is_file():
            return None
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            return None
        return cls(folder, lock)

    def append(self, event: Mapping[str, Any]) -> None:
        append_line(self.folder / _LOG, event)

    def events(self) -> list[dict[str, Any]]:
        """Returns the events, the first of which describes the run. A line that was not completed is removed."""
        return read_lines(self.folder / _LOG)

    def new_path(self) -> str:
        """Returns the path, relative to the journal's folder, of a new folder for copies of files."""
        number = 1 + sum(1 for _ in self.folder.glob("files-*"))  # not the time, which may jump back
        path = self.folder / f"files-{number}"
        path.mkdir()
        return path.name

    def close(self) -> None:
        """Releases the lock. The journal stays, and another process may send it."""
        self._lock.release()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # if it is empty


def unsent_journals() -> Iterator[Journal]:
    """Yields the journals of processes that have ended, oldest first. The caller closes or removes each."""
    for folder in sorted(unsent_folder().glob("[0-9]*")):
        if journal := Journal.open(folder):
            yield journal
