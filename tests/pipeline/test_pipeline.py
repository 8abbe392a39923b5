"""The pipeline as users run it: DVC over the real stages, in a copy of the project with tiny parameters."""

import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import merged, project_copy, run, write_params

from autoslim.pipeline.params import read_yaml

RETRAIN_AND_REPORT = {"retrain@autoslim", "retrain@uniform", "report"}
ALLOCATE_AND_AFTER = RETRAIN_AND_REPORT | {"allocate"}
SEARCH_AND_AFTER = ALLOCATE_AND_AFTER | {"search"}
SUPERNET_AND_AFTER = SEARCH_AND_AFTER | {"supernet"}
ALL = SUPERNET_AND_AFTER | {"prepare", "resources"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the project after one ``dvc repro``."""
    folder = project_copy(tmp_path_factory.mktemp("project"))
    output = run(["dvc", "repro"], folder)
    (folder / "repro.log").write_text(output)
    return folder


def stages_run(output: str) -> set[str]:
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")}


def test_first_repro_runs_every_stage_and_ends_with_the_table(project: Path) -> None:
    output = (project / "repro.log").read_text()
    assert stages_run(output) == ALL
    for word in ("uniform", "autoslim", "±", "outputs/report", "mlflow ui"):
        assert word in output


def test_second_repro_runs_nothing(project: Path) -> None:
    """This holds although Python has written bytecode since then."""
    run([sys.executable, "-m", "compileall", "-q", "autoslim"], project)
    assert stages_run(run(["dvc", "repro"], project)) == set()


def test_contents_of_outputs(project: Path) -> None:
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    macs = [step["macs"] for step in trajectory["steps"]]
    assert macs == sorted(macs, reverse=True)
    assert len(set(macs)) == len(macs)
    limit = trajectory["default"]["macs"] * 0.5
    metrics = json.loads((project / "outputs/report/metrics.json").read_text())
    for method in ("uniform", "autoslim"):
        chosen = json.loads((project / f"outputs/channels/{method}.json").read_text())
        assert chosen["costs"]["macs"] <= limit
        assert metrics[method]["macs"] == chosen["costs"]["macs"]
        assert {p.name for p in (project / f"outputs/retrain/{method}/weights").iterdir()} == {
            "seed-0.safetensors",
            "seed-1.safetensors",
        }
    found = json.loads((project / "outputs/channels/autoslim.json").read_text())["channels"]
    within = [step for step in trajectory["steps"] if step["macs"] <= limit]
    refinement = json.loads((project / "outputs/channels/refinement.json").read_text())
    assert refinement["before"]["channels"] == within[0]["channels"]
    assert refinement["after"]["channels"] == found
    assert within[0]["macs"] <= refinement["after"]["macs"] <= limit
    assert refinement["after"]["cross_entropy"] <= refinement["before"]["cross_entropy"]
    for figure in ("trajectory", "channels", "resources", "curves"):
        assert (project / f"outputs/report/{figure}.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_deleted_after_success(project: Path) -> None:
    assert not list((project / "checkpoints").glob("*/"))


def test_metrics_and_plots_are_registered(project: Path) -> None:
    shown = json.loads(run(["dvc", "metrics", "show", "--json"], project).splitlines()[-1])
    assert "outputs/report/metrics.json" in shown[""]["data"]
    run(["dvc", "plots", "show"], project)
    page = (project / "dvc_plots/index.html").read_text()
    curves = ("training of the supernet", "retraining", "trajectory of the search")
    for plot in (*curves, "outputs/report/trajectory.png"):
        assert plot in page
    specs = [json.loads(spec) for spec in re.findall(r"var spec = (\{.*?\});\s*vegaEmbed", page, re.DOTALL)]
    assert {spec["title"]["text"] if isinstance(spec["title"], dict) else spec["title"] for spec in specs} == {*curves}
    assert all(spec["data"]["values"] for spec in specs)
    assert "dvc_plots" not in run(["git", "status", "--porcelain"], project)


def test_the_page_has_the_results_and_the_time_of_each_stage(project: Path) -> None:
    page = html.unescape((project / "outputs/report/report.html").read_text())
    metrics = json.loads((project / "outputs/report/metrics.json").read_text())
    assert f"The network of autoslim has a top-1 of {100 * metrics['autoslim']['top1']:.2f} % on the test split" in page
    found = json.loads((project / "outputs/channels/autoslim.json").read_text())["channels"]
    assert all(f"<td>{group}</td>" in page for group in found)
    times = dict(re.findall(r"<td>([\w@]+)</td><td>([\d.]+ s)", page))
    assert {*times} == ALL
    known = json.loads((project / "checkpoints/times.json").read_text())
    assert all(0 < entry["seconds"] < 600 and not entry["continued"] for entry in known.values())
    assert "budget: 50%" in page  # the parameters
    assert "dvc repro" in page


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"budget": "60%"}, ALLOCATE_AND_AFTER | {"resources"}),
        ({"methods": ["autoslim", "uniform"]}, ALLOCATE_AND_AFTER | {"resources"}),
        ({"resource": "params"}, ALLOCATE_AND_AFTER | {"resources"}),
        ({"latency": {"threads": 2}}, {"resources", "report"}),
        ({"retrain": {"epochs": 3}}, RETRAIN_AND_REPORT),
        ({"retrain": {"optimiser": {"weight_decay": 0.001}}}, RETRAIN_AND_REPORT),
        ({"allocate": {"refine": False}}, ALLOCATE_AND_AFTER),
        ({"search": {"score": "error"}}, SEARCH_AND_AFTER),
        ({"search": {"stop": 0.4}}, SEARCH_AND_AFTER),
        ({"supernet": {"epochs": 3}}, SUPERNET_AND_AFTER),
        ({"supernet": {"width": 1.25}}, SUPERNET_AND_AFTER | {"resources"}),
        ({"supernet": {"grid": {"steps": 6}}}, SUPERNET_AND_AFTER | {"resources"}),
        ({"model": {"kwargs": {"in_channels": 1, "tail": 32}}}, SUPERNET_AND_AFTER | {"resources"}),
        ({"data": {"search_images": 80}}, ALL),
        ({"data": {"seed": 1}}, ALL),
        ({"tracking": {"enabled": False}}, set()),
        ({"runtime": {"device": "cpu"}}, set()),
        ({"runtime": {"processes": 2}}, set()),
        ({"report": {"figure_dpi": 80}}, {"report"}),
    ],
)
def test_only_affected_stages_rerun(project: Path, tmp_path: Path, changes: dict[str, Any], stages: set[str]) -> None:
    """A stage is affected if its parameters changed or if a stage before it is affected."""
    folder = tmp_path / "copy"
    shutil.copytree(project, folder, symlinks=True)
    write_params(folder, merged(read_yaml(folder / "params.yaml"), changes))
    status = json.loads(run(["dvc", "status", "--json"], folder).splitlines()[-1])
    assert after(set(status), folder) == stages


def after(changed: set[str], folder: Path) -> set[str]:
    """Returns the changed stages and their dependents by DVC's graph. The outputs of ``resources`` seldom change."""
    edges = [line.strip() for line in run(["dvc", "dag", "--dot"], folder).splitlines() if "->" in line]
    pairs = [tuple(part.strip(' ";') for part in edge.split("->")) for edge in edges]
    affected = set(changed)
    while more := {down for up, down in pairs if up in affected - {"resources"}} - affected:
        affected |= more
    return affected


def test_another_budget_only_retrains_and_the_former_one_trains_nothing(project: Path) -> None:
    output = run(["dvc", "exp", "run", "-S", "budget=70%"], project)
    assert stages_run(output) == ALLOCATE_AND_AFTER | {"resources"}
    assert json.loads((project / "outputs/report/metrics.json").read_text())["budget"] == "70%"
    shown = run(["dvc", "exp", "show", "--md", "--drop", "outputs.*curves.*"], project)
    assert "70%" in shown
    back = run(["dvc", "exp", "run", "-S", "budget=50%"], project)
    assert "step" not in back.replace("steps", ""), "it trained"
    assert json.loads((project / "outputs/report/metrics.json").read_text())["budget"] == "50%"


def test_several_limits_use_the_same_supernet(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(project, folder, symlinks=True)
    ran = stages_run(run(["dvc", "exp", "run", "-S", "budget={macs: 70%, memory: 80%}"], folder))
    assert {"search", "allocate"} <= ran
    assert "supernet" not in ran
    metrics = json.loads((folder / "outputs/report/metrics.json").read_text())
    for method in ("uniform", "autoslim"):
        for resource in ("macs", "memory"):
            assert metrics[method][resource] <= metrics[f"budget_{resource}"]


def test_another_search_does_not_retrain_a_method_with_the_same_channels(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(project, folder, symlinks=True)
    ran = stages_run(run(["dvc", "exp", "run", "-S", "search.images=32", "-S", "search.score=error"], folder))
    assert {"search", "allocate"} <= ran
    assert "retrain@uniform" not in ran


def test_a_change_of_methods_trains_the_supernet_only_if_it_is_needed_now(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(project, folder, symlinks=True)

    def repro(*methods: str) -> set[str]:
        write_params(folder, merged(read_yaml(folder / "params.yaml"), {"methods": list(methods)}))
        return stages_run(run(["dvc", "repro", "allocate"], folder))

    changed = {"resources", "allocate"}
    assert repro("uniform") == changed | {"supernet", "search"}
    trajectory = json.loads((folder / "outputs/search/trajectory.json").read_text())
    assert trajectory.keys() == {"digest"}, "nothing was searched"
    run(["dvc", "plots", "show"], folder)
    assert repro("uniform", "autoslim") == set(), "DVC's cache has the supernet"
    assert json.loads((folder / "outputs/search/trajectory.json").read_text())["steps"]
    assert repro("uniform", "autoslim", "random") == changed


def test_temporary_experiment_leaves_results_and_mlflow_runs_in_the_root(project: Path) -> None:
    from mlflow_store import runs

    before = len(runs(project))
    run(["dvc", "exp", "run", "--temp", "-S", "budget=80%", "--name", "wide"], project)
    assert "wide" in run(["dvc", "exp", "list", "--name-only"], project)
    new = runs(project)[before:]
    assert {run_["stage"] for run_ in new} == {"retrain", "report"}
    assert {run_["budget"] for run_ in new} == {"80%"}
    assert {run_["dvc_experiment"] for run_ in new} == {"wide"}
    assert not (project / ".dvc/tmp/exps/standalone/mlflow.db").exists()
