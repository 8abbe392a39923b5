"""Pieces of studies: stages run with parameters of their own, each piece once for all studies that ask for it.

A piece is a folder, named by its stage and a digest of the parameters that ``dvc.yaml`` says the stage reads, its own
and those of the pieces that it follows. What is done is kept, whatever the study that asked first: of several budgets,
methods, or factors, only what differs is run.
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

from autoslim.training.checkpoints import run_key, write_json

ROOT = Path(__file__).parent.parent
Params = dict[str, Any]
FOLLOWS = {
    "prepare": (),
    "resources": ("prepare",),
    "supernet": ("prepare", "resources"),
    "search": ("prepare", "resources", "supernet"),
    "allocate": ("prepare", "resources", "supernet", "search"),
    "retrain": ("prepare",),
}
PLACES = {
    "prepare": "data/prepared",
    "resources": "outputs/resources",
    "supernet": "outputs/supernet",
    "search": "outputs/search",
}


def load_yaml(path: Path) -> Params:
    values: Params = YAML(typ="safe").load(path.read_text())
    return values


def changed(params: Params, changes: Mapping[str, Any]) -> Params:
    """A copy with values replaced; ``supernet.epochs`` names a value as ``dvc exp run -S`` does."""
    new = copy.deepcopy(params)
    for name, value in changes.items():
        *sections, last = name.split(".")
        place = new
        for section in sections:
            place = place[section]
        if last not in place:
            raise SystemExit(f"there is no parameter {name}")
        place[last] = value
    return new


def screening(factors: Mapping[str, Sequence[Any]]) -> list[Params]:
    """Twelve combinations of two values of each factor, by which the effect of each is told from those of the others.

    Each factor has either value six times, and each pair of factors each pair of values three times (Plackett & Burman,
    1946). So the means of the two halves differ by the factor's own effect, measured on all runs; a third of what any
    two other factors do only together is in it too, or less that.

    Args:
        factors: name -> (one value, the other); at most eleven.
    """
    first = [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]
    levels = [[first[(column - run) % 11] for column in range(len(factors))] for run in range(11)]
    levels.append([0] * len(factors))
    return [{name: factors[name][level] for name, level in zip(factors, run, strict=True)} for run in levels]


@dataclass
class Pieces:
    """Runs and keeps pieces in ``folder``; several studies may ask at once, and wait for the same one."""

    folder: Path
    stages: Params = field(default_factory=lambda: load_yaml(ROOT / "dvc.yaml")["stages"])

    def key(self, stage: str, params: Params, files: Mapping[str, bytes] | None = None) -> str:
        """Of everything that the piece depends on but the code."""
        described = self.stages[stage]
        # Before the channels are chosen one budget is only looked at, several are what the search lowers.
        heeded = stage == "allocate" or isinstance(params["budget"], dict)
        names = [name for name in described.get("do", described)["params"] if heeded or name != "budget"]
        return run_key(
            stage=stage,
            own={name: _value(params, name) for name in names},
            follows=[self.key(earlier, params) for earlier in FOLLOWS[stage]],
            files={name: hashlib.sha256(contents).hexdigest() for name, contents in (files or {}).items()},
        )

    def run(self, stage: str, params: Params, *arguments: str, files: Mapping[str, bytes] | None = None) -> Path:
        """The folder of the piece, run now where it is not done yet.

        Args:
            arguments: of the stage's command.
            files: path -> contents, of what the stage reads beside the pieces that it follows.
        """
        key = self.key(stage, params, files)
        folder = self.folder / f"{stage}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{key}.lock"):
            if (folder / "done.json").exists():
                return folder
            for earlier in FOLLOWS[stage]:
                place = folder / PLACES[earlier]
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    there = (self.run(earlier, params) / PLACES[earlier]).resolve()
                    place.symlink_to(os.path.relpath(there, place.parent.resolve()))
            for name, contents in (files or {}).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(contents)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "params.yaml").open("w") as file:
                YAML(typ="safe").dump(params, file)
            commit = _commit()
            status, seconds = _run([sys.executable, str(ROOT / f"stages/{stage}.py"), *arguments], folder)
            if status:
                raise SystemExit(f"{stage} failed in {folder}; see its log.txt")
            write_json(folder / "done.json", {"commit": commit, "cpu_seconds": round(seconds)})
        return folder

    def done(self, stage: str, params: Params) -> Params | None:
        """The commit that made the piece, and its processor seconds; None where it is not done."""
        path = self.folder / f"{stage}-{self.key(stage, params)}" / "done.json"
        return read(path) if path.exists() else None


def _run(command: list[str], folder: Path) -> tuple[int, float]:
    """Runs a command, whose words go to a log; its exit status and processor seconds, without those of runs before."""
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
    """Short, and ``-dirty`` where files differ from it; the results themselves do not count."""
    commit = _git("rev-parse", "--short", "HEAD")
    differs = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!evidence/results")
    return f"{commit}-dirty" if differs else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def read(path: Path) -> Params:
    values: Params = json.loads(path.read_text())
    return values
