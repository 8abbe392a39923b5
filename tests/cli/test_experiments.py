"""``autoslim experiments`` and ``compare --all`` against the numbers of the reports that they read."""

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import error_from, printed, table
from ruamel.yaml import YAML
from tiny import tiny_params, write_params

from autoslim.cli import experiments
from autoslim.cli.experiments import stale_report
from autoslim.report.experiments_figure import Point, front


def report(budget: str, uniform: float, autoslim: float, macs: int) -> dict[str, Any]:
    values = {
        method: {"macs": macs, "params": macs // 10, "memory": macs * 2, "top1": top1, "top1_std": 0.005}
        for method, top1 in (("uniform", uniform), ("autoslim", autoslim))
    }
    gain = {"autoslim": {"top1": autoslim - uniform, "top1_low": -0.01, "top1_high": 0.02}}
    return {"budget": budget, "budget_macs": macs, **values, "gain": gain}


def state(rev: str, name: str | None, found: Any, **changes: Any) -> dict[str, Any]:
    """Returns an experiment as ``dvc exp show --json`` prints it."""
    data = {"params": {"params.yaml": {"data": tiny_params(changes)}}, "metrics": {}}
    if found is not None:
        data["metrics"] = {"outputs/report/metrics.json": {"data": found}}
    return {"rev": rev, "name": name, "data": data, "error": None}


SHOWN = [
    {**state("workspace", None, report("25%", 0.61, 0.625, 30_000), budget="25%"), "experiments": None},
    {
        **state("ab" * 20, "main", report("50%", 0.71, 0.73, 60_000), budget="50%"),
        "experiments": [
            {"revs": [state("c" * 40, "icy-oats", report("25%", 0.61, 0.625, 30_000), budget="25%")], "executor": None},
            {"revs": [state("d" * 40, "odd", report("50%", 0.71, 0.74, 60_000), budget="70%")], "executor": None},
            {"revs": [state("e" * 40, None, None, budget="15%")], "executor": {"state": "queued"}},
        ],
    },
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose experiments are those of ``SHOWN``."""
    (tmp_path / "dvc.yaml").touch()
    write_params(tmp_path, tiny_params({"budget": "25%"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    original = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if "exp" in command:
            return subprocess.CompletedProcess(command, 0, json.dumps(SHOWN), "")
        return original(command, **options)

    monkeypatch.setattr(experiments.subprocess, "run", run)
    return tmp_path


def test_experiments_fit_100_columns(project: Path) -> None:
    shown = printed("experiments")
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.startswith("top-1 on test (%) by method")
    rows = {row["experiment"]: row for row in table(shown, "experiment")}
    assert list(rows) == ["main", "icy-oats", "odd", "eeeeeeeee"]  # the workspace equals an experiment
    assert rows["icy-oats"] == {
        "experiment": "icy-oats",
        "budget": "25%",
        "MACs": "30K",
        "uniform": "61.00",
        "autoslim": "62.50",
        "gain": "+1.50",
    }
    assert rows["eeeeeeeee"] == {"experiment": "eeeeeeeee", "budget": "15%", "MACs": "queued"}  # its only other cell


def test_reports_of_other_parameters_are_not_drawn(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed experiment the workspace has its parameters, with the report of the one before."""
    shown = json.loads(json.dumps(SHOWN))
    shown[0] |= state("workspace", None, report("40%", 0.9, 0.9, 1), budget="50%", resource="params")
    monkeypatch.setattr("test_experiments.SHOWN", shown)
    drawn: list[dict[str, list[Point]]] = []
    monkeypatch.setattr(
        "autoslim.report.experiments_figure.experiments_figure", lambda path, series, *_: drawn.append(series)
    )
    lines = table(printed("compare", "--all", "--figure", str(tmp_path / "all.png")), "experiment")
    (series,) = drawn
    assert {point.cost for points in series.values() for point in points} == {60_000, 30_000}
    assert max(point.value for points in series.values() for point in points) == 0.73  # and not "odd" with 0.74
    assert {line["budget"] for line in lines} == {"50% MACs", "25% MACs", "70% MACs", "15% MACs", "50% parameters"}


def test_an_experiment_that_runs_in_the_workspace_is_shown_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = json.loads(json.dumps(SHOWN))
    half_done = shown[0] | state("workspace", "new-name", report("60%", 0.6, 0.6, 9), budget="60%")
    shown[0] = half_done | {"name": None}
    shown[1]["experiments"].append({"revs": [half_done], "executor": {"state": "running", "name": "workspace"}})
    monkeypatch.setattr("test_experiments.SHOWN", shown)
    rows = {row["experiment"]: row for row in table(printed("experiments"), "experiment")}
    assert list(rows) == ["main", "icy-oats", "odd", "eeeeeeeee", "new-name"]
    assert "running" in rows["new-name"].values()


def test_a_report_of_other_parameters_is_named(project: Path) -> None:
    assert "odd: its report is for the budget 50%, and its parameters have 70%; run `dvc repro`." in printed(
        "experiments"
    )


def test_experiments_as_json_have_all_values(project: Path) -> None:
    found = {row["name"]: row for row in json.loads(printed("experiments", "--json"))}
    assert found["main"]["methods"]["autoslim"]["top1"] == 0.73
    assert found["eeeeeeeee"]["state"] == "queued"
    assert found["icy-oats"]["gain"]["autoslim"]["top1_high"] == 0.02


def test_released_methods_are_left_out_if_the_table_is_too_wide(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = json.loads(json.dumps(SHOWN))
    names = [f"released/mobilenet_v2_{number}" for number in (207, 305, 505)]
    for name in names:
        wide[1]["data"]["metrics"]["outputs/report/metrics.json"]["data"][name] = {"macs": 1, "top1": 0.7}
    monkeypatch.setattr("test_experiments.SHOWN", wide)
    shown = printed("experiments")
    assert all(len(line) <= 100 for line in shown.splitlines() if not line.startswith("Not shown"))
    assert f"Not shown: {', '.join(names)}; see --json." in shown


def test_compare_all_shows_each_network(project: Path, tmp_path: Path) -> None:
    rows = table(printed("compare", "--all"), "experiment")
    assert [(row["experiment"], row["method"]) for row in rows][:3] == [
        ("main", "uniform"),
        ("main", "autoslim"),
        ("icy-oats", "uniform"),
    ]
    assert rows[1]["top-1 on test (%)"] == "73.00 ± 0.50"
    assert rows[1]["gain over uniform (points)"] == "+2.00"  # followed by the interval
    lines = list(csv.DictReader(io.StringIO(printed("compare", "--all", "--csv"))))
    assert {line["name"]: float(line["top1"]) for line in lines if line["method"] == "autoslim"} == {
        "main": 0.73,
        "icy-oats": 0.625,
        "odd": 0.74,
    }
    assert len(json.loads(printed("compare", "--all", "--json"))) == 4
    printed("compare", "--all", "--figure", str(tmp_path / "all.png"))
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--all", "--data", "cifar"], "--data cifar matches no experiment; there are digits"),
        (["--all", "--resource", "latency"], "--resource latency matches no experiment; there are macs"),
        (["--data", "digits"], "--data is for several experiments; add --all"),
        (["--json", "--csv"], "--json and --csv are both given; use only one of them"),
    ],
)
def test_wrong_options_of_compare(project: Path, arguments: list[str], message: str) -> None:
    assert error_from("compare", *arguments) == message


def test_an_experiment_of_mlflow_is_shown_unless_dvc_has_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"network": "mobilenet_v2", "data": "digits", "budget": "10%", "resource": "macs"}
    runs = [
        {"name": "a", "params": params, "report": report("10%", 0.4, 0.5, 9_000), "status": "finished"},
        {"name": "b", "params": params, "report": report("25%", 0.61, 0.625, 30_000), "status": "finished"},
        {"name": "c", "params": params, "report": None, "status": "scheduled"},
    ]
    monkeypatch.setattr("autoslim.pipeline.tracking.experiments.experiment_runs", lambda: runs)
    found = {row["name"]: row for row in json.loads(printed("compare", "--all", "--json"))}
    assert set(found) == {"main", "icy-oats", "odd", "eeeeeeeee", "a", "c"}
    assert (found["a"]["store"], found["c"]["state"]) == ("MLflow", "waiting")


def test_dvcs_error_is_reported_in_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "usage\nERROR: the repository is locked\n")
    monkeypatch.setattr(experiments.subprocess, "run", lambda *_, **__: done)
    assert error_from("experiments") == ("`dvc exp show` failed (ERROR: the repository is locked); run it to see why")


def test_a_stale_report_is_found_by_dvcs_lock_file(project: Path) -> None:
    assert stale_report() == ""  # without dvc.lock, nothing is known
    path = Path("outputs/report/metrics.json")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    outs = [{"path": str(path), "md5": "99914b932bd37a50b983c5e7c90ae93b"}]  # md5sum of {}
    values = {"budget": "25%", "methods": ["uniform", "autoslim"], "model": tiny_params()["model"]}
    lock = {"stages": {"report": {"params": {"params.yaml": values}, "outs": outs}}}
    lock["stages"]["retrain@default"] = {"params": {"params.yaml": {"retrain.epochs": 99}}}  # a former method
    YAML(typ="safe").dump(lock, Path("dvc.lock"))
    assert stale_report() == ""
    path.write_text("{ }")
    assert stale_report() == (
        "outputs/report/metrics.json is not the one that dvc.lock describes; run `dvc checkout` or `dvc repro`"
    )
    write_params(Path(), tiny_params({"budget": "30%"}))
    assert stale_report() == "its outputs were made before budget changed in params.yaml; run `dvc repro`"
    write_params(Path(), tiny_params({"budget": "30%", "methods": ["uniform"]}))
    assert stale_report() == (
        "its outputs were made before budget and 1 other parameter changed in params.yaml; run `dvc repro`"
    )


def test_the_front_has_the_points_that_no_other_one_dominates() -> None:
    points = [Point(3, 0.7), Point(1, 0.5), Point(2, 0.4), Point(3, 0.8), Point(4, 0.8)]
    assert front(points) == [Point(1, 0.5), Point(3, 0.8)]
    assert front(points, higher_is_better=False) == [Point(1, 0.5), Point(2, 0.4)]
    dominated = [a for a in points if any(b.cost <= a.cost and b.value >= a.value and b != a for b in points)]
    assert set(front(points)) == set(points) - set(dominated)


def test_completion_names_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the shell asks for it, after ``autoslim --install-completion``."""
    command = shutil.which("autoslim")
    assert command
    environment = {"_AUTOSLIM_COMPLETE": "complete_bash", "COMP_WORDS": "autoslim exper", "COMP_CWORD": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["experiments"]
