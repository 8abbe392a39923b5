"""How long the stages took, for the report.

The times are kept beside the checkpoints, not in DVC's outputs, which are the same in every run. A time belongs to a
result, which the digest of one of its files identifies.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from autoslim.errors import UserError
from autoslim.files import parse_json, sha256, write_json
from autoslim.pipeline.project import CHANNELS, PREPARED, RESOURCES, RETRAIN, SEARCH, SUPERNET, repository_root

_KEPT = 500  # times
_RESULTS = {
    "prepare": PREPARED / "data.json",
    "resources": RESOURCES / "objective.json",
    "supernet": SUPERNET / "curves.csv",
    "search": SEARCH / "trajectory.json",
    "allocate": CHANNELS / "budgets.json",
}


def timed(run: Callable[..., None], *arguments: str) -> None:
    """Runs a stage and records how long it took. A time that cannot be recorded is left out without a message.

    Args:
        run: the function ``run`` of the stage's module.
        arguments: of this function.
    """
    before, started = _interrupted(), time.monotonic()
    run(*arguments)
    if os.environ.get("RANK", "0") != "0":
        return
    seconds = time.monotonic() - started
    name = "@".join([run.__module__.rpartition(".")[2], *arguments])
    with suppress(OSError, UserError, ValueError):
        if (key := _key(name)) is not None:
            entry = {"seconds": round(seconds, 1), "continued": bool(before - _interrupted())}
            times = {**_read(), key: entry}
            write_json(_file(), dict(list(times.items())[-_KEPT:]))


def recorded_time(name: str) -> tuple[float, bool] | None:
    """Returns the seconds that the current result of a stage took, and whether an interrupted run was continued.

    The seconds of a continued run are those since it was continued. Returns None if no time is known.

    Args:
        name: the stage's name in ``dvc.yaml``, such as ``search`` or ``retrain@uniform``.
    """
    try:
        entry = _read()[_key(name) or ""]
        return float(entry["seconds"]), bool(entry["continued"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _key(name: str) -> str | None:
    stage, _, method = name.partition("@")
    path = RETRAIN / method / "curves.csv" if stage == "retrain" else _RESULTS.get(stage)
    return f"{name} {sha256(path)[:16]}" if path is not None and path.exists() else None


def _file() -> Path:
    return repository_root() / "checkpoints" / "times.json"


def _read() -> dict[str, dict[str, float | bool]]:
    """Returns the recorded times, oldest first; {} if the file is missing or damaged."""
    try:
        values = parse_json(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _interrupted() -> set[str]:
    """Returns the folders of the checkpoints of runs that have not finished. A run deletes its own when it ends."""
    return {path.name for path in (repository_root() / "checkpoints").glob("*/") if any(path.glob("*"))}
