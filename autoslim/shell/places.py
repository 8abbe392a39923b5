"""Where things lie: what DVC lists, relative to the working directory, and what outlives an experiment, in the root."""

import os
from pathlib import Path

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
