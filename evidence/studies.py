"""Cached runs of stages, and the rows that studies write about them.

A run is a folder whose name contains the stage and a digest of the parameters that the stage and the stages before it
read, according to ``dvc.yaml``. Studies of several budgets, methods or factors therefore run only what differs. Tools
of other projects that choose channels run like the stage ``allocate``.
"""

import copy
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from ruamel.yaml import YAML
from safetensors.torch import save

from autoslim.channels.groups import Channels
from autoslim.data.prepared import PreparedData
from autoslim.files import file_digest, run_key, write_json, write_sealed
from autoslim.pipeline.assembly import recipe, traced_network
from autoslim.pipeline.params import check_params
from autoslim.pipeline.project import RESOURCES
from autoslim.resources.latency.measure import processor
from autoslim.search.methods import need_supernet
from autoslim.training.device import RunContext
from autoslim.training.loop import write_rows
from autoslim.training.retrain import evaluate_retrained
from autoslim.user_code import file_of

ROOT = Path(__file__).parent.parent
HOST = RunContext(torch.device("cpu"), 1, 300.0)
Params = dict[str, Any]
Row = dict[str, Any]
Files = dict[str, bytes]
TOOLS = {  # name -> the parameters that it reads
    "torch_pruning": ("budget", "model", "resource", "supernet.grid", "supernet.width", "task"),
    "fastnas": ("budget", "data.seed", "model", "resource", "search.chunk", "search.images", "supernet.grid", "task"),
}
DEPENDS_ON = {
    "prepare": (),
    "resources": ("prepare",),
    "supernet": ("prepare",),  # resources only checks the budget, and writes needs.json, which run writes too
    "search": ("prepare", "resources", "supernet"),
    "allocate": ("prepare", "resources", "supernet", "search"),
    "retrain": ("prepare",),
    **dict.fromkeys(TOOLS, ("prepare", "resources")),
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
    """Runs stages and caches the results. Concurrent requests for the same run wait for it.

    Attributes:
        folder: where the runs are.
        inputs: files that parameters name, such as ``model.weights`` or the file of ``model.name``: their name -> where
            they are.
        tools_python: the interpreter for other tools, which may need an environment of their own.
    """

    folder: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    tools_python: Path = Path(sys.executable)
    stages: Params = field(default_factory=lambda: load_yaml(ROOT / "dvc.yaml")["stages"])

    def key(self, stage: str, params: Params, files: Mapping[str, bytes] | None = None) -> str:
        """Returns a digest of everything that the run depends on except the code."""
        definition = self.stages.get(stage, {})
        # A single budget affects only what chooses channels; several budgets are the objective of the search.
        uses_budget = stage == "allocate" or stage in TOOLS or isinstance(params["budget"], dict)
        names = TOOLS.get(stage) or definition.get("do", definition)["params"]
        own = {name: _value(params, name) for name in names if uses_budget or name != "budget"}
        if stage == "resources":
            del own["methods"]
        if stage in ("resources", "supernet") and not need_supernet(params["methods"]):
            own["supernet_is_needed"] = False  # all that these stages know of the methods
        digests = {name: hashlib.sha256(contents).hexdigest() for name, contents in (files or {}).items()}
        digests |= {
            name: file_digest(path)
            for name, path in self.inputs.items()
            if re.search(rf'"{re.escape(name)}[":]', json.dumps(own))
        }
        return run_key(
            stage=stage,
            own=own,
            follows=[self.key(earlier, params) for earlier in DEPENDS_ON[stage]],
            files=digests,
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
            for name, path in self.inputs.items():
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(path.resolve())
            with (folder / "params.yaml").open("w") as file:
                YAML(typ="safe").dump(params, file)
            with (folder / "dvc.yaml").open("w") as file:  # stages check that DVC tracks the files that they read
                model = params["model"]
                named = params["latency"]["table"], model["weights"], file_of(model["name"])
                tracked = [name for name in named if name]
                YAML(typ="safe").dump({"stages": {name: {"deps": tracked} for name in self.stages}}, file)
            if stage in ("supernet", "search") and not (needs := folder / RESOURCES / "needs.json").exists():
                write_sealed(needs, {"supernet": need_supernet(params["methods"])})
            commit = current_commit()
            command = [sys.executable, str(ROOT / f"stages/{stage}.py"), *arguments]
            if stage in TOOLS:
                command = [str(self.tools_python), str(ROOT / f"evidence/tools/{stage}_channels.py")]
            status, seconds = _run(command, folder)
            earlier_seconds = folder / "seconds.json"  # of runs that were stopped
            seconds += read(earlier_seconds)["cpu_seconds"] if earlier_seconds.exists() else 0.0
            write_json(earlier_seconds, {"cpu_seconds": seconds})
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


def current_commit() -> str:
    """Returns the short commit, with ``-dirty`` if tracked files other than results differ from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    differs = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!evidence/results")
    return f"{commit}-dirty" if differs else commit


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def read(path: Path) -> Params:
    values: Params = json.loads(path.read_text())
    return values


def start_files(channels: Channels, weights: bytes | None = None, start: str = "scratch") -> Files:
    """Returns the files that the stage ``retrain`` reads."""
    # The method is always named autoslim, so that equal networks share one run.
    allocation = {"method": "autoslim", "channels": channels, "costs": {"macs": 0}, "start": start}
    budgets = {"autoslim": {"budget": "", "resource": ""}}
    return {
        "outputs/channels/autoslim.json": json.dumps(allocation).encode(),
        "outputs/channels/budgets.json": json.dumps(budgets).encode(),
        "outputs/channels/autoslim.safetensors": save({}) if weights is None else weights,
    }


def retrained(cache: StageCache, params: Params, files: Files, seed: int) -> Row:
    """Retrains a network with one seed and returns top-1 on the search and test splits, and the processor seconds."""
    changed_params = changed(params, {"retrain.seeds": [seed]})
    folder = cache.run("retrain", changed_params, "autoslim", files=files)
    file = folder / "accuracy.json"
    if not file.exists():
        checked = check_params(changed_params, "params.yaml")
        data = PreparedData.open(folder / "data/prepared", relative_to=ROOT)
        network, graph = traced_network(checked.model, data.info)
        channels = read(folder / "outputs/channels/autoslim.json")["channels"]
        weights = folder / "outputs/retrain/autoslim/weights"
        found = evaluate_retrained(
            network, graph, channels, data, recipe(checked.retrain), HOST, seeds=[seed], folder=weights
        )
        search_top1 = read(folder / "outputs/retrain/autoslim/metrics.json")["search_top1"]["mean"]
        write_json(file, {"search_top1": round(search_top1, 5), "top1": round(found[seed]["top1"], 5)})
    values: Row = read(file) | read(folder / "done.json")
    return values


def collect(rows: Callable[..., Iterator[Row]], parts: Sequence[tuple[Any, ...]], to: Path, jobs: int) -> None:
    """Runs the parts of a study and writes all rows, in the order of the parts, after each training.

    If a part fails, the others are finished before its error is raised. If the process is stopped, the stages that
    run, which are stopped too, are waited for, and no others are started.
    """
    done: dict[int, list[Row]] = {number: [] for number in range(len(parts))}
    lock = threading.Lock()

    def run(number: int) -> None:
        torch.set_num_threads(1)
        for row in rows(*parts[number]):
            with lock:
                done[number].append(row)
                print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)
                _write(to, [each for group in done.values() for each in group])

    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(run, number) for number in range(len(parts))]
        try:
            while wait(runs, timeout=1).not_done:  # a signal that another thread received is handled at the next turn
                pass
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    for each in runs:
        each.result()


def _write(path: Path, rows: Sequence[Row]) -> None:
    write_rows(path, rows)
    details = {
        "command": " ".join(["python", *map(_without_folder, sys.argv)]),
        "processor": f"{processor()}, {os.cpu_count()} cores, one for a run",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(path.with_suffix(".json"), details)


def _without_folder(argument: str) -> str:
    """Returns the name of a file that is given by an absolute path, which means nothing elsewhere."""
    return Path(argument).name if Path(argument).is_absolute() else argument
