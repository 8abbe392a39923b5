"""Runs in MLflow: a view of the files that DVC lists, never an input to anything.

The only module that imports mlflow, and late, for the import takes seconds. Nothing here can cost a result: the first
call to the store that fails prints one line on stderr and the run goes on untracked. The caller holds a ``Tracker`` in
any case, so no code asks whether tracking is on. Of several processes only one should track (``enabled``).
"""

from __future__ import annotations

import copy
import getpass
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autoslim.errors import first_line
from autoslim.pipeline.project import repository_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from torch import Tensor, nn

    from autoslim.pipeline.params import Params


_LONGEST_PARAM = 6000  # characters; MLflow's limits
_LONGEST_TAG = 8000
_BATCH = 100  # parameters a call may hold

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",  # what fails is told here, once
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",  # the check runs pip, which calls the package index
    "MLFLOW_UV_AUTO_DETECT": "false",  # or a uv.lock nearby would go into each model
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's 7 hold a stage for minutes when a server is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
}
"""What mlflow finds in its environment where the user has set nothing else."""


class Tracker(Protocol):
    """What a stage tells about its run. No method raises for a failure of the store."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, or None where nothing is tracked."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at ``step`` (an epoch, a slimming step), or of the whole run."""

    def tag(self, key: str, value: str) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """A copy of a file, or of what is in a directory."""

    def network(self, network: nn.Module, example: Tensor, name: str = "network") -> None:
        """A model that ``mlflow.pytorch.load_model`` loads where neither autoslim nor the network's own code is.

        ``example`` is a batch of inputs (N, C, H, W); the model takes any batch size. ``network`` is not changed.
        """


class NullTracker:
    """Tracks nothing."""

    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        pass

    def tag(self, key: str, value: str) -> None:
        pass

    def artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def network(self, network: nn.Module, example: Tensor, name: str = "network") -> None:
        pass


class MlflowTracker:
    """One run in an MLflow store, through a client of its own: MLflow's global state is not touched."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str) -> None:
        self.run_id: str | None = run_id
        self._client = client
        self._experiment_id = experiment_id
        self._run = run_id
        self._lost = False

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        def send() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self._client.log_batch(self._run, [Metric(k, float(v), now, step or 0) for k, v in values.items()])

        self._attempt(send)

    def tag(self, key: str, value: str) -> None:
        self._attempt(lambda: self._client.set_tag(self._run, key, _shortened(value, _LONGEST_TAG)))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        def send() -> None:
            log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            log(self._run, str(path), folder)

        self._attempt(send)

    def network(self, network: nn.Module, example: Tensor, name: str = "network") -> None:
        if self._lost:
            return
        try:  # apart from the store: a network that cannot be exported says nothing about it
            with tempfile.TemporaryDirectory() as folder:
                with _no_warnings(), redirect_stderr(io.StringIO()):  # torch.export prints the graph where it fails
                    _save_network(network, example, Path(folder, "model"))
                self._attempt(lambda: self._send_model(Path(folder, "model"), name))
        except Exception as error:
            _warn(f"the network is not logged in MLflow, for it cannot be exported ({_in_one_line(error)})")

    def params(self, values: Mapping[str, object]) -> None:
        def send() -> None:
            from mlflow.entities import Param

            params = [Param(key, _shortened(text, _LONGEST_PARAM)) for key, text in flattened(values).items()]
            for start in range(0, len(params), _BATCH):
                self._client.log_batch(self._run, params=params[start : start + _BATCH])

        self._attempt(send)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the run, also one whose tracking was lost on the way (and is tagged so), so that none runs for ever."""
        if error is not None and _status(error) != "FINISHED":
            self.tag("error", f"{type(error).__name__}: {_in_one_line(error)}")
        if self._lost:
            self._attempt(lambda: self._client.set_tag(self._run, "tracking", "incomplete"), last=True)
        self._attempt(lambda: self._client.set_terminated(self._run, _status(error)), last=True)

    def _attempt(self, act: Callable[[], object], last: bool = False) -> None:
        """Calls ``act``, once the store has failed only where it is the ``last`` that the store hears of the run."""
        if self._lost and not last:
            return
        try:
            with _no_warnings():
                act()
        except Exception as failure:
            if not self._lost:
                _warn(f"MLflow failed, this run goes on untracked ({_in_one_line(failure)})")
            self._lost = True

    def _send_model(self, folder: Path, name: str) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        data = self._client.get_run(self._run).data
        own = {key: value for key, value in data.tags.items() if not key.startswith("mlflow.")}
        entity = self._client.create_logged_model(self._experiment_id, name, self._run, tags=own, params=data.params)
        model = Model.load(str(folder))
        model.run_id, model.model_id, model.model_uuid = self._run, entity.model_id, entity.model_id
        model.artifact_path = entity.artifact_location
        model.save(str(folder / "MLmodel"))
        self._client.log_model_artifacts(entity.model_id, str(folder))
        self._client.finalize_logged_model(entity.model_id, "READY")
        self._client.log_outputs(self._run, [LoggedModelOutput(entity.model_id, step=0)])


@contextmanager
def tracked(
    stage: str,
    *,
    run_name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    enabled: bool,
    experiment: str = "autoslim",
) -> Iterator[Tracker]:
    """One MLflow run for what the ``with`` block does.

    ``params`` may be nested: they become dotted keys. ``tags`` (budget, method, ``supernet``: see ``fingerprint``) are
    joined by the stage's name, the commit and DVC's experiment. An exception of the block marks the run as failed, an
    interrupt as killed, and goes on its way.
    """
    tracker = _start(experiment, run_name, {"stage": stage, **origin(), **tags}, params) if enabled else None
    if tracker is None:
        yield NullTracker()
        return
    try:
        yield tracker
    except BaseException as error:
        tracker.close(error)
        raise
    tracker.close()


@contextmanager
def tracked_stage(
    params: Params,
    stage: str,
    *,
    run_name: str,
    sections: Sequence[str] = (),
    details: Mapping[str, object] | None = None,
    tags: Mapping[str, str] | None = None,
    rank_zero: bool = True,
) -> Iterator[Tracker]:
    """``tracked`` for a stage of the pipeline, with the parameters that all stages share.

    Args:
        params: all parameters.
        stage: the stage's name.
        sections: sections of ``params`` that are logged as parameters.
        details: further parameters.
        tags: tags besides the data source.
        rank_zero: whether this process is rank 0; others track nothing.
    """
    logged = {name: getattr(params, name).model_dump() for name in sections}
    with tracked(
        stage,
        run_name=run_name,
        params=logged | dict(details or {}),
        tags={"source": params.data.source, **(tags or {})},
        enabled=params.tracking.enabled and rank_zero,
        experiment=params.tracking.experiment,
    ) as tracker:
        yield tracker


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI`` where it is set, else the SQLite file ``mlflow.db`` in the repository's root."""
    path = str(repository_root() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def fingerprint(weights: Path) -> str:
    """The first 12 hex digits of a file's SHA-256.

    The tag ``supernet`` holds this of the supernet's weights, on the run that trained it and on all that descend from
    it: the filter ``tags.supernet = "…"`` finds the family, and nothing has to remember run ids.
    """
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def lineage(weights: Path) -> dict[str, str]:
    """The tag ``supernet`` of a run that descends from these weights; none where they are not here."""
    return {"supernet": fingerprint(weights)} if weights.exists() else {}


def origin() -> dict[str, str]:
    """Tags that say which commit and which DVC experiment a process belongs to, as far as they are known.

    An experiment's commit is the one it starts from. ``-dirty`` says that tracked files differ from it, ``dvc.lock``
    aside, which DVC rewrites between the stages.
    """
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")
    tags = {"dvc_experiment": os.environ.get("DVC_EXP_NAME", "")}
    if commit:
        dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)dvc.lock")
        tags |= {"mlflow.source.git.commit": commit, "commit": commit[:10] + ("-dirty" if dirty else "")}
    return {key: value for key, value in tags.items() if value}


def flattened(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested values as ``{"search.stop": "0.2"}``, everything but strings written as in JSON (and YAML)."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def numbers(values: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """The numbers among nested values, as ``{"uniform.top1": 0.93}``: what ``Tracker.metrics`` takes."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[f"{prefix}{key}"] = value
    return found


def _start(
    experiment: str, run_name: str, tags: Mapping[str, str], params: Mapping[str, object]
) -> MlflowTracker | None:
    """A run that has just begun, or None (and a warning) where the store cannot be used."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for chatter in ("alembic", "urllib3.connectionpool"):
        logging.getLogger(chatter).setLevel(logging.ERROR)
    uri = tracking_uri()
    try:
        with _no_warnings():
            client, experiment_id = _connect(uri, experiment)
            source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
            all_tags = {"mlflow.user": _user(), **source, **tags}
            shortened = {key: _shortened(value, _LONGEST_TAG) for key, value in all_tags.items()}
            run = client.create_run(experiment_id, run_name=run_name, tags=shortened)
    except Exception as failure:
        _warn(f"MLflow at {uri} cannot be used, this run goes untracked ({_in_one_line(failure)})")
        return None
    tracker = MlflowTracker(client, experiment_id, run.info.run_id)
    tracker.params(params)
    return tracker


def _user() -> str:
    """The name, or the number of one that has none (in a container run as some other user)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter since Python 3.13
        return str(os.getuid())


def _connect(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client of the store at ``uri`` and the id of the experiment, which is made where there is none."""
    from mlflow import MlflowClient

    scheme = uri.partition(":")[0].partition("+")[0]
    database = scheme in ("sqlite", "postgresql", "mysql", "mssql")
    lock: Any = nullcontext()
    if database:
        import sqlalchemy
        from filelock import FileLock

        file = sqlalchemy.make_url(uri).database if scheme == "sqlite" else None
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            uri += "" if "?" in uri else "?timeout=60"  # seconds to wait while another stage writes; SQLite's 5 are few
            lock = FileLock(f"{file}.lock", timeout=300)  # two stages must not both create the tables
    with lock:
        if database:  # MLflow tries for two minutes; asking once tells whether there is hope
            engine = sqlalchemy.create_engine(uri)
            sqlalchemy.inspect(engine)
            engine.dispose()
        # Where the server does not choose, MLflow's default lies under the working directory, which DVC may delete.
        folder = repository_root() / "mlartifacts" / re.sub(r"[^\w.-]+", "-", experiment)
        client = MlflowClient(uri)
        return client, _experiment_id(client, experiment, folder.as_uri() if database else None)


def _experiment_id(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # or the page opens on chat traces
            return client.create_experiment(name, artifact_location=artifacts, tags=kind)
        except Exception:
            found = client.get_experiment_by_name(name)  # another process may have been quicker
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(f"experiment {name} was deleted; restore it or choose another name")
    return str(found.experiment_id)


def _save_network(network: nn.Module, example: Tensor, folder: Path) -> None:
    """Writes ``network`` as an MLflow model: a graph of torch's own operators, in evaluation mode, on the CPU.

    A pickled model would need the code of the network's class where it is loaded; ``torch.export`` leaves it behind.
    """
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    plain = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
    # Two images: torch.export takes a size of one for a constant. Sixteenths: short numbers in the model's JSON files.
    images = (example[:2] if len(example) > 1 else example.repeat(2, 1, 1, 1)).detach().to("cpu", torch.float32)
    images = ((images * 16).round() / 16).contiguous()  # (N, C, H, W)
    with torch.inference_mode():
        logits = plain(images)  # (N, classes)
    float32 = np.dtype(np.float32)
    mlflow.pytorch.save_model(
        plain,
        str(folder),
        serialization_format="pt2",
        signature=ModelSignature(
            Schema([TensorSpec(float32, (-1, *images.shape[1:]))]),
            Schema([TensorSpec(float32, (-1, *logits.shape[1:]))]),
        ),
        input_example=images.numpy(),
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],  # given, so that nothing is looked up
    )
    model = Model.load(str(folder))
    # An exported graph stays on its device; without this MLflow asks for CUDA on a machine that has it, and fails.
    model.flavors["python_function"]["config"] = {"device": "cpu"}
    model.save(str(folder / "MLmodel"))


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _git(*arguments: str) -> str:
    """What git answers in the working directory; empty where it cannot."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _in_one_line(error: BaseException) -> str:
    return _shortened(first_line(error), 200)


def _warn(message: str) -> None:
    hidden = re.sub(r"//[^/@\s]+@", "//***@", message)  # a user and a password in a URI
    print(f"warning: {hidden}", file=sys.stderr)
