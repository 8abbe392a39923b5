"""The project: its root folder, the paths of its files, and the JSON files that its stages write."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoslim.errors import UserError
from autoslim.files import parse_json, unsealed
from autoslim.resources.budgets import UNITS
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
_NUMBER = int, float
_TOO_LARGE = 1e300  # for any cost; JSON can also have integers of any length, Infinity and NaN
_TRAJECTORY = {
    "resource": str,
    "limits": dict,
    "images": int,
    **dict.fromkeys(("default", "widest", "narrowest"), dict),
    "steps": list,
}
_CONFIGURATION = {"channels": dict, **dict.fromkeys(_COSTS, _NUMBER)}
_STEP = {
    **_CONFIGURATION,
    "step": int,
    "slimmed": list,
    **dict.fromkeys(("cost", "error"), _NUMBER),
    "options": dict,
    "taken": list,
}


def check_trajectory_format(trajectory: dict[str, Any]) -> None:
    """Checks that a trajectory has all entries that are read, with values of the right kind.

    Raises:
        UserError: an entry is missing or wrong, an earlier version of autoslim wrote the trajectory, or it is empty,
            because no method needed a search.
    """
    path = SEARCH / "trajectory.json"
    if not trajectory:
        raise UserError(
            "nothing was searched, because no method of params.yaml needs it; add autoslim to methods, and run "
            "`dvc repro`"
        )
    if trajectory.get("format") != 2:
        raise UserError(f"{path} was written by another version of autoslim; run `dvc repro search`")
    if problem := _trajectory_problem(trajectory):
        raise UserError(f"{path} is damaged ({problem}); delete it and run `dvc repro search` again")


def _trajectory_problem(trajectory: dict[str, Any]) -> str:
    """Returns what is wrong with a trajectory of the current format; "" if nothing is."""
    if problem := _problem(trajectory, _TRAJECTORY, "it"):
        return problem
    default = trajectory["default"]
    if problem := _problem(default, _CONFIGURATION, "default"):
        return problem
    resources = [resource for resource in UNITS if resource in default]
    if trajectory["resource"] not in resources:
        return f"it has resource {str(trajectory['resource'])[:40]}"
    if problem := _problem(trajectory["limits"], dict.fromkeys(trajectory["limits"], _NUMBER), "limits"):
        return problem
    if unknown := trajectory["limits"].keys() - resources:
        return f"it has a limit of {str(min(unknown))[:40]}"
    if not trajectory["steps"]:
        return "it has no steps"
    costs = dict.fromkeys(resources, _NUMBER)
    named = {which: (trajectory[which], _CONFIGURATION) for which in ("default", "widest", "narrowest")}
    try:
        scores = {named_scores(trajectory)[1]: _NUMBER}
    except (KeyError, TypeError, UserError):
        return f"it has scores {str(trajectory['scores'])[:40]}"
    named |= {f"step {number}": (step, _STEP | scores) for number, step in enumerate(trajectory["steps"])}
    for name, (values, kinds) in named.items():
        if problem := _problem(values, kinds | costs, name):
            return problem
        if values["channels"].keys() != default["channels"].keys():
            return f"{name} has other groups than default"
        if wrong := [group for group in values.get("slimmed", ()) if group not in list(default["channels"])]:
            return f"{name} slims {str(wrong[0])[:40]}"
    return ""


def _problem(values: Any, kinds: Mapping[str, Any], name: str) -> str:
    """Returns how ``values`` differ from ``kinds``, a mapping of required entries to their types; "" if they do not."""
    if not isinstance(values, dict):
        return f"{name} is not a mapping"
    for key, kind in kinds.items():
        if key not in values:
            return f"{name} lacks {key!r}"
        value = values[key]
        if not isinstance(value, kind) or (kind is _NUMBER and not abs(value) < _TOO_LARGE):
            return f"{name} has {key} {str(value)[:40]}"
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
        values = parse_json(path.read_text(encoding="utf-8"))
        return unsealed(values) if isinstance(values, dict) else values
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; {remedy}") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and {remedy}") from error
