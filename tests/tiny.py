"""A copy of this project with parameters for a pipeline that runs in seconds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from paths import ROOT
from ruamel.yaml import YAML

TINY: dict[str, Any] = {
    "budget": "50%",
    "resource": "macs",
    "methods": ["uniform", "autoslim"],
    "data": {"source": "digits", "train_images": 200, "test_images": 100, "search_images": 64},
    "model": {
        "name": "autoslim.models.architectures:mobilenet_v2",
        "kwargs": {"in_channels": 1, "stem": 8, "stages": [[1, 8, 1, 2], [2, 8, 2, 2]], "tail": 16},
    },
    "supernet": {"epochs": 2, "batch_size": 64, "random_widths": 1, "grid": {"divisor": 1, "narrowest": 0.15}},
    "search": {"chunk": 32, "stop": 0.3, "score": "cross_entropy", "per_cost": True},
    "retrain": {"epochs": 2, "seeds": [0, 1]},
}


def merged(values: Any, changes: Any) -> Any:
    """Returns ``values`` with ``changes`` merged at any depth. model.kwargs is replaced as a whole."""
    if not isinstance(changes, dict) or not isinstance(values, dict):
        return changes
    return values | {
        name: value if name == "kwargs" else merged(values.get(name, {}), value) for name, value in changes.items()
    }


def tiny_params(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    params: dict[str, Any] = merged(merged(values, TINY), changes or {})
    return params


def write_params(folder: Path, values: dict[str, Any]) -> None:
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)


def project_copy(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Copies the files that git tracks or would add to a new git repository, with tiny parameters."""
    listed = run(["git", "ls-files", "-co", "--exclude-standard", "-z"], ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "dvc.lock").unlink(missing_ok=True)
    write_params(folder, tiny_params(changes))
    run(["git", "init", "-q"], folder)
    run(["git", "add", "-A"], folder)
    run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start"], folder)
    return folder


def run(command: list[str], cwd: Path, *, check: bool = True, **environment: str) -> str:
    """Returns stdout and stderr of a command. The environment of this Python comes first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    names = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org"}
    names |= {"GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@example.org"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=inherited | names | {"PATH": path, "PYTHONPATH": str(cwd), "COLUMNS": "200"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout
