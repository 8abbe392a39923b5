"""Tracking: a server that never answers is asked once, what it missed is sent later, and no run is left running."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow_store import client_of
from test_full_disk import full_disk
from torch import nn

from autoslim.cli.sync import sync_cli
from autoslim.data.prepared import DataInfo
from autoslim.pipeline.tracking import stage, store
from autoslim.pipeline.tracking.stage import tracked
from autoslim.pipeline.tracking.store import tracking_uri
from autoslim.pipeline.tracking.tracker import MlflowTracker


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError("no access to the bucket")


@pytest.fixture(autouse=True)
def repository(tracked_repository: Path) -> Path:
    return tracked_repository


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Returns the address of a server that accepts connections and never answers."""
    monkeypatch.setattr(store, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{server.getsockname()[1]}")
        yield tracking_uri()


def run(run_file: Path | None = None, **params: object) -> Any:
    return tracked("supernet", run_name="supernet", params=params, tags={}, enabled=True, run_file=run_file)


def test_a_silent_server_is_asked_once(
    silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seconds() -> float:
        start = time.monotonic()
        with run() as tracker:
            tracker.metrics({"loss": 1.0}, 1)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: MLflow at http://***@127.0.0.1:")
        assert "this run is kept in checkpoints/mlflow" in line
        assert line.endswith("(the server does not answer; it is asked again after 10 minutes)")
        return time.monotonic() - start

    assert 0.5 <= seconds() < 5
    monkeypatch.setattr(store, "urlopen", None)  # asking again would be an error
    assert seconds() < 5
    monkeypatch.undo()
    monkeypatch.setattr(store, "SILENCE_S", 0.0)
    monkeypatch.setattr(store, "_ANSWER_S", 0.1)
    assert not store.answers(silent)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert store.answers(f"http://127.0.0.1:{port}")  # refused at once: MLflow reports why


def test_a_server_that_falls_silent_is_not_asked_to_end_the_run(
    silent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    class Client:
        def __getattr__(self, name: str) -> Any:
            def call(*_: Any, **__: Any) -> None:
                calls.append(name)
                raise ConnectionError("timed out")

            return call

    tracker = MlflowTracker(Client(), "1", "run")  # type: ignore[arg-type]
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close()
    assert calls == ["log_batch"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_interrupted_training_is_one_run(repository: Path) -> None:
    run_file = repository / "checkpoints" / "run.json"
    with contextlib.suppress(KeyboardInterrupt), run(run_file, epochs=3) as tracker:
        first = tracker.run_id
        for step in (1, 2):
            tracker.metrics({"loss": float(step)}, step)
        raise KeyboardInterrupt
    client = client_of(repository)
    assert client.get_run(first).info.status == "KILLED"
    client.update_run(first, status="RUNNING")  # as SIGKILL leaves it
    with run(run_file, epochs=3) as tracker:
        assert tracker.run_id == first
        for step in (1, 2, 3):  # a resumed training reports its earlier epochs again
            tracker.metrics({"loss": float(step)}, step)
    found = client.get_run(first)
    assert found.info.status == "FINISHED"
    assert "error" not in found.data.tags
    assert [(metric.step, metric.value) for metric in client.get_metric_history(first, "loss")] == [
        (step, float(step)) for step in (1, 2, 3)
    ]
    with run(run_file, epochs=3) as tracker:
        assert tracker.run_id == first  # its process was killed before it removed the checkpoints
    run_file.write_text("{")
    with run(run_file, epochs=3) as tracker:
        assert tracker.run_id != first


def complete_run(repository: Path, run_file: Path | None = None) -> None:
    """Logs everything that a stage can log, and then replaces the files."""
    (repository / "report").mkdir()
    (repository / "report/table.md").write_text("first")
    (repository / "channels.json").write_text("{}")
    with run(run_file, epochs=3, nested={"seeds": [0, 1]}) as tracker:
        for step in (1, 2):
            tracker.metrics({"loss": 1 / step, "other": float("nan")}, step)
        tracker.metrics({"top1": 0.5})
        tracker.tag("supernet", "abc")
        tracker.artifact(repository / "report")
        tracker.artifact(repository / "channels.json", "channels")
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2))
        info = DataInfo("digits", ("a", "b"), 3, (2, 2), (0.5,) * 3, (0.2,) * 3, {}, "arrays", resize=2)
        tracker.network(network, torch.ones(2, 3, 2, 2), info)
    (repository / "report/table.md").write_text("of a later run")
    (repository / "channels.json").unlink()


def test_what_a_silent_server_missed_is_sent_by_the_next_stage(
    repository: Path, silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.time()
    complete_run(repository)
    end = time.time()
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert "secret" not in "".join(file.read_text() for file in (repository / "checkpoints").rglob("*.jsonl"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with run(other=True) as tracker:
        next_run = tracker.run_id
    assert capsys.readouterr().err == "MLflow: received 1 run kept in checkpoints/mlflow\n"
    assert not list((repository / "checkpoints").iterdir())

    client = client_of(repository)
    found, _ = sorted(client.search_runs(["1"]), key=lambda each: each.info.run_id == next_run)
    assert (found.info.run_name, found.info.status) == ("supernet", "FINISHED")
    assert begin - 1 <= found.info.start_time / 1000 <= found.info.end_time / 1000 <= end + 1
    assert found.data.params == {"epochs": "3", "nested.seeds": "[0, 1]"}
    assert {"stage": "supernet", "supernet": "abc"}.items() <= found.data.tags.items()
    assert "tracking" not in found.data.tags
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
    assert all(begin - 1 <= metric.timestamp / 1000 <= end + 1 for metric in history)
    assert found.data.metrics["top1"] == 0.5
    files = Path(client.download_artifacts(found.info.run_id, "", str(repository)))
    assert (files / "table.md").read_text() == "first"
    assert (files / "channels/channels.json").read_text() == "{}"
    (model,) = client.search_logged_models(["1"])
    assert (model.name, model.status, model.source_run_id) == ("network", "READY", found.info.run_id)
    assert list(Path(model.artifact_location.removeprefix("file://")).rglob("*.pt2"))


def test_a_network_that_is_sent_twice_is_one_model(
    repository: Path, silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An attempt that failed leaves a pending model, which the next one completes."""
    complete_run(repository)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    capsys.readouterr()

    client = client_of(repository)
    for call in ("log_model_artifacts", "finalize_logged_model", "set_terminated"):  # the last one: all was sent
        with monkeypatch.context() as broken:
            broken.setattr(f"mlflow.MlflowClient.{call}", refuse)
            with pytest.raises(SystemExit):
                sync_cli()
    sync_cli()
    (model,) = client.search_logged_models(["1"])
    assert model.status == "READY"
    outputs = client.get_run(model.source_run_id).outputs.model_outputs
    assert [output.model_id for output in outputs] == [model.model_id]


def test_what_a_silent_server_missed_is_sent_by_the_command(
    repository: Path, silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sync_cli()
    assert capsys.readouterr() == ("MLflow has all runs\n", "")
    for _ in range(2):
        with run() as tracker:
            tracker.metrics({"loss": 1.0}, 1)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sync_cli()
    assert capsys.readouterr().err == (
        f"error: MLflow at {silent.replace('user:secret', '***')} cannot be used (the server does not answer); correct "
        "MLFLOW_TRACKING_URI, or try later\n"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repository}/mlflow.db")
    sync_cli()
    assert capsys.readouterr() == ("MLflow received 2 runs\n", "")
    sync_cli()
    assert capsys.readouterr() == ("MLflow has all runs\n", "")
    assert [found.data.metrics for found in client_of(repository).search_runs(["1"])] == [{"loss": 1.0}] * 2


def test_sending_that_fails_is_repeated_without_duplicates(
    repository: Path, silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    complete_run(repository)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    capsys.readouterr()

    with monkeypatch.context() as broken:
        broken.setattr("mlflow.MlflowClient.log_artifacts", refuse)
        with run(other=True):
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: a run is still kept in {repository / 'checkpoints/mlflow'}")
    assert line.endswith("because it cannot be sent (no access to the bucket)")
    sync_cli()
    client = client_of(repository)
    found = [each for each in client.search_runs(["1"]) if each.data.params.get("epochs") == "3"]
    assert len(found) == 1
    assert [metric.step for metric in client.get_metric_history(found[0].info.run_id, "loss")] == [1, 2]
    assert found[0].info.status == "FINISHED"


def test_an_interrupted_training_is_one_run_although_the_server_was_silent(
    repository: Path, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = repository / "checkpoints" / "supernet-1" / "run.json"
    for last in (2, 3):
        with contextlib.suppress(KeyboardInterrupt), run(run_file, epochs=5) as tracker:
            for step in range(1, last + 1):  # a resumed training reports its earlier epochs again
                tracker.metrics({"loss": float(step)}, step)
            raise KeyboardInterrupt
    assert len(list((repository / "checkpoints/mlflow").iterdir())) == 1
    server = tracking_uri()
    monkeypatch.setattr(stage, "tracking_uri", lambda: server)
    monkeypatch.setattr(stage, "answers", lambda *_, **__: True)
    connect = store.connect
    monkeypatch.setattr(stage, "connect", lambda _: connect(f"sqlite:///{repository}/mlflow.db"))
    with run(run_file, epochs=5) as tracker:  # the server answers again
        for step in range(1, 6):
            tracker.metrics({"loss": float(step)}, step)
    client = client_of(repository)
    (found,) = client.search_runs(["1"])
    assert found.info.run_id == tracker.run_id
    assert found.info.status == "FINISHED"
    assert "error" not in found.data.tags
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, float(step)) for step in range(1, 6)]


STAGE = """
import sys, time
from pathlib import Path
from autoslim.pipeline.tracking.stage import tracked
with tracked("prepare", run_name="prepare", params={}, tags={}, enabled=True) as tracker:
    tracker.metrics({"images": 1.0}, 1)
    print(tracker.run_id, flush=True)
    time.sleep(120)
"""


def test_a_run_whose_process_was_killed_does_not_stay_running(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", STAGE]
    processes = [subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, alive = (process.stdout.readline().strip() for process in processes if process.stdout)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        client = client_of(repository)
        assert {client.get_run(run_id).info.status for run_id in (killed, alive)} == {"RUNNING"}
        with run():
            pass
        assert client.get_run(killed).info.status == "KILLED"
        assert client.get_run(killed).data.metrics == {"images": 1.0}
        assert client.get_run(alive).info.status == "RUNNING"
        processes[1].send_signal(signal.SIGINT)
        processes[1].wait()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert client.get_run(alive).info.status == "KILLED"
    assert not (repository / "checkpoints/mlflow").exists()
    assert capsys.readouterr().err == ""


def test_a_store_on_a_full_disk_is_one_line(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the store nor the journal can be written. The run goes on, and its own files are those of its stage."""
    with full_disk(100), run() as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow at sqlite:///")
    assert "this run is not tracked" in line
    (repository / "large.json").write_text("1" * 5000)
    with run() as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        with full_disk(100):
            for step in range(2, 30):
                tracker.metrics({"loss": 1.0}, step)
            tracker.artifact(repository / "large.json")
            tracker.metrics({"loss": 1.0}, 30)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("warning: MLflow failed; this run continues untracked (")
    found = client_of(repository).get_run(tracker.run_id)
    assert (found.info.status, found.data.tags["tracking"]) == ("FINISHED", "incomplete")


KILLED_IN_CREATION = """
import os, signal
from sqlalchemy import event
from sqlalchemy.engine import Engine

from autoslim.pipeline.tracking.stage import tracked

tables = []

@event.listens_for(Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *others):
    if "CREATE TABLE" in statement:
        tables.append(statement)
        if len(tables) == 12:
            os.kill(os.getpid(), signal.SIGKILL)

with tracked("supernet", run_name="supernet", params={}, tags={}, enabled=True):
    pass
"""


def test_a_kill_while_the_store_is_created_does_not_make_it_unusable(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "mlflow.db").unlink()
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_CREATION], check=False)
    assert killed.returncode == -signal.SIGKILL
    with run() as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    assert not capsys.readouterr().err
    assert client_of(repository).get_run(tracker.run_id).info.status == "FINISHED"
    assert not list(repository.glob(".mlflow*"))
