"""Long forms of the tests of faults, on whole runs: only with ``pytest --long``. With ``-s`` they print their counts.

Processes are killed at random moments, which differ in each run: a failure prints them.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import runs
from small_data import prepared_digits, recipe, run_context, search_settings, small_network
from tiny import project_copy, run

from autoslim.channels.grid import GridSpec
from autoslim.channels.resize import resize
from autoslim.files import append_line
from autoslim.pipeline.project import STAGES
from autoslim.resources.costs import Costs, Objective
from autoslim.search.search import search
from autoslim.supernet.sandwich import Sandwich
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import train_supernet
from autoslim.training.checkpoints import Checkpoints

pytestmark = pytest.mark.long

COMMANDS = [
    *([f"stages/{stage}.py"] for stage in STAGES[:5]),
    *(["stages/retrain.py", method] for method in ("uniform", "autoslim")),
    ["stages/report.py"],
]
# Checkpoints are written as often as possible, so that kills hit them too.
CHANGES = {"runtime": {"checkpoint_minutes": 0}, "supernet": {"epochs": 6}, "retrain": {"epochs": 4}}


def started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(command: list[str], folder: Path) -> str:
    process = started(command, folder)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output
    return output


def digests(folder: Path) -> dict[str, str]:
    """Returns the digests of all results, except those with measured times."""
    files = [file for name in ("data/prepared", "outputs") for file in (folder / name).rglob("*") if file.is_file()]
    timed = folder / "outputs/search/metrics.json"  # it has the seconds of the search; trajectory.json has the rest
    results = [file for file in files if "report" not in file.parts and file != timed]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in results}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Returns a project in which every stage has run once, and the seconds that each took."""
    folder, seconds = project_copy(tmp_path_factory.mktemp("uninterrupted"), CHANGES), []
    for command in COMMANDS:
        start = time.monotonic()
        finished(command, folder)
        seconds.append(time.monotonic() - start)
    return folder, seconds


def finished_runs(folder: Path, stage: str) -> int:
    """Returns the number of MLflow runs of a stage that are finished; 0 before the store exists."""
    if not (folder / "mlflow.db").exists():
        return 0
    return sum(tags["stage"] == stage and tags["status"] == "FINISHED" for tags in runs(folder))


@pytest.mark.parametrize("number", range(6))
def test_stages_killed_at_random_moments_end_with_the_same_results(
    number: int, uninterrupted: tuple[Path, list[float]], tmp_path: Path
) -> None:
    reference, seconds = uninterrupted
    folder = project_copy(tmp_path / "killed", CHANGES)
    draw, kills, moments = random.Random(), 0, []
    complete = dict.fromkeys(STAGES, 0)  # runs that ended before the kill: their stage starts anew
    for command, usual in zip(COMMANDS, seconds, strict=True):
        for _ in range(2):
            process = started(command, folder)
            moments.append((command[-1], round(draw.uniform(0, usual), 2)))
            try:
                process.communicate(timeout=moments[-1][1])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
            stage = Path(command[0]).stem
            if not list((folder / "checkpoints").glob(f"{stage}-*/")):
                complete[stage] = finished_runs(folder, stage) - (command[-1] == "autoslim")
        finished(command, folder)
    print(f"\nround {number}: {kills} kills in {len(COMMANDS)} stages, at {moments}")
    assert digests(folder) == digests(reference), moments
    assert not list((folder / "checkpoints").glob("*/")), moments
    assert "RUNNING" not in {tags["status"] for tags in runs(folder)}, moments
    expected = {"supernet": 1, "search": 1, "retrain": 2}  # runs that were continued, not started again
    count = {stage: finished_runs(folder, stage) for stage in expected}
    assert count == {stage: number + complete[stage] for stage, number in expected.items()}, moments


class Usage:
    """Memory and open files of this process, sampled now and then."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, float, int]] = []  # (step, MB, open files)

    def sample(self, step: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        self.samples.append((step, pages * resource.getpagesize() / 1e6, files))

    def check(self, name: str) -> None:
        """Checks that the last quarter does not use more than the quarter before."""
        length = len(self.samples)
        third, last = self.samples[length // 2 : 3 * length // 4], self.samples[3 * length // 4 :]
        print(f"\n{name}: {self.samples[-1][0]} steps; (step, MB, open files):", self.samples[:: length // 8])
        assert max(mb for _, mb, _ in last) < max(mb for _, mb, _ in third) * 1.02 + 5
        assert max(files for *_, files in last) <= max(files for *_, files in third)


def test_memory_and_open_files_do_not_grow_while_a_supernet_trains(tmp_path: Path) -> None:
    network, graph = small_network()
    usage, per_epoch = Usage(), 8
    train_supernet(
        network,
        graph,
        prepared_digits(tmp_path / "prepared"),
        GridSpec(width=1.5, narrowest=0.25, steps=4, divisor=2),
        recipe(epochs=260),
        run_context(0),
        sandwich=Sandwich(random_widths=2),
        name="test",
        folder=tmp_path / "supernet",
        checkpoints=Checkpoints(tmp_path / "checkpoints", "run", "key"),
        observe=lambda row: usage.sample(int(row["epoch"]) * per_epoch),
    )
    assert usage.samples[-1][0] >= 2000
    usage.check("supernet")


def test_memory_and_open_files_do_not_grow_while_a_search_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, graph = small_network()
    grid = graph.grid(GridSpec(width=6.0, narrowest=0.01, steps=400, divisor=1))
    usage = Usage()

    def observed(log: Path, values: dict[str, Any]) -> None:
        usage.sample(len(usage.samples))
        append_line(log, values)

    monkeypatch.setattr("autoslim.search.search.append_line", observed)
    search(
        Supernet(resize(network, graph, grid.widest), graph),
        grid,
        prepared_digits(tmp_path / "prepared"),
        run_context(),
        objective=Objective(Costs(graph), "macs"),
        settings=search_settings(stop=0.01, chunk=32, images=32),
        seed=0,
        folder=tmp_path / "search",
        checkpoints=Checkpoints(tmp_path / "checkpoints", "run", "key"),
    )
    assert usage.samples[-1][0] >= 300
    usage.check("search")


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a project after ``dvc repro``."""
    folder = project_copy(tmp_path_factory.mktemp("repeated"))
    run(["dvc", "repro"], folder)
    return folder


def test_two_experiments_of_a_queue_run_at_once(repeated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(repeated, tmp_path / "project", symlinks=True)
    before = len(runs(folder))
    budgets = ["60%", "70%", "80%"]
    run(["dvc", "exp", "run", "--queue", "-S", f"budget={','.join(budgets)}"], folder)
    run(["dvc", "queue", "start", "-j", "2"], folder)
    end = time.monotonic() + 1800
    while any(word in (status := run(["dvc", "queue", "status"], folder)) for word in ("Queued", "Running")):
        assert time.monotonic() < end, status
        time.sleep(5)
    assert status.count("Success") == len(budgets), status
    shown = json.loads(run(["dvc", "exp", "show", "--json"], folder, DVC_NO_ANALYTICS="1").splitlines()[-1])
    text = json.dumps(shown)
    assert all(f'"budget": "{budget}"' in text for budget in budgets)
    new = runs(folder)[before:]
    assert {tags["status"] for tags in new} == {"FINISHED"}
    assert {tags["budget"] for tags in new if "budget" in tags} == set(budgets)
    print(f"\nqueue: {len(budgets)} experiments by 2 workers, {len(new)} MLflow runs")


def test_two_repro_in_one_clone_do_not_disturb_each_other(repeated: Path, tmp_path: Path) -> None:
    """DVC lets one of them wait, or refuses it. The results are those of a single one."""
    folder = project_copy(tmp_path / "project")
    processes = [started(["-m", "dvc", "repro"], folder) for _ in range(2)]
    outputs = [process.communicate(timeout=1800)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes, outputs
    assert all(code == 0 or "lock" in output.lower() for code, output in zip(codes, outputs, strict=True)), outputs
    assert "Running stage" not in run(["dvc", "repro"], folder)
    assert digests(folder) == digests(repeated)
    assert {tags["status"] for tags in runs(folder)} == {"FINISHED"}
    print(f"\ntwo repro: exit codes {codes}")
