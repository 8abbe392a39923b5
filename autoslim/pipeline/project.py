"""The project: its root, the paths of its files, and what its stages wrote."""

import json
import os
from pathlib import Path
from typing import Any

from autoslim.errors import UserError

STAGES = ("prepare", "resources", "supernet", "search", "allocate", "retrain", "report")

PREPARED = Path("data/prepared")
RESOURCES = Path("outputs/resources")
SUPERNET = Path("outputs/supernet")
SEARCH = Path("outputs/search")
CHANNELS = Path("outputs/channels")
RETRAIN = Path("outputs/retrain")
REPORT = Path("outputs/report")


def repository_root() -> Path:
    """``DVC_ROOT`` where DVC runs the process, else the nearest folder upwards that holds ``dvc.yaml``, else this one.

    DVC runs queued and temporary experiments in a copy of the repository that it deletes, and points ``DVC_ROOT`` at
    the real one: what outlives an experiment (raw data, checkpoints, MLflow's store) belongs there.
    """
    if root := os.environ.get("DVC_ROOT"):
        return Path(root)
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").exists()), here)


def enter_project() -> Path:
    """Makes the project's folder, this one or the nearest above that holds ``dvc.yaml``, the working directory.

    Raises:
        UserError: there is none.
    """
    here = Path.cwd()
    root = find_project()
    if root is None:
        raise UserError(f"{here} is in no autoslim project (no dvc.yaml here or above); change into your clone of it")
    os.chdir(root)
    return root


def enter_project_with(file: Path) -> tuple[Path, Path]:
    """Enters the project; its folder, and ``file`` as named from where the command was given, or from that folder.

    Raises:
        UserError: there is none.
    """
    given = file.resolve()
    root = enter_project()
    path = given if given.is_file() else root / file
    return root, path.relative_to(root) if path.is_relative_to(root) else path


def find_project() -> Path | None:
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), None)


def read_output(path: Path, stage: str) -> Any:
    """The JSON file that ``stage`` wrote.

    Raises:
        UserError: it is missing or damaged.
    """
    remedy = f"run `dvc repro {stage}`"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it and {remedy}") from error
