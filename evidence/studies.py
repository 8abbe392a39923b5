"""Cached runs of stages, shared by all studies.

A run is a folder whose name contains the stage and a digest of the parameters that the stage and the stages before it
read, according to ``dvc.yaml``. Studies of several budgets, methods or factors therefore run only what differs.
"""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from ruamel.yaml import YAML

from autoslim.files import run_key, write_json, write_sealed
from autoslim.pipeline.project import RESOURCES
from autoslim.search.methods import need_supernet

ROOT = Path(__file__).parent.parent
Params = dict[str, Any]
DEPENDS_ON = {
    "prepare": (),
    "resources": ("prepare",),
    "supernet": ("prepare",),  # resources only checks the budget, and writes needs.json, which run writes too
    "search": ("prepare", "resources", "supernet"),
    "allocate": ("prepare", "resources", "supernet", "search"),
    "retrain": ("prepare",),
}
OUTPUTS = {
    "prepare": "data/prepared",
    "resources": "outputs/resources",
    "supernet": "outputs/supernet",
    "search": "outputs/search",
}


def load_yaml(path: Path) -> Params:
    values: Params = YAML(typ="safe").load(path.read_text())
    return values


def changed(params: Params, changes: Mapping[str, Any]) -> Params:
    """Returns a copy of ``params`` with values replaced. Names have the form ``supernet.epochs``."""
    copied = copy.deepcopy(params)
    for name, value in changes.items():
        *sections, last = name.split(".")
        section = copied
        for part in sections:
            section = section[part]
        if last not in section:
            raise SystemExit(f"there is no parameter {name}")
        section[last] = value
    return copied


def screening(factors: Mapping[str, Sequence[Any]]) -> list[Params]:
    """Returns twelve combinations of two values per factor, from which the effect of each factor can be estimated.

    In this design (Plackett & Burman, 1946), each factor has either value six times, and each pair of factors has each
    pair of values three times. The effect of a factor is the difference between the means of the two halves, so all
    runs contribute to it. It is confounded with plus or minus a third of the interaction of any two other factors.

    Args:
        factors: name -> (first value, second value); at most eleven factors.
    """
    first = [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]
    levels = [[first[(column - run) % 11] for column in range(len(factors))] for run in range(11)]
    levels.append([0] * len(factors))
    return [{name: factors[name][level] for name, level in zip(factors, run, strict=True)} for run in levels]


@dataclass
class StageCache:
    """Runs stages and caches the results in ``folder``. Concurrent requests for the same run wait for it."""

    folder: Path
    stages: Params = field(default_factory=lambda: load_yaml(ROOT / "dvc.yaml")["stages"])

    def key(self, stage: str, params: Params, files: Mapping[str, bytes] | None = None) -> str:
        """Returns a digest of everything that the run depends on except the code."""
        definition = self.stages[stage]
        # A single budget affects only the stage allocate; several budgets are the objective of the search.
        uses_budget = stage == "allocate" or isinstance(params["budget"], dict)
        names = [name for name in definition.get("do", definition)["params"] if uses_budget or name != "budget"]
        own = {name: _value(params, name) for name in names}
        if stage == "resources":
            del own["methods"]
        if stage in ("resources", "supernet") and not need_supernet(params["methods"]):
            own["supernet_is_needed"] = False  # all that these stages know of the methods
        return run_key(
            stage=stage,
            own=own,
            follows=[self.key(earlier, params) for earlier in DEPENDS_ON[stage]],
            files={name: hashlib.sha256(contents).hexdigest() for name, contents in (files or {}).items()},
        )

    def run(self, stage: str, params: Params, *arguments: str, files: Mapping[str, bytes] | None = None) -> Path:
        """Returns the folder of a run, after running the stage if it is not done.

        Args:
            arguments: arguments of the stage's command.
            files: path -> contents of further files that the stage reads.
        """
        key = self.key(stage, params, files)
        folder = self.folder / f"{stage}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{key}.lock"):
            if (folder / "done.json").exists():
                return folder
            for earlier in DEPENDS_ON[stage]:
                link = folder / OUTPUTS[earlier]
                if not link.exists():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    target = (self.run(earlier, params) / OUTPUTS[earlier]).resolve()
                    link.symlink_to(os.path.relpath(target, link.parent.resolve()))
            for name, contents in (files or {}).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(contents)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "params.yaml").open("w") as file:
                YAML(typ="safe").dump(params, file)
            with (folder / "dvc.yaml").open("w") as file:  # the stage resources checks that DVC tracks the table
                YAML(typ="safe").dump({"stages": {"resources": {"deps": [params["latency"]["table"]]}}}, file)
            if stage in ("supernet", "search") and not (needs := folder / RESOURCES / "needs.json").exists():
                write_sealed(needs, {"supernet": need_supernet(params["methods"])})
            commit = _commit()
            status, seconds = _run([sys.executable, str(ROOT / f"stages/{stage}.py"), *arguments], folder)
            if status:
                raise SystemExit(f"{stage} failed in {folder}; see its log.txt")
            write_json(folder / "done.json", {"commit": commit, "cpu_seconds": round(seconds)})
        return folder

    def done(self, stage: str, params: Params) -> Params | None:
        """Returns the commit and the processor seconds of a run, or None if it is not done."""
        path = self.folder / f"{stage}-{self.key(stage, params)}" / "done.json"
        return read(path) if path.exists() else None


def _run(command: list[str], folder: Path) -> tuple[int, float]:
    """Runs a command with its output in log.txt, and returns its exit status and processor seconds."""
    with (folder / "log.txt").open("a") as log:
        environment = os.environ | {"DVC_ROOT": str(ROOT)}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime


def _value(params: Params, name: str) -> Any:
    value: Any = params
    for part in name.split("."):
        value = value[part]
    return value


def _commit() -> str:
    """Returns the short commit, with ``-dirty`` if tracked files other than results differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    differs = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!evidence/results")
    return f"{commit}-dirty" if differs else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def read(path: Path) -> Params:
    values: Params = json.loads(path.read_text())
    return values
