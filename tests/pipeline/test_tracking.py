"""Compares tracking with what MLflow's client reads, and tests stores that fail."""

import getpass
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from tiny import tiny_params
from torch import nn

from autoslim.data.images import evaluation_pixels
from autoslim.data.prepared import DataInfo
from autoslim.pipeline.params import check_params
from autoslim.pipeline.tracking.stage import tracked, tracked_stage
from autoslim.pipeline.tracking.store import tracking_uri
from autoslim.pipeline.tracking.tags import fingerprint, flattened, origin
from autoslim.pipeline.tracking.tracker import MlflowTracker, NullTracker

CLEAN = [name for name in os.environ if name.startswith(("DVC_", "MLFLOW_"))]


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns an empty repository as the working directory, without the caller's settings."""
    for name in CLEAN:
        monkeypatch.delenv(name)
    root = tmp_path / "my repository"
    root.mkdir()
    (root / "dvc.yaml").touch()
    monkeypatch.chdir(root)
    return root


START = """
from pathlib import Path
from autoslim.pipeline.tracking.stage import tracked
with tracked("prepare", run_name="prepare", params={}, tags={}, enabled=True) as tracker:
    for step in range(20):
        tracker.metrics({"loss": 1.0}, step)
    tracker.artifact(Path("dvc.yaml"))
    print(tracker.run_id)
"""


@dataclass
class Started:
    """The results of two processes that started together in copies of a repository without an MLflow store."""

    root: Path
    copies: list[Path]
    outputs: list[tuple[str, str]]  # standard output and error


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Starts two processes. All tests share their store, because it takes seconds to create MLflow's tables."""
    root = tmp_path_factory.mktemp("real repository")
    copies = [root / ".dvc" / "tmp" / "exps" / name for name in ("one", "two")]
    processes = []
    for copy in copies:
        copy.mkdir(parents=True)
        (copy / "dvc.yaml").touch()
        environment = {name: value for name, value in os.environ.items() if name not in CLEAN} | {"DVC_ROOT": str(root)}
        command = [sys.executable, "-c", START]
        processes.append(subprocess.Popen(command, cwd=copy, env=environment, stdout=PIPE, stderr=PIPE, text=True))
    return Started(root, copies, [process.communicate(timeout=240) for process in processes])


@pytest.fixture
def store(started: Started, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{started.root}/mlflow.db")
    return MlflowClient(tracking_uri())


def run(enabled: bool = True, params: Mapping[str, object] | None = None, **tags: str) -> Any:
    return tracked("retrain", run_name="retrain autoslim 25%", params=params or {}, tags=tags, enabled=enabled)


class Branched(nn.Module):
    """A network whose class no other process can import."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(images)).relu().mean((2, 3))  # (N, 3, H, W) -> (N, 8)
        return self.head(self.drop(features))  # (N, 8) -> (N, 5)


INFO = DataInfo("digits", tuple("abcde"), 3, (8, 8), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), {}, "arrays", resize=9)


class Unexportable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if images.sum().item() > 0 else images[:, :1]


def test_the_default_store_is_in_the_repositorys_root(repository: Path, monkeypatch: pytest.MonkeyPatch):
    below = repository / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert tracking_uri() == f"sqlite:///{repository}/mlflow.db"


def test_dvc_root_takes_precedence_over_dvcs_copy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_ROOT", "/the/real one")
    assert tracking_uri() == "sqlite:////the/real one/mlflow.db"


def test_mlflows_variable_takes_precedence_over_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_ROOT", "/the/real one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    assert tracking_uri() == "http://localhost:5000"


def test_a_run_contains_what_the_block_logged(store: MlflowClient, repository: Path, tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(b"png")
    params = {"retrain": {"seeds": [0, 1], "optimiser": {"momentum": 0.9}}, "budget": "25%", "null": None, "on": True}
    with run(params=params | {"long": "x" * 9000, **{f"p{n}": n for n in range(150)}}, budget="25%") as tracker:
        assert tracker.run_id is not None
        assert store.get_run(tracker.run_id).info.status == "RUNNING"
        for epoch, loss in enumerate([2.0, 1.0], 1):
            tracker.metrics({"seed_0.loss": loss}, step=epoch)
        tracker.metrics({"top1": 0.9})
        tracker.tag("supernet", "abc")
        tracker.artifact(tmp_path / "pictures", "pictures")
        tracker.artifact(tmp_path / "pictures" / "one.png")
    found = store.get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "retrain autoslim 25%"
    assert store.get_experiment(found.info.experiment_id).name == "autoslim"
    wanted = {
        "retrain.seeds": "[0, 1]",
        "retrain.optimiser.momentum": "0.9",
        "budget": "25%",
        "null": "null",
        "on": "true",
    }
    assert wanted.items() <= found.data.params.items()
    assert len(found.data.params["long"]) == 6000
    assert found.data.params["p149"] == "149"
    assert {"stage": "retrain", "budget": "25%", "supernet": "abc"}.items() <= found.data.tags.items()
    assert found.data.metrics == {"seed_0.loss": 1.0, "top1": 0.9}
    history = store.get_metric_history(tracker.run_id, "seed_0.loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]
    assert {file.path for file in store.list_artifacts(tracker.run_id)} == {"one.png", "pictures"}
    assert [file.path for file in store.list_artifacts(tracker.run_id, "pictures")] == ["pictures/one.png"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("loss is nan\nat step 3"), "FAILED", "ValueError: loss is nan"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt: KeyboardInterrupt"),
        (SystemExit(0), "FINISHED", None),
        (SystemExit(1), "FAILED", "SystemExit: 1"),
    ],
)
def test_the_status_of_a_run_is_that_of_the_block(
    store: MlflowClient, error: BaseException, status: str, message: str | None
):
    with pytest.raises(type(error)) as raised, run() as tracker:
        raise error
    assert raised.value is error
    found = store.get_run(tracker.run_id)
    assert found.info.status == status
    assert found.data.tags.get("error") == message


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 54321"), OSError("No username set")])
def test_a_user_without_a_name_is_tracked_by_number(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def nameless() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", nameless)
    with run() as tracker:
        tracker.metrics({"loss": 1.0}, 1)
    assert store.get_run(tracker.run_id).data.tags["mlflow.user"] == str(os.getuid())


def test_nothing_is_tracked_if_tracking_is_off(repository: Path, capfd: pytest.CaptureFixture[str]):
    with run(enabled=False) as tracker:
        assert isinstance(tracker, NullTracker)
        assert tracker.run_id is None
        tracker.metrics({"loss": 1.0}, 1)
        tracker.network(Branched(), torch.zeros(1, 3, 8, 8), INFO)
    assert [file.name for file in repository.iterdir()] == ["dvc.yaml"]
    assert capfd.readouterr() == ("", "")


def test_importing_the_module_imports_neither_mlflow_nor_torch():
    code = "import sys, autoslim.pipeline.tracking.stage; print({'mlflow', 'torch', 'sqlalchemy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def no_directory(root: Path) -> str:
    (root / "file").touch()
    return f"sqlite:///{root}/file/mlflow.db"


def no_database(root: Path) -> str:
    (root / "text.db").write_text("this is no SQLite file " * 50)
    return f"sqlite:///{root}/text.db"


@pytest.mark.parametrize(
    "uri",
    [no_directory, no_database, lambda _: "http://user:secret@127.0.0.1:9", lambda _: "nonsense://x"],
    ids=["no directory", "no database", "no server", "no such scheme"],
)
def test_a_store_that_cannot_be_used_causes_one_warning(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], uri: Any
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(repository))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = None
    with run() as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        tracker.network(Branched(), torch.zeros(1, 3, 8, 8), INFO)
        result = 42
    assert result == 42
    assert tracker.run_id is None
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("warning: MLflow at ")
    assert "this run is kept in checkpoints/mlflow" in captured.err
    assert "secret" not in captured.err
    assert not any("secret" in file.read_text() for file in Path("checkpoints").rglob("*.jsonl"))


def test_a_store_that_fails_later_causes_one_warning(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    calls = []

    def fail(*args: object, **kwargs: object) -> None:
        calls.append(args)
        raise OSError("No space left on device")

    with run() as tracker:
        tracker.metrics({"loss": 2.0}, 1)
        with monkeypatch.context() as broken:
            broken.setattr(MlflowClient, "log_batch", fail)
            tracker.metrics({"loss": 1.0}, 2)
        tracker.metrics({"loss": 0.5}, 3)  # the tracker does not retry, because each attempt may take long
        tracker.artifact(Path("dvc.yaml"))
        tracker.network(Branched(), torch.zeros(1, 3, 8, 8), INFO)
    assert len(calls) == 1
    assert capfd.readouterr().err == (
        "warning: MLflow failed; the rest is kept in checkpoints/mlflow, and sent by the next stage that reaches "
        "MLflow, or by `autoslim sync` (No space left on device)\n"
    )
    found = store.get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"loss": 2.0}
    assert found.data.tags["tracking"] == "incomplete"
    with run():
        pass
    assert capfd.readouterr().err == "MLflow: received 1 run kept in checkpoints/mlflow\n"
    found = store.get_run(tracker.run_id)
    assert found.info.status == "FINISHED"
    assert "tracking" not in found.data.tags
    history = store.get_metric_history(tracker.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert [file.path for file in store.list_artifacts(tracker.run_id)] == ["dvc.yaml"]
    assert not Path("checkpoints/mlflow").exists()


def test_a_store_that_fails_at_every_call_does_not_raise(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    class Failing:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError(f"{name}: the server is gone")

    monkeypatch.setattr("autoslim.pipeline.tracking.stage._start", lambda *_: MlflowTracker(Failing(), "1", "run"))  # type: ignore[arg-type]
    with run() as tracker:
        tracker.artifact(Path("missing"))
        tracker.metrics({"loss": 1.0})
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_network_that_cannot_be_exported_causes_only_a_warning(
    store: MlflowClient, capfd: pytest.CaptureFixture[str]
):
    with run() as tracker:
        tracker.network(Unexportable(), torch.ones(1, 3, 8, 8), INFO)
        tracker.metrics({"top1": 0.5})
    err = capfd.readouterr().err
    assert err.startswith("warning: the network is not logged in MLflow, because it cannot be exported (")
    assert len(err.splitlines()) == 1
    found = store.get_run(tracker.run_id)
    assert found.data.metrics == {"top1": 0.5}
    assert "tracking" not in found.data.tags


LOAD_ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("autoslim", "torchvision", "test_tracking"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import base64, json, socket, threading, time, urllib.request
import mlflow, pandas, torch, uvicorn
from mlflow.pyfunc import scoring_server

mlflow.set_tracking_uri(sys.argv[1])
uri = f"runs:/{sys.argv[2]}/network"
images = torch.load(sys.argv[3], weights_only=True)
network = mlflow.pytorch.load_model(uri)
function = mlflow.pyfunc.load_model(uri)
content = open(sys.argv[4], "rb").read()

listening = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(scoring_server.init(function), log_level="error"))
threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
body = {"dataframe_records": [{"image": base64.b64encode(content).decode()}] * 2, "params": {"top": 2}}
request = urllib.request.Request(
    f"http://127.0.0.1:{listening.getsockname()[1]}/invocations",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
print(json.dumps({
    "plain": network(images).tolist(),
    "one": network(images[:1]).tolist(),
    "answer": function.predict(pandas.DataFrame({"image": [content]})).to_dict("records"),
    "served": json.loads(urllib.request.urlopen(request, timeout=60).read())["predictions"],
    "keys": list(network.state_dict()),
    "example": function.predict(function.input_example)["class"].tolist(),
}))
server.should_exit = True
"""


def test_the_logged_model_classifies_image_files_where_autoslim_is_not_installed(
    store: MlflowClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """In Python, and on a real request to MLflow's server."""
    torch.manual_seed(0)
    network = Branched().to(memory_format=torch.channels_last).train()
    network(torch.randn(16, 3, 8, 8))  # changes the running statistics
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = torch.randn(7, 3, 8, 8)
    with run(method="autoslim") as tracker:
        tracker.network(network, images[:1], INFO)
    assert capfd.readouterr().err == ""
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    torch.save(images, tmp_path / "images.pt")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    files = [str(tmp_path / name) for name in ("images.pt", "photo.png")]
    command = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, tracking_uri(), tracker.run_id, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    mean, std = (torch.tensor(values)[:, None, None] for values in (INFO.mean, INFO.std))
    pixels = torch.from_numpy(evaluation_pixels(photo, 3, 9, (8, 8)))
    with torch.inference_mode():
        logits = network.eval()(images)
        shares = network(((pixels / 255 - mean) / std)[None]).softmax(1)[0]
        example = ((images[:1] * std + mean).clamp(0, 1) * 255).round() / 255  # as the PNG file that is logged
        of_example = INFO.classes[int(network((example - mean) / std).argmax())]
    torch.testing.assert_close(torch.tensor(loaded["plain"]), logits)
    torch.testing.assert_close(torch.tensor(loaded["one"]), logits[:1])
    assert loaded["keys"] == list(network.state_dict())
    best = INFO.classes[int(shares.argmax())]
    [answer] = loaded["answer"]
    assert answer["class"] == best
    assert answer["probabilities"] == pytest.approx(dict(zip(INFO.classes, shares.tolist(), strict=True)))
    assert answer["probability"] == answer["probabilities"][best]
    assert len(loaded["served"]) == 2
    for served in loaded["served"]:
        assert served["class"] == best
        assert served["probability"] == pytest.approx(answer["probability"])
        assert served["probabilities"] == pytest.approx(dict(list(answer["probabilities"].items())[:2]))
    assert loaded["example"] == [of_example]

    (model,) = store.search_logged_models(
        [store.get_run(tracker.run_id).info.experiment_id], f"source_run_id = '{tracker.run_id}'"
    )
    assert (model.name, model.status, model.tags["method"]) == ("network", "READY", "autoslim")


OWN = DataInfo("my.py:build", (), 3, (8, 8), (), (), {}, "own")


@pytest.mark.parametrize(("info", "classifies"), [(OWN, True), (INFO, False)])
def test_a_network_that_does_not_classify_images_is_logged_alone(
    store: MlflowClient, capfd: pytest.CaptureFixture[str], info: DataInfo, classifies: bool
):
    network, images = Branched().eval(), torch.randn(3, 3, 8, 8)
    with run() as tracker:
        tracker.network(network, images, info, classifies=classifies)
    assert capfd.readouterr().err == ""
    mlflow.set_tracking_uri(tracking_uri())
    function = mlflow.pyfunc.load_model(f"runs:/{tracker.run_id}/network")
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(function.predict(images.numpy())), network(images))


def test_a_network_with_several_inputs_is_not_logged(store: MlflowClient, capfd: pytest.CaptureFixture[str]):
    with run() as tracker:
        tracker.network(Branched(), (torch.ones(1, 3, 8, 8), torch.ones(1, 2)), OWN)
    err = capfd.readouterr().err
    assert "(a logged model needs a single input tensor, but the inputs are a tuple)" in err


def test_a_run_has_the_source_and_the_task_as_tags(store: MlflowClient):
    with tracked_stage(check_params(tiny_params(), "test"), "search", run_name="search") as tracker:
        pass
    tags = store.get_run(tracker.run_id).data.tags
    assert (tags["source"], tags["task"]) == ("digits", "classification")


def test_processes_that_start_together_share_a_new_store(started: Started):
    assert [err for _, err in started.outputs] == ["", ""]
    ids = {out.strip() for out, _ in started.outputs}
    assert len(ids) == 2
    with sqlite3.connect(started.root / "mlflow.db") as database:
        runs = dict(database.execute("select run_uuid, status from runs where name = 'prepare'"))
        (experiments,) = database.execute("select count(*) from experiments where name = 'autoslim'").fetchone()
        (metrics,) = database.execute("select count(*) from metrics where key = 'loss' and value = 1").fetchone()
    assert runs == dict.fromkeys(ids, "FINISHED")
    assert experiments == 1
    assert metrics >= 40


def test_all_files_of_mlflow_are_in_the_root_not_in_dvcs_copies(started: Started):
    written = {file.parts[-3] for file in (started.root / "mlartifacts" / "autoslim").rglob("dvc.yaml")}
    assert {out.strip() for out, _ in started.outputs} <= written
    assert [file.name for copy in started.copies for file in copy.iterdir()] == ["dvc.yaml", "dvc.yaml"]


def test_origin_is_commit_and_experiment(repository: Path, monkeypatch: pytest.MonkeyPatch):
    assert origin() == {}  # no git repository, no experiment
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (repository / "dvc.lock").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (repository / "dvc.lock").write_text("2")  # DVC changes this file during a run
    (repository / "untracked").touch()
    assert origin() == {"commit": head[:10], "mlflow.source.git.commit": head}
    (repository / "dvc.yaml").write_text("stages: {}")
    assert origin()["commit"] == f"{head[:10]}-dirty"
    monkeypatch.setenv("DVC_EXP_NAME", "puny-oats")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0123456789abcdef")
    assert origin()["dvc_experiment"] == "puny-oats"
    assert origin()["commit"] == "0123456789-dirty"


def test_fingerprint_is_the_start_of_the_sha256(tmp_path: Path):
    (tmp_path / "weights").write_bytes(b"weights" * 100_000)
    assert fingerprint(tmp_path / "weights") == hashlib.sha256(b"weights" * 100_000).hexdigest()[:12]


def test_flattened_keeps_empty_sections_and_strings():
    assert flattened({"a": {"b": {}, "c": "1"}, "d": [1, "x"], "e": 1.5}) == {
        "a.b": "{}",
        "a.c": "1",
        "d": '[1, "x"]',
        "e": "1.5",
    }
