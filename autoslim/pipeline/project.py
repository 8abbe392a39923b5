"""The project: its root folder, the paths of its files, and the JSON files that its stages write."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoslim.errors import UserError
from autoslim.files import unsealed
from autoslim.tasks.measure import named_scores

STAGES = ("prepare", "resources", "supernet", "search", "allocate", "retrain", "report")

LOCK = Path("autoslim.lock")  # of a project that `autoslim init` made
PREPARED = Path("data/prepared")
RESOURCES = Path("outputs/resources")
SUPERNET = Path("outputs/supernet")
SEARCH = Path("outputs/search")
CHANNELS = Path("outputs/channels")
RETRAIN = Path("outputs/retrain")
REPORT = Path("outputs/report")
TRAINED = "trained.safetensors"  # in SUPERNET: the default network with model.weights; without them, no tensors


_COSTS = "macs", "params"
_TRAJECTORY = {
    "resource": str,
    "limits": dict,
    "images": int,
    **dict.fromkeys(("default", "widest", "narrowest"), dict),
    "steps": list,
}
_CONFIGURATION = {"channels": dict, **dict.fromkeys(_COSTS, (int, float))}
_STEP = {
    **_CONFIGURATION,
    "step": int,
    "slimmed": list,
    **dict.fromkeys(("cost", "error"), (int, float)),
    "options": dict,
    "taken": list,
}


def check_trajectory_format(trajectory: dict[str, Any]) -> None:
    """Checks that a trajectory has all entries that are read, with values of the right kind.

    Raises:
        UserError: an entry is missing or wrong, or an earlier version of autoslim wrote the trajectory.
    """
    path = SEARCH / "trajectory.json"
    if trajectory.get("format") != 2:
        raise UserError(f"{path} was written by another version of autoslim; run `dvc repro search`")
    problem = _problem(trajectory, _TRAJECTORY, "it")
    kinds = {**_STEP, named_scores(trajectory)[1]: (int, float)}
    for which in ("default", "widest", "narrowest"):
        problem = problem or _problem(trajectory[which], _CONFIGURATION, which)
    for number, step in enumerate(() if problem else trajectory["steps"]):
        problem = problem or _problem(step, kinds, f"step {number}")
    if not problem and not trajectory["steps"]:
        problem = "it has no steps"
    if problem:
        raise UserError(f"{path} is damaged ({problem}); delete it and run `dvc repro search` again")


def _problem(values: Any, kinds: Mapping[str, Any], name: str) -> str:
    """Returns how ``values`` differ from ``kinds``, a mapping of required entries to their types; "" if they do not."""
    if not isinstance(values, dict):
        return f"{name} is not a mapping"
    for key, kind in kinds.items():
        if key not in values:
            return f"{name} lacks {key!r}"
        if not isinstance(values[key], kind):
            return f"{name} has {key} {str(values[key])[:40]}"
    wrong = [count for count in values.get("channels", {}).values() if type(count) is not int]
    return f"{name} has {wrong[0]!r} channels" if wrong else ""


def repository_root() -> Path:
    """Returns ``DVC_ROOT`` if it is set, else the nearest parent folder with ``dvc.yaml``, else the working directory.

    DVC runs queued and temporary experiments in a copy of the repository, which it deletes afterwards, and sets
    ``DVC_ROOT`` to the original. Files that outlive an experiment (raw data, checkpoints, MLflow's store) belong there.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    return find_project() or Path.cwd()


def enter_project() -> Path:
    """Changes the working directory to the project's root, and returns it.

    Raises:
        UserError: The working directory is not in a project.
    """
    root = find_project()
    if root is None:
        raise UserError(
            f"{Path.cwd()} is not in an autoslim project (there is no dvc.yaml here or in a parent folder); "
            "change into your project, or make one with `autoslim init`"
        )
    os.chdir(root)
    return root


def enter_project_with(file: Path) -> tuple[Path, Path]:
    """Changes the working directory to the project's root; returns the root and the path of ``file``.

    A relative path is looked up in the previous working directory, then in the root. The returned path is relative to
    the root if the file is inside it.

    Raises:
        UserError: The working directory is not in a project.
    """
    absolute = file.resolve()
    root = enter_project()
    path = absolute if absolute.is_file() else root / file
    return root, path.relative_to(root) if path.is_relative_to(root) else path


def find_project() -> Path | None:
    """Returns the nearest folder with ``dvc.yaml``: the working directory or one of its parents."""
    cwd = Path.cwd()
    return next((folder for folder in (cwd, *cwd.parents) if (folder / "dvc.yaml").is_file()), None)


def read_output(path: Path, stage: str) -> Any:
    """Returns the contents of a JSON file that ``stage`` writes.

    Raises:
        UserError: The file is missing or damaged.
    """
    remedy = f"run `dvc repro {stage}`"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return unsealed(values) if isinstance(values, dict) else values
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; {remedy}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and {remedy}") from error
