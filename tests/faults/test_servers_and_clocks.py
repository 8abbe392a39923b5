"""An MLflow server that answers with errors in the middle of a stage, a damaged store, and a clock that jumps."""

import hashlib
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow_store import client_of, runs

from autoslim.cli.sync import sync_cli
from autoslim.pipeline.tracking import store
from autoslim.pipeline.tracking.stage import tracked
from autoslim.pipeline.unsent import Journal
from autoslim.training import progress
from autoslim.training.progress import Progress

KEPT = "kept in checkpoints/mlflow, and sent by the next stage that reaches MLflow, or by `autoslim sync`"
YEAR = 365 * 86400.0


@pytest.fixture(autouse=True)
def repository(tracked_repository: Path) -> Path:
    return tracked_repository


def run(**params: object) -> Any:
    return tracked("supernet", run_name="supernet", params=params, tags={}, enabled=True)


class Server(ThreadingHTTPServer):
    """Answers every request of MLflow's client as if there were one experiment and one run, or with an error."""

    daemon_threads = True
    mode = "ok"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.batches: list[Any] = []  # metrics that were received


ERRORS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "500": (500, {}, b"internal error"),
    "429": (429, {"Retry-After": "3600"}, b"too many requests"),
    "html": (200, {"Content-Type": "text/html"}, b"<html><body>Please log in</body></html>"),
    "gateway": (502, {"Content-Type": "text/html"}, b"<html><body>Bad gateway</body></html>"),
}
INFO = {"run_id": "r", "status": "RUNNING", "experiment_id": "1", "lifecycle_stage": "active", "start_time": 1}
OK = {
    "experiment": {"experiment_id": "1", "name": "autoslim", "lifecycle_stage": "active"},
    "run": {"info": INFO, "data": {}},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.mode == "close":
            self.close_connection = True
            return
        ok = 200, {"Content-Type": "application/json"}, json.dumps(OK).encode()
        code, headers, content = ERRORS.get(self.server.mode, ok)
        if self.server.mode == "ok" and self.path.endswith("log-batch"):
            self.server.batches += json.loads(body).get("metrics", [])
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    for name in store._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with Server() as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{found.server_port}")
        yield found
        found.shutdown()


@pytest.mark.parametrize("mode", [*ERRORS, "close"])
@pytest.mark.parametrize("begins", [False, True])
def test_a_server_that_fails_costs_one_line_and_no_event(
    mode: str, begins: bool, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails in the middle of a stage, or from its beginning."""
    server.mode = mode if begins else "ok"
    start = time.monotonic()
    with run(epochs=3) as tracker:
        tracker.metrics({"loss": 0.0}, 0)
        server.mode = mode
        for step in range(1, 6):
            tracker.metrics({"loss": float(step)}, step)
    assert time.monotonic() - start < 20  # a server that asks to be tried again in an hour is not waited for
    [line] = capsys.readouterr().err.splitlines()
    failure = "cannot be used; this run is" if begins else "MLflow failed; the rest is"
    assert line.startswith("warning: MLflow ")
    assert f"{failure} {KEPT} (" in line
    server.mode = "ok"
    server.batches = server.batches if begins else server.batches[:1]
    sync_cli()
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("MLflow received 1 run\n", "")  # and not the run's address, by MLflow
    found = sorted((metric["step"], metric["value"]) for metric in server.batches)
    assert found == [(step, float(step)) for step in range(6)]


def drop(*names: str) -> None:
    store = sqlite3.connect("mlflow.db")
    for name in names:
        store.execute(f"DROP TABLE {name}")
    store.commit()
    store.close()


DAMAGES: dict[str, tuple[Callable[[], object], str]] = {
    "half of the tables": (
        lambda: drop("runs", "tags", "params"),
        "the file lacks MLflow's tables params, runs, tags: move the file away, and the next stage makes a new one",
    ),
    "one table": (lambda: drop("metrics"), "the file lacks MLflow's tables metrics: move the file away, and"),
    "text": (
        lambda: Path("mlflow.db").write_text("not a database" * 100),
        "(sqlite3.DatabaseError) file is not a database: move the file away, and the next stage makes a new one",
    ),
    "a folder": (lambda: (os.remove("mlflow.db"), os.mkdir("mlflow.db")), "unable to open database file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_one_line_and_moving_it_away_repairs_it(
    damage: str, repository: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act, reason = DAMAGES[damage]
    act()
    start = time.monotonic()
    for step in (1, 2):
        with run(number=step) as tracker:
            tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - start < 20
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: MLflow at sqlite:///") and f"this run is {KEPT}" in line for line in lines)
    assert all(reason in line for line in lines)
    Path("mlflow.db").rename("damaged")
    shutil.copy(empty_store, "mlflow.db")  # as the next stage would create it, in seconds
    with run(number=3):
        pass
    assert capsys.readouterr().err == "MLflow: received 2 runs kept in checkpoints/mlflow\n"
    assert [found["status"] for found in runs(repository)] == ["FINISHED"] * 3


@pytest.mark.parametrize("content", [None, b""])
def test_a_store_without_tables_is_created(
    content: bytes | None, repository: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty file, and one of SQLite's without tables."""
    Path("mlflow.db").write_bytes(content or b"")
    if content is None:
        database = sqlite3.connect("mlflow.db")
        database.execute("PRAGMA user_version = 1")
        database.close()
    monkeypatch.setattr(store, "_create_store", lambda uri, file: shutil.copy(empty_store, file))
    with run():
        pass
    assert [found["status"] for found in runs(repository)] == ["FINISHED"]


@pytest.mark.parametrize("jump", [-YEAR, YEAR, None])
def test_a_clock_that_jumps_loses_no_event(
    jump: float | None, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system's time is set in the middle of a run, or stands still (None)."""
    clock, nanoseconds = time.time, time.time_ns
    with run(first=True) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        now, now_ns = clock(), nanoseconds()
        monkeypatch.setattr(time, "time", lambda: now if jump is None else clock() + jump)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns if jump is None else nanoseconds() + int(jump * 1e9))
        tracker.metrics({"loss": 2.0}, 2)
    with run(second=True):
        pass
    journal = Journal.start({})
    assert len({journal.new_path() for _ in range(3)}) == 3
    journal.remove()
    assert capsys.readouterr().err == ""
    assert [found["status"] for found in runs(repository)] == ["FINISHED"] * 2
    history = client_of(repository).get_metric_history(tracker.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("jump", [-YEAR, YEAR])
def test_a_server_that_was_silent_before_the_clock_jumped_is_asked_again(
    jump: float, server: Server, repository: Path
) -> None:
    uri, asked = store.tracking_uri(), repository / ".dvc/tmp"
    asked.mkdir(parents=True)
    silent = asked / f"mlflow-silent-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
    silent.touch()
    assert not store.answers(uri)
    os.utime(silent, (time.time() + jump,) * 2)
    assert store.answers(uri)


def test_the_time_left_does_not_depend_on_the_clock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    clock = time.time
    with Progress("run", 4) as shown:
        for step in range(4):
            monkeypatch.setattr(time, "time", lambda jump=(-1) ** step * YEAR: clock() + jump)
            shown.advance()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.endswith(("0:00 left", "took 0:00")) for line in lines), lines
