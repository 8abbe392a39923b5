"""Tracking: a server that never answers is asked once, and an interrupted training is one run."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import client_of

from autoslim.pipeline import tracking
from autoslim.pipeline.tracking import MlflowTracker, tracked, tracking_uri


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Returns the address of a server that accepts connections and never answers."""
    monkeypatch.setattr(tracking, "_ANSWER_S", 0.5)
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
        assert line.endswith("this run is not tracked (the server does not answer; it is asked again after 10 minutes)")
        return time.monotonic() - start

    assert 0.5 <= seconds() < 5
    monkeypatch.setattr(tracking, "urlopen", None)  # asking again would be an error
    assert seconds() < 5
    monkeypatch.undo()
    monkeypatch.setattr(tracking, "_SILENCE_S", 0.0)
    monkeypatch.setattr(tracking, "_ANSWER_S", 0.1)
    assert not tracking._answers(silent)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert tracking._answers(f"http://127.0.0.1:{port}")  # refused at once: MLflow reports why


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
        assert tracker.run_id != first  # that one is finished
    run_file.write_text("{")
    with run(run_file, epochs=3) as tracker:
        assert tracker.run_id != first
