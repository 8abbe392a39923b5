"""MLflow: one run for each experiment, with those of its stages below it, although stages are separate processes."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import client_of
from tiny import tiny_params

from autoslim.cli.sync import sync_cli
from autoslim.pipeline.experiment import Experiment, experiment_name, model_name, summary, view
from autoslim.pipeline.params import Params, check_params
from autoslim.pipeline.tracking.sender import create_run
from autoslim.pipeline.tracking.stage import tracked_stage
from autoslim.pipeline.tracking.store import id_of_experiment, tracking_uri

REPORT = {
    "budget": "25%",
    "budget_macs": 30_000.0,
    "uniform": {"macs": 29_500, "params": 4310, "top1": 0.9748},
    "autoslim": {"macs": 29_600, "params": 5410, "top1": 0.9762},
    "gain": {"autoslim": {"top1": 0.0014, "top1_low": -0.0129, "top1_high": 0.0158}},
    "choice": {"method": "autoslim", "seed": 0},
}


@pytest.fixture(autouse=True)
def repository(tracked_repository: Path) -> Path:
    return tracked_repository


def params(**changes: Any) -> Params:
    return check_params(tiny_params(changes), "test")


def stage(name: str, run_file: Path | None = None, **changes: Any) -> Any:
    return tracked_stage(params(**changes), name, run_name=name, run_file=run_file)


def report(**changes: Any) -> None:
    with stage("report", **changes) as tracker:
        tracker.summary(REPORT, "| method |\n| --- |")


def experiments(repository: Path) -> list[Any]:
    """Returns the runs of experiments, oldest first."""
    found = client_of(repository).search_runs(["1"], "tags.stage = 'experiment'")
    return sorted(found, key=lambda run: run.info.start_time)


def children(repository: Path, parent: Any) -> list[str]:
    same = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    return sorted(run.data.tags["stage"] for run in client_of(repository).search_runs(["1"], same))


def test_stages_of_an_experiment_have_one_run_above_them(repository: Path) -> None:
    with stage("supernet") as tracker:
        (parent,) = experiments(repository)
        assert parent.info.status == "RUNNING"
        tracker.metrics({"loss": 1.0}, 1)
    assert experiments(repository)[0].info.status == "SCHEDULED"  # between two stages
    with stage("search", runtime={"threads": 2}, report={"figure_dpi": 80}):  # these do not change a result
        pass
    report()
    (parent,) = experiments(repository)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "mobilenet_v2-50%"
    assert children(repository, parent) == ["report", "search", "supernet"]
    assert {key: round(value, 6) for key, value in parent.data.metrics.items()} == {
        "uniform_top1_percent": 97.48,
        "autoslim_top1_percent": 97.62,
        "autoslim_gain_points": 0.14,
        "macs": 29_600,
    }
    assert parent.data.tags["mlflow.note.content"] == "| method |\n| --- |"
    assert parent.data.params["budget"] == "50%"
    assert parent.data.tags["source"] == "digits"


def test_each_budget_is_an_experiment(repository: Path) -> None:
    for budget in ("25%", "50%"):
        report(budget=budget)
    assert [run.data.params["budget"] for run in experiments(repository)] == ["25%", "50%"]


def test_a_killed_stage_continues_its_experiment(repository: Path) -> None:
    run_file = repository / "checkpoints" / "run.json"
    with contextlib.suppress(KeyboardInterrupt), stage("supernet", run_file) as tracker:
        first = tracker.run_id
        raise KeyboardInterrupt
    (parent,) = experiments(repository)
    assert (parent.info.status, "KeyboardInterrupt" in parent.data.tags["error"]) == ("KILLED", True)
    with stage("supernet", run_file) as tracker:
        assert tracker.run_id == first
        (parent,) = experiments(repository)
        assert (parent.info.status, "error" in parent.data.tags) == ("RUNNING", False)
    report()
    (parent,) = experiments(repository)
    assert (parent.info.status, children(repository, parent)) == ("FINISHED", ["report", "supernet"])


def test_a_killed_process_does_not_leave_its_experiment_running(repository: Path) -> None:
    killed = stage("supernet")
    tracker = killed.__enter__()
    tracker._journal.close()  # the system releases the lock of a process that was killed
    with stage("search"):
        assert client_of(repository).get_run(tracker.run_id).info.status == "KILLED"
    (parent,) = experiments(repository)
    assert (parent.info.status, children(repository, parent)) == ("SCHEDULED", ["search", "supernet"])
    tracker._journal = None
    killed.__exit__(None, None, None)


def test_an_experiment_that_runs_again_is_another_one_but_a_repeated_report_is_not(repository: Path) -> None:
    for _ in range(2):
        report()
    assert len(experiments(repository)) == 1
    with stage("supernet"):  # DVC runs it again only if something has changed, such as the code
        assert len(experiments(repository)) == 2
    report()
    first, second = experiments(repository)
    assert children(repository, first) == ["report", "report"]
    assert children(repository, second) == ["report", "supernet"]


def test_an_experiment_after_the_clock_was_set_back_is_one_run(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report()
    (before,) = experiments(repository)
    monkeypatch.setattr("autoslim.pipeline.tracking.stage.now", lambda: before.info.start_time - 3_600_000)
    for name in ("supernet", "search"):
        with stage(name):
            pass
    report()
    after, _ = experiments(repository)
    assert children(repository, after) == ["report", "search", "supernet"]
    assert after.info.status == "FINISHED"
    assert children(repository, before) == ["report"]


def test_copies_of_the_project_that_start_together_share_a_run(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have set MLFLOW_TRACKING_URI to the same SQLite file."""
    client = client_of(repository)
    id_of_experiment(client, tracking_uri(), "autoslim")
    both_have_searched = threading.Barrier(2)
    search = type(client).search_runs

    def searched(*args: Any, **kwargs: Any) -> Any:
        found = search(*args, **kwargs)
        with contextlib.suppress(threading.BrokenBarrierError):  # the other one waits for its turn
            both_have_searched.wait(0.5)
        return found

    def started(name: str) -> str:
        (repository / name / ".dvc").mkdir(parents=True)
        copy.root = repository / name
        return create_run(client, "1", header | {"run_name": name})

    copy = threading.local()
    monkeypatch.setattr("autoslim.pipeline.tracking.store.repository_root", lambda: copy.root)
    header = {"time": 1, "tags": {"stage": "prepare"}, "parent": Experiment.of(params()).to_dict()}
    with monkeypatch.context() as slow, ThreadPoolExecutor(2) as threads:
        slow.setattr(type(client), "search_runs", searched)
        assert len(set(threads.map(started, ("one", "two")))) == 2
    (parent,) = experiments(repository)
    assert children(repository, parent) == ["prepare", "prepare"]


def test_an_experiment_that_mlflow_did_not_receive_is_one_run_when_it_is_sent(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage("supernet"):
        pass
    with monkeypatch.context() as silent:
        silent.setattr("autoslim.pipeline.tracking.stage.answers", lambda *_, **__: False)
        with stage("search"):
            pass
        report()
        report(budget="25%")
    assert children(repository, experiments(repository)[0]) == ["supernet"]
    sync_cli()
    assert capsys.readouterr().out == "MLflow received 3 runs\n"
    found = {run.data.params["budget"]: run for run in experiments(repository)}
    assert children(repository, found["50%"]) == ["report", "search", "supernet"]
    assert children(repository, found["25%"]) == ["report"]
    for run in found.values():
        assert run.info.status == "FINISHED"
        assert run.data.metrics["macs"] == 29_600


def test_stages_in_temporary_copies_share_a_run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(repository))
    monkeypatch.setenv("DVC_EXP_NAME", "puny-oats")
    for name in ("supernet", "report"):
        copy = repository / ".dvc" / "tmp" / "exps" / name
        copy.mkdir(parents=True)
        monkeypatch.chdir(copy)
        with stage(name):
            pass
    (parent,) = experiments(repository)
    assert children(repository, parent) == ["report", "supernet"]
    assert parent.data.tags["dvc_experiment"] == "puny-oats"


def test_a_deleted_experiment_does_not_stop_what_is_sent_later(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage("supernet") as tracker, monkeypatch.context() as broken:
        broken.setattr("mlflow.MlflowClient.log_batch", lambda *_, **__: 1 / 0)
        tracker.metrics({"loss": 1.0}, 1)
    client_of(repository).delete_run(experiments(repository)[0].info.run_id)
    capsys.readouterr()
    sync_cli()
    assert capsys.readouterr().out == "MLflow received 1 run\n"
    assert client_of(repository).get_run(tracker.run_id).data.metrics == {"loss": 1.0}


def test_the_data_set_is_an_input_of_the_experiment(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from autoslim.data.prepared import DataInfo

    counts = {"train": 200, "search": 64, "test": 100}
    info = DataInfo("digits", tuple("abc"), 1, (8, 8), (0.5,), (0.2,), counts, "arrays")
    (repository / "data/prepared").mkdir(parents=True)
    (repository / "data/prepared/data.json").write_text(info.to_json())
    for name in ("supernet", "report"):
        with stage(name):
            pass
    (given,) = experiments(repository)[0].inputs.dataset_inputs
    assert given.dataset.name == "digits"
    profile = json.loads(given.dataset.profile)
    assert (profile["train_images"], profile["test_images"], profile["classes"]) == (200, 100, 3)
    assert "[-1, 1, 8, 8]" in given.dataset.schema


def test_the_view_has_a_column_for_each_number(repository: Path) -> None:
    report()
    tags = client_of(repository).get_experiment("1").tags
    state = json.loads(tags["mlflow.sharedViewState.autoslim"])
    metrics = {f"metrics.`{name}`" for name in experiments(repository)[0].data.metrics}
    assert metrics < set(state["selectedColumns"])
    assert state["searchFilter"] == "tags.stage = 'experiment'"
    more = json.loads(view(["memory_bytes"], json.dumps(state)))["selectedColumns"]
    assert more == [*state["selectedColumns"], "metrics.`memory_bytes`"]


def test_summary_in_the_tasks_unit() -> None:
    """An error in years, of which less is better: the report's gain is positive if the method is better."""
    measure = {"name": "mae", "title": "mean error", "unit": "years", "higher_is_better": False}
    values = {"macs": 5, "memory": 9, "mae": 4.5}
    found = summary({"measures": [measure], "budget_memory": 10, "default": values, "gain": {"default": {"mae": 0.5}}})
    assert found == {"default_mae_years": 4.5, "default_gain_years": 0.5, "memory_bytes": 9}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"budget": "25%"}, "mobilenet_v2-25%"),
        ({"budget": "3.4M", "resource": "params"}, "mobilenet_v2-3.4M-params"),
        ({"budget": "35%", "resource": "latency"}, "mobilenet_v2-35%-latency"),
        ({"budget": "20MB", "resource": "memory"}, "mobilenet_v2-20MB"),
        ({"budget": {"macs": "70%", "memory": "80%"}}, "mobilenet_v2-70%-of-MACs+80%-of-memory"),
        ({"budget": "305M", "model": {"name": "net.py:build"}}, "build-305M"),
    ],
)
def test_names_of_experiments(changes: dict[str, Any], name: str) -> None:
    assert experiment_name(params(**changes)) == name


def test_names_of_models_have_no_character_that_mlflow_refuses() -> None:
    assert model_name("mobilenet_v2", "25%", "autoslim") == "mobilenet_v2-25pct-autoslim"
    for name in (model_name("net.b0", "4.5ms", "released/x:1"), model_name("n", "70% of MACs, 80% of memory", "a")):
        assert not set("/:.%\"'") & set(name)
