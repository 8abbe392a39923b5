"""Tracking in MLflow. It logs copies of the files that DVC tracks, and is never an input of a stage.

This is the only module that imports mlflow. It does so inside functions, because the import takes seconds. If the store
fails, no result is lost: the first failing call prints one line on stderr, and what the store did not receive is kept
(see ``unsent``) and sent by the next stage that reaches it, or by ``autoslim sync``. MLflow itself has no such mode.
Callers always have a ``Tracker``, so they need not check whether tracking is enabled. Only rank 0 should track.

Everything that is logged is an *event*, a mapping that JSON can store. ``_Run.send`` sends it, now or later. To send an
event twice changes nothing: its time is part of it, and a run has one model of each name.

The runs of an experiment's stages are children of one run (see ``experiment``), with which a user compares experiments.
Stages are separate processes, in different working directories, and may reach MLflow in another order than they ran in.
Each of them finds that run in the store by a tag with the digest of the parameters, or creates it.
"""

from __future__ import annotations

import contextlib
import copy
import getpass
import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import urlopen

from autoslim.errors import UserError, first_line
from autoslim.files import parse_json, write_atomically, write_json
from autoslim.pipeline.experiment import EXPERIMENT, VIEW, Experiment, dataset, model_name, network_name, summary, view
from autoslim.pipeline.project import PREPARED, STAGES, repository_root
from autoslim.pipeline.unsent import Journal, unsent_folder, unsent_journals

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from torch import Tensor, nn

    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.params import Params


_LONGEST_PARAM = 6000  # characters; MLflow's limits
_LONGEST_TAG = 8000
_LONGEST_EXPERIMENT_TAG = 5000
_ORIGIN = (
    "dvc_experiment",
    "commit",
    "mlflow.user",
    "mlflow.source.git.commit",
    "mlflow.source.name",
    "mlflow.source.type",
)
_BATCH = 100  # parameters per call
_PARENT = "mlflow.parentRunId"  # tag with which MLflow's UI shows a run below another
_KEY = "experiment_key"  # tag of an experiment's run
_NOTE = "mlflow.note.content"  # tag that MLflow's UI shows as the description
_REPORT = "report"  # tag of an experiment's run: the report's metrics.json
_WAITS = "SCHEDULED"  # status of an experiment's run between two stages
_INCOMPLETE = "tracking"  # tag of a run that has not received everything
_KEPT = "kept in checkpoints/mlflow, and sent by the next stage that reaches MLflow, or by `autoslim sync`"
_ANSWER_S = 5.0  # time in which a server must answer before it is used
_SILENCE_S = 600.0  # time in which a server that did not answer is not asked again

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # this module reports a failure once, in one line
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",  # the check runs pip, which contacts the package index
    "MLFLOW_UV_AUTO_DETECT": "false",  # otherwise a uv.lock nearby is added to each model
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # with MLflow's default of 7, a lost server delays a stage by minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
}
"""Values of mlflow's environment variables, used unless the user has set them."""


class Tracker(Protocol):
    """Logs a stage's run. No method raises if the store fails."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, or None if nothing is tracked."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers at ``step`` (an epoch or a slimming step), or for the whole run."""

    def tag(self, key: str, value: str) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Logs a copy of a file, or of the contents of a directory."""

    def summary(self, report: Mapping[str, Any], table: str) -> None:
        """Logs the result of the experiment: few numbers of the report's ``metrics.json``, and ``table.md``."""

    def network(
        self,
        network: nn.Module,
        example: Any,
        info: DataInfo,
        name: str = "network",
        *,
        tags: Mapping[str, str] | None = None,
        classifies: bool = True,
    ) -> None:
        """Logs a model that classifies image files without autoslim and without the network's code.

        ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` accept the bytes of image files and return classes with
        their probabilities; ``mlflow.pytorch.load_model`` returns the network alone. For data of the user's own and for
        other tasks, both return the network alone; the former needs a single output tensor. A network with several
        inputs is not logged, which is reported.

        Args:
            network: it is not changed.
            example: a batch of its inputs, such as (N, C, H, W); the model accepts any batch size.
            info: description of the data that the network was trained on.
            name: name of the model. A run has one model of each name, and keeps the first one.
            tags: tags of the model, in addition to those of the run.
            classifies: whether the softmax of its output is the probability of each class.
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

    def summary(self, report: Mapping[str, Any], table: str) -> None:
        pass

    def network(
        self,
        network: nn.Module,
        example: Any,
        info: DataInfo,
        name: str = "network",
        *,
        tags: Mapping[str, str] | None = None,
        classifies: bool = True,
    ) -> None:
        pass


class MlflowTracker:
    """A run in an MLflow store. It uses a separate client and does not change MLflow's global state.

    Args:
        client: the store, or None if it cannot be reached; everything is then kept in the journal.
        experiment_id: id of the experiment.
        run_id: id of the run; None if the run is not in the store yet.
        resumed: whether the run was interrupted. Metrics that it has already are not logged again.
        journal: where events are kept if the store fails. Without it they are lost.
        parent: id of the experiment's run; None if the run belongs to none.
    """

    def __init__(
        self,
        client: MlflowClient | None,
        experiment_id: str,
        run_id: str | None,
        resumed: bool = False,
        journal: Journal | None = None,
        parent: str | None = None,
    ) -> None:
        self.run_id = run_id
        self._run = None if client is None or run_id is None else _Run(client, experiment_id, run_id, resumed, parent)
        self._journal = journal
        self._lost = self._run is None
        self._silent = False
        self._kept = self._lost  # whether the journal has events that the store has not received

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        numbers_ = {key: float(value) for key, value in values.items()}
        self._log({"do": "metrics", "values": numbers_, "step": step, "time": _now()})

    def tag(self, key: str, value: str) -> None:
        self._log({"do": "tag", "key": key, "value": _shortened(value, _LONGEST_TAG)})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._log({"do": "artifact", "path": str(path), "folder": folder})

    def summary(self, report: Mapping[str, Any], table: str) -> None:
        values = {"values": summary(report), "report": dict(report), "table": table}
        self._log({"do": "summary", **values, "time": _now()})

    def network(
        self,
        network: nn.Module,
        example: Any,
        info: DataInfo,
        name: str = "network",
        *,
        tags: Mapping[str, str] | None = None,
        classifies: bool = True,
    ) -> None:
        if self._lost and self._journal is None:
            return
        try:  # a network that cannot be exported does not mean that the store failed
            with tempfile.TemporaryDirectory() as folder:
                with _no_warnings(), redirect_stderr(io.StringIO()):  # torch.export prints the graph if it fails
                    _save_network(network, example, info, Path(folder, "model"), classifies)
                path = str(Path(folder, "model"))
                self._log({"do": "network", "path": path, "name": name, "tags": dict(tags or {})})
        except Exception as error:
            _warn(f"the network is not logged in MLflow, because it cannot be exported ({_in_one_line(error)})")

    def dataset(self, values: Mapping[str, str]) -> None:
        """Logs a data set (see ``experiment.dataset``) as an input of the experiment."""
        self._log({"do": "dataset", "values": dict(values)})

    def params(self, values: Mapping[str, object]) -> None:
        self._log({"do": "params", "values": _param_texts(values)})

    def close(self, error: BaseException | None = None) -> None:
        """Ends the run. If tracking failed, the run is tagged as incomplete and ended too."""
        status = _status(error)
        if error is not None and status != "FINISHED":
            self.tag("error", f"{type(error).__name__}: {_in_one_line(error)}")
        self._log({"do": "end", "status": status, "time": _now()})
        if self._lost and self._run is not None and not self._silent:
            with suppress(Exception), _no_warnings():
                self._run.send({"do": "tag", "key": _INCOMPLETE, "value": "incomplete"})
                self._run.send({"do": "end", "status": status, "time": _now()})
        if self._journal is not None:
            (self._journal.close if self._kept else self._journal.remove)()

    def _log(self, event: dict[str, Any]) -> None:
        """Sends an event. After the store has failed, events are kept."""
        if self._lost or self._run is None:
            self._keep(event)
            return
        try:
            with _no_warnings():
                self._run.send(event)
        except Exception as failure:
            self._lost = True
            next_step = f"the rest is {_KEPT}" if self._keep(event) else "this run continues untracked"
            _warn(f"MLflow failed; {next_step} ({_in_one_line(failure)})")
            with suppress(Exception):
                self._silent = not _answers(tracking_uri())

    def _keep(self, event: dict[str, Any]) -> bool:
        """Adds an event, with copies of its files, to the journal; returns whether it could be written."""
        if self._journal is None:
            return False
        try:
            if path := event.get("path"):
                event = event | {"path": _copied(Path(path), self._journal)}
            self._journal.append(event)
        except (OSError, UserError) as failure:
            if self._kept:
                _warn(f"what MLflow has not received can no longer be kept ({_in_one_line(failure)})")
                self._journal.close()
            else:
                self._journal.remove()
            self._journal = None
            return False
        self._kept = True
        return True


def _copied(path: Path, journal: Journal) -> str:
    """Copies a file or folder into the journal, because a later run may replace it; returns the relative path."""
    copy = Path(journal.new_path(), path.name)
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, journal.folder / copy)
    return str(copy)


class _Run:
    """Sends the events of a run to an MLflow store. Every method raises if the store fails."""

    def __init__(
        self, client: MlflowClient, experiment_id: str, run_id: str, resumed: bool, parent: str | None
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._id = run_id
        self._parent = parent
        self._resumed = resumed
        self._steps: dict[str, int] = {}  # of a resumed run: metric -> last step that is logged

    def send(self, event: Mapping[str, Any], folder: Path = Path()) -> None:
        """Sends an event; its paths are relative to ``folder``."""
        match event["do"]:
            case "metrics":
                self._send_metrics(event["values"], event["step"], event["time"])
            case "tag":
                self._client.set_tag(self._id, event["key"], event["value"])
            case "params":
                self._send_params(event["values"])
            case "artifact":
                path = folder / event["path"]
                log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
                log(self._id, str(path), event["folder"])
            case "network":
                self._send_model(folder / event["path"], event["name"], event.get("tags", {}))
            case "dataset" if self._parent is not None:
                self._send_dataset(self._parent, event["values"])
            case "summary" if self._parent is not None:
                self._send_summary(self._parent, event)
            case "resume":
                _resume(self._client, self._client.get_run(self._id))
            case "end":
                self._client.set_terminated(self._id, event["status"], event["time"])
                if self._parent is not None:
                    self._end_parent(self._parent, event["status"], event["time"])

    def _end_parent(self, parent: str, status: str, time_ms: int) -> None:
        """Gives the experiment's run the status of a stage's run that has ended."""
        tags = self._client.get_run(self._id).data.tags
        whole = tags.get("stage") == STAGES[-1]
        if status == "FINISHED" and not whole:
            self._client.update_run(parent, status=_WAITS)
            return
        if error := tags.get("error"):
            self._client.set_tag(parent, "error", error)
        self._client.set_terminated(parent, status, time_ms)

    def _send_dataset(self, parent: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        context = [InputTag("mlflow.data.context", "training, search and test")]
        self._client.log_inputs(parent, [DatasetInput(Dataset(**values), context)])

    def _send_summary(self, parent: str, event: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        values, report = event["values"], json.dumps(event["report"])
        self._client.log_batch(parent, [Metric(key, value, event["time"], 0) for key, value in values.items()])
        self._client.set_tag(parent, _NOTE, _shortened(event["table"], _LONGEST_TAG))
        if len(report) <= _LONGEST_TAG:  # `autoslim compare --all` reads it
            self._client.set_tag(parent, _REPORT, report)
        if supernet := self._client.get_run(self._id).data.tags.get("supernet"):
            self._client.set_tag(parent, "supernet", supernet)
        _show(self._client, self._experiment_id, values)

    def _send_metrics(self, values: Mapping[str, float], step: int | None, time_ms: int) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(key, value, time_ms, step or 0) for key, value in values.items() if not self._is_logged(key, step)
        ]
        if new:
            self._client.log_batch(self._id, new)
        if step is not None and self._resumed:
            self._steps |= {key: max(step, self._steps[key]) for key in values}

    def _is_logged(self, key: str, step: int | None) -> bool:
        """Returns whether the run has the metric at this step from before it was resumed."""
        if not self._resumed or step is None:
            return False
        if key not in self._steps:
            history = self._client.get_metric_history(self._id, key)
            self._steps[key] = max((metric.step for metric in history), default=-1)
        return step <= self._steps[key]

    def _send_params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        params = [Param(key, text) for key, text in values.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._id, params=params[start : start + _BATCH])

    def _send_model(self, folder: Path, name: str, tags: Mapping[str, str]) -> None:
        """Sends a model, or the rest of one that an earlier attempt began to send."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model

        run = self._client.get_run(self._id)
        own = f"source_run_id = '{self._id}' AND name = '{name}'"
        entity = next(iter(self._client.search_logged_models([self._experiment_id], own)), None)
        if entity is None:
            of_run = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
            entity = self._client.create_logged_model(
                self._experiment_id, name, self._id, tags={**of_run, **tags}, params=run.data.params
            )
        if entity.status == LoggedModelStatus.READY:
            return
        model = Model.load(str(folder))
        model.run_id, model.model_id, model.model_uuid = self._id, entity.model_id, entity.model_id
        model.artifact_path = entity.artifact_location
        model.save(str(folder / "MLmodel"))
        self._client.log_model_artifacts(entity.model_id, str(folder))
        if entity.model_id not in {each.model_id for each in (run.outputs.model_outputs if run.outputs else ())}:
            self._client.log_outputs(self._id, [LoggedModelOutput(entity.model_id, step=0)])
        self._client.finalize_logged_model(entity.model_id, "READY")  # last: such a model is not sent again


@contextmanager
def tracked(
    stage: str,
    *,
    run_name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    enabled: bool,
    experiment: str = "autoslim",
    run_file: Path | None = None,
    parent: Experiment | None = None,
    data: Mapping[str, str] | None = None,
) -> Iterator[Tracker]:
    """Tracks the ``with`` block as one MLflow run.

    An exception marks the run as failed and an interrupt marks it as killed; both propagate.

    Args:
        stage: name of the stage, which is logged as a tag.
        run_name: name of the run.
        params: logged parameters. Nested values get dotted keys.
        tags: tags such as budget, method and ``supernet`` (see ``fingerprint``). The commit and the DVC experiment are
            added.
        enabled: whether to track the run.
        experiment: name of the MLflow experiment.
        run_file: a file for the id of the run, next to the checkpoints of what is tracked. If it names a run that was
            interrupted, the block continues that run: an interrupted training is one run.
        parent: the experiment whose run is above this one; None for none.
        data: the experiment's data set (see ``experiment.dataset``).
    """
    all_tags = {"stage": stage, **origin(), **tags}
    tracker = _start(experiment, run_name, all_tags, params, run_file, parent) if enabled else None
    if tracker is None:
        yield NullTracker()
        return
    if data is not None:
        tracker.dataset(data)
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
    run_file: Path | None = None,
) -> Iterator[Tracker]:
    """Tracks the ``with`` block as the run of a stage (see ``tracked``), with the settings that all stages share.

    Args:
        params: all parameters.
        stage: the stage's name.
        sections: sections of ``params`` that are logged as parameters.
        details: further parameters.
        tags: tags in addition to the data source and the task.
        rank_zero: whether this process is rank 0; other ranks track nothing.
        run_file: see ``tracked``.
    """
    logged = {name: getattr(params, name).model_dump() for name in sections}
    with tracked(
        stage,
        run_name=run_name,
        params=logged | dict(details or {}),
        tags={"source": params.data.source, "task": params.task, **(tags or {})},
        enabled=params.tracking.enabled and rank_zero,
        experiment=params.tracking.experiment,
        run_file=run_file,
        parent=Experiment.of(params),
        data=_prepared_data() if params.tracking.enabled and rank_zero and stage != STAGES[0] else None,
    ) as tracker:
        yield tracker


def _prepared_data() -> dict[str, str] | None:
    """Returns a description of the prepared data; None if there are none."""
    from autoslim.data.prepared import read_info

    try:
        return dataset(read_info(PREPARED))
    except UserError:  # the stage reports it, if it needs them
        return None


def tracking_uri() -> str:
    """Returns ``MLFLOW_TRACKING_URI`` if it is set, else the SQLite file ``mlflow.db`` in the repository's root."""
    path = str(repository_root() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def view_address() -> str:
    """Returns the address at which ``mlflow ui``, or the server in use, shows one line for each experiment.

    Raises:
        UserError: nothing has been tracked yet, or the store cannot be used.
    """
    client, found = _opened()
    if client is None or found is None:
        raise UserError("MLflow has no experiments yet; run `dvc repro`")
    uri = tracking_uri()
    server = uri.rstrip("/") if urlsplit(uri).scheme in ("http", "https") else "http://127.0.0.1:5000"
    return _redacted(f"{server}/#/experiments/{found.experiment_id}/runs?viewStateShareKey={VIEW}")


def experiment_runs() -> list[dict[str, Any]]:
    """Returns name, parameters and report (None without one) of the experiments in MLflow, oldest first.

    Raises:
        UserError: the store cannot be used.
    """
    client, found = _opened()
    if client is None or found is None:
        return []
    runs: list[Run] = []
    token = None
    with _no_warnings():
        while True:
            page = client.search_runs(
                [found.experiment_id],
                f"tags.stage = '{EXPERIMENT}'",
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += page
            if not (token := page.token):
                break
    return [
        {
            "name": run.info.run_name,
            "params": run.data.params,
            "report": parse_json(text) if (text := run.data.tags.get(_REPORT)) else None,
            "status": run.info.status.lower(),
        }
        for run in runs
    ]


def _opened() -> tuple[MlflowClient | None, Any]:
    """Returns a client and the project's experiment; None for each that does not exist.

    Raises:
        UserError: the store cannot be used.
    """
    from autoslim.pipeline.params import load_params

    name = load_params().tracking.experiment
    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).exists():
        return None, None
    _prepare_mlflow()
    try:
        if not _answers(uri):
            raise ConnectionError("the server does not answer")
        with _no_warnings():
            client = _connect(uri)
            return client, client.get_experiment_by_name(name)
    except Exception as failure:
        message = f"MLflow at {uri} cannot be used ({_in_one_line(failure)}); correct MLFLOW_TRACKING_URI, or try later"
        raise UserError(_redacted(message)) from failure


def fingerprint(weights: Path) -> str:
    """Returns the first 12 hex digits of a file's SHA-256.

    The tag ``supernet`` is the fingerprint of the supernet's weights, on the run that trained it and on all runs that
    use it. The filter ``tags.supernet = "…"`` selects all of them, so no run ids have to be stored.
    """
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def lineage(weights: Path) -> dict[str, str]:
    """Returns the tag ``supernet`` of a run that uses these weights; an empty dict if there are none."""
    from autoslim.training.checkpoints import has_weights

    with contextlib.suppress(UserError):  # there is no file, or it is damaged
        if has_weights(weights):
            return {"supernet": fingerprint(weights)}
    return {}


def origin() -> dict[str, str]:
    """Returns tags with the commit and the DVC experiment of this process, if they are known.

    The commit of an experiment is the one that it starts from. The suffix ``-dirty`` means that tracked files differ
    from the commit; ``dvc.lock`` is ignored, because DVC rewrites it between stages.
    """
    commit = os.environ.get("DVC_EXP_BASELINE_REV") or _git("rev-parse", "HEAD")
    tags = {"dvc_experiment": os.environ.get("DVC_EXP_NAME", "")}
    if commit:
        dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)dvc.lock")
        tags |= {"mlflow.source.git.commit": commit, "commit": commit[:10] + ("-dirty" if dirty else "")}
    return {key: value for key, value in tags.items() if value}


def flattened(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Flattens nested values to dotted keys, such as ``{"search.stop": "0.2"}``; all but strings become JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def logged_model_name(params: Params, budget: str, method: str) -> str:
    """Returns the name of the logged model of a method's network (see ``experiment.model_name``)."""
    return model_name(network_name(params.model.name), budget, method)


def _start(
    experiment: str,
    run_name: str,
    tags: Mapping[str, str],
    params: Mapping[str, object],
    run_file: Path | None,
    parent: Experiment | None = None,
) -> MlflowTracker | None:
    """Starts or continues a run. If the store cannot be used, this is a warning, and the run is kept.

    Returns None if it cannot be kept either.
    """
    _prepare_mlflow()
    uri = tracking_uri()
    source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    all_tags = {"mlflow.user": _user(), **source, **tags}
    header: dict[str, Any] = {
        "experiment": experiment,
        "run_name": run_name,
        "time": _now(),
        "tags": {key: _shortened(value, _LONGEST_TAG) for key, value in all_tags.items()},
        "params": _param_texts(params),
        "run_id": None,
        "run_file": None if run_file is None else str(run_file),
        "parent": None if parent is None else parent.to_dict(),
        "made_by": _digest({"uri": uri, "experiment": experiment, "params": flattened(params)}),
    }
    try:
        if not _answers(uri):
            raise ConnectionError(f"the server does not answer; it is asked again after {_SILENCE_S / 60:.0f} minutes")
        with _no_warnings():
            client = _connect(uri)
            experiment_id = _experiment_id(client, uri, experiment)
            _report(*_send_journals(client, uri))
            run_id = _interrupted(client, run_file, header["made_by"])
            resumed = run_id is not None
            if run_id is None:
                run_id = _create_run(client, experiment_id, header)
            else:
                for key, value in header["tags"].items():
                    client.set_tag(run_id, key, value)
            parent_id = _parent_of(client, run_id)
            if resumed and parent_id is not None:
                _resume(client, client.get_run(parent_id))
    except Exception as failure:
        journal = _continued_journal(header, run_file)
        next_step = "is not tracked" if journal is None else f"is {_KEPT}"
        _warn(f"MLflow at {uri} cannot be used; this run {next_step} ({_in_one_line(failure)})")
        return None if journal is None else MlflowTracker(None, "", None, journal=journal)
    journal = _new_journal(header | {"run_id": run_id})
    if not resumed:
        _write_run_file(run_file, run_id, journal, header["made_by"])
    tracker = MlflowTracker(client, experiment_id, run_id, resumed, journal, parent_id)
    if not resumed:
        tracker.params(params)
    return tracker


def _prepare_mlflow() -> None:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for logger in ("alembic", "urllib3.connectionpool"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # prints tracebacks of a full disk


def _create_run(client: MlflowClient, experiment_id: str, header: Mapping[str, Any]) -> str:
    """Creates the run of a stage, below the run of its experiment if it belongs to one."""
    tags = dict(header["tags"])
    if header.get("parent"):
        tags[_PARENT] = _experiment_run(client, experiment_id, header)
    run = client.create_run(experiment_id, header["time"], tags, header["run_name"])
    return str(run.info.run_id)


def _experiment_run(client: MlflowClient, experiment_id: str, header: Mapping[str, Any]) -> str:
    """Returns the run of the experiment that a stage belongs to, which is running from now on.

    It is the latest one with the same parameters. If that one has ended with its report, a stage before the report
    starts another one: DVC runs a stage again only if something else has changed, such as the code.
    """
    parent, tags = header["parent"], header["tags"]
    same_key = f"tags.{_KEY} = '{parent['key']}'"
    # These two are of the stage's process, so that an experiment that was continued has those of the last one.
    shared = {key: tags[key] for key in _ORIGIN if key in tags}
    with _one_at_a_time():
        latest = client.search_runs([experiment_id], same_key, max_results=1, order_by=["attributes.start_time DESC"])
        if latest and (latest[0].info.status != "FINISHED" or tags.get("stage") == STAGES[-1]):
            run_id = str(latest[0].info.run_id)
            _resume(client, latest[0])
            for key, value in shared.items():
                client.set_tag(run_id, key, value)
            return run_id
        own = {"stage": EXPERIMENT, _KEY: parent["key"], **parent["tags"]}
        own = {key: _shortened(value, _LONGEST_TAG) for key, value in own.items()}
        run = client.create_run(experiment_id, header["time"], own | shared, parent["name"])
    run_id = str(run.info.run_id)
    _Run(client, experiment_id, run_id, False, None).send({"do": "params", "values": _param_texts(parent["params"])})
    _show(client, experiment_id, ())
    return run_id


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two stages of this repository that start together must not both create the run of their experiment."""
    from filelock import FileLock

    folder = repository_root() / ".dvc"
    if not folder.is_dir():
        yield
        return
    (folder / "tmp").mkdir(exist_ok=True)
    with FileLock(folder / "tmp" / "mlflow-experiment.lock", timeout=300):
        yield


def _parent_of(client: MlflowClient, run_id: str) -> str | None:
    """Returns the run above a run; None if there is none, or if the user has deleted it."""
    parent = client.get_run(run_id).data.tags.get(_PARENT)
    if parent is None or client.get_run(parent).info.lifecycle_stage != "active":
        return None
    return str(parent)


def _show(client: MlflowClient, experiment_id: str, metrics: Iterable[str]) -> None:
    """Adds columns for these metrics to the view of MLflow's UI that ``view_address`` opens."""
    tag = f"mlflow.sharedViewState.{VIEW}"
    before = client.get_experiment(experiment_id).tags.get(tag, "")
    state = view(metrics, before)
    if state != before and len(state) <= _LONGEST_EXPERIMENT_TAG:
        client.set_experiment_tag(experiment_id, tag, state)


def _interrupted(client: MlflowClient, run_file: Path | None, made_by: str) -> str | None:
    """Returns the run that ``run_file`` names, which is running again; None if there is none that can be continued."""
    run_id = _read_run_file(run_file, made_by).get("run_id")
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except Exception:  # a run that was deleted
        return None
    if run.info.lifecycle_stage != "active":
        return None
    _resume(client, run)
    return str(run_id)


def _resume(client: MlflowClient, run: Run) -> None:
    client.update_run(run.info.run_id, status="RUNNING")
    if "error" in run.data.tags:
        client.delete_tag(run.info.run_id, "error")


def _read_run_file(run_file: Path | None, made_by: str) -> dict[str, Any]:
    """Returns the content of the file; empty if there is none, if it is damaged, or if it belongs to another run."""
    try:
        content = {} if run_file is None else parse_json(run_file.read_text(encoding="utf-8"))
        return content if content.get("made_by") == made_by else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_run_file(run_file: Path | None, run_id: str | None, journal: Journal | None, made_by: str) -> None:
    """Names the run, or the journal of a run that the store does not have, for ``_read_run_file``."""
    if run_file is not None:
        with suppress(OSError, UserError):  # the disk is full: a later run is a new one
            name = None if journal is None else journal.folder.name
            write_json(run_file, {"run_id": run_id, "journal": name, "made_by": made_by})


def _new_journal(header: Mapping[str, Any]) -> Journal | None:
    try:
        return Journal.start(header)
    except (OSError, UserError):
        return None


def _continued_journal(header: dict[str, Any], run_file: Path | None) -> Journal | None:
    """Returns a journal that continues the interrupted run that ``run_file`` names, or else a new one."""
    before = _read_run_file(run_file, header["made_by"])
    name = Path(str(before.get("journal"))).name  # no other folder, whatever the file contains
    journal = Journal.open(unsent_folder() / name)
    if journal is None:
        journal = _new_journal(header | {"run_id": before.get("run_id")})
    if journal is not None and before:
        try:
            journal.events()  # removes a line that was not completed
            journal.append({"do": "resume"})
        except (OSError, UserError):
            journal.close()
            return None
    if journal is not None:
        _write_run_file(run_file, before.get("run_id"), journal, header["made_by"])
    return journal


def send_unsent() -> tuple[int, list[str]]:
    """Sends what MLflow has not received (see ``unsent``), also to a server that did not answer before.

    Returns:
        The number of runs that were sent, and a line for each run that was not.

    Raises:
        UserError: the store cannot be used.
    """
    if not any(unsent_folder().glob("[0-9]*")):
        return 0, []
    _prepare_mlflow()
    uri = tracking_uri()
    try:
        if not _answers(uri, ask_again=True):
            raise ConnectionError("the server does not answer")
        with _no_warnings():
            return _send_journals(_connect(uri), uri)
    except Exception as failure:
        message = f"MLflow at {uri} cannot be used ({_in_one_line(failure)}); correct MLFLOW_TRACKING_URI, or try later"
        raise UserError(_redacted(message)) from failure


def _send_journals(client: MlflowClient, uri: str) -> tuple[int, list[str]]:
    """Sends the journals of processes that have ended, until the store no longer answers.

    Returns:
        The number of runs that were sent, and a line for each run that was not.
    """
    from mlflow.exceptions import MlflowException

    sent, failed = 0, list[str]()
    for journal in unsent_journals():
        try:
            sent += _send_journal(client, uri, journal)
            journal.remove()
        except Exception as failure:
            journal.close()
            failed.append(
                f"a run is still kept in {journal.folder}, because it cannot be sent ({_in_one_line(failure)})"
            )
            if not isinstance(failure, MlflowException) or failure.get_http_status_code() >= 500:
                break
    return sent, failed


def _send_journal(client: MlflowClient, uri: str, journal: Journal) -> bool:
    """Sends a journal to its run, which is created if it does not exist, and ends the run if its process was killed.

    Returns whether there was anything to send.
    """
    header, *events = journal.events() or [{}]
    if not header:
        return False
    created = [event["run_id"] for event in events if event["do"] == "created"]  # by an attempt that failed later
    events = [event for event in events if event["do"] != "created"]
    run_id = created[0] if created else header["run_id"]
    if run_id is None:
        run_id = _create_run(client, _experiment_id(client, uri, header["experiment"]), header)
        journal.append({"do": "created", "run_id": run_id})
        run_file = None if header["run_file"] is None else Path(header["run_file"])
        if _read_run_file(run_file, header["made_by"]).get("journal") == journal.folder.name:
            _write_run_file(run_file, run_id, None, header["made_by"])
    run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":  # the user has deleted it
        return False
    sender = _Run(client, run.info.experiment_id, run_id, True, _parent_of(client, run_id))
    sender.send({"do": "params", "values": header["params"]})
    for event in events:
        sender.send(event, journal.folder)
    if run.info.status == "RUNNING" and (not events or events[-1]["do"] != "end"):
        sender.send({"do": "end", "status": "KILLED", "time": (events or [header])[-1].get("time", _now())})
    if _INCOMPLETE in run.data.tags:
        client.delete_tag(run_id, _INCOMPLETE)
    return bool(events) or header["run_id"] is None


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _answers(uri: str, ask_again: bool = False) -> bool:
    """Returns whether a server answers within ``_ANSWER_S``; True if ``uri`` is not one of a server.

    A server that accepts a connection and never answers would delay every call by minutes. This is remembered in DVC's
    temporary folder, so that the next stages do not ask it again unless ``ask_again``. If the connection fails at once,
    MLflow reports why.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return True
    folder = repository_root() / ".dvc" / "tmp"
    silent = folder / f"mlflow-silent-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"
    with suppress(OSError):
        if not ask_again and 0 <= time.time() - silent.stat().st_mtime < _SILENCE_S:
            return False
    try:
        urlopen(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", timeout=_ANSWER_S).close()
    except (OSError, HTTPException) as error:
        if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
            if folder.parent.is_dir():
                with suppress(OSError):
                    folder.mkdir(exist_ok=True)
                    silent.touch()
            return False
    with suppress(OSError):
        silent.unlink(missing_ok=True)
    return True


def _user() -> str:
    """Returns the user's name, or the user id if the user has no name (in containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter since Python 3.13
        return str(os.getuid())


def _connect(uri: str) -> MlflowClient:
    """Returns a client of the store at ``uri``. If it is a database, its tables are created if they do not exist."""
    from mlflow import MlflowClient

    if not _is_database(uri):
        return MlflowClient(uri)
    import sqlalchemy
    from filelock import FileLock

    lock: Any = nullcontext()
    file = sqlalchemy.make_url(uri).database if uri.startswith("sqlite") else None
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        # Seconds to wait while another stage writes; SQLite's default of 5 is too short.
        uri += "" if "?" in uri else "?timeout=60"
        lock = FileLock(f"{file}.lock", timeout=300)  # two stages must not both create the tables
    with lock:
        if file and not Path(file).exists():
            _create_store(uri, Path(file))
        engine = sqlalchemy.create_engine(uri)  # MLflow retries for two minutes; a single query fails fast
        sqlalchemy.inspect(engine)
        engine.dispose()
        return MlflowClient(uri)


def _create_store(uri: str, file: Path) -> None:
    """Creates MLflow's tables in a new SQLite file, all or none.

    This takes seconds, and MLflow can neither use nor complete a file in which a killed process created some of them.
    """
    import sqlalchemy
    from mlflow import MlflowClient

    def write(temporary: Path) -> None:
        for rest in (temporary, temporary.with_name(f"{temporary.name}-journal")):  # of a killed process
            rest.unlink(missing_ok=True)
        url = sqlalchemy.make_url(uri).set(database=str(temporary))
        MlflowClient(url.render_as_string(hide_password=False))

    write_atomically(file, write)


def _is_database(uri: str) -> bool:
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def artifact_folder(experiment: str) -> Path:
    """Returns the folder of an experiment's files: below ``mlartifacts`` for every name, such as ``..``."""
    return repository_root() / "mlartifacts" / (re.sub(r"[^\w.-]+", "-", experiment).lstrip(".") or "-")


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """Returns the id of an experiment, which is created if it does not exist."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server, MLflow's default is under the working directory, which DVC may delete.
        artifacts = artifact_folder(name).as_uri() if _is_database(uri) else None
        try:
            kind = {"mlflow.experimentKind": "custom_model_development"}  # otherwise MLflow's UI opens on chat traces
            return client.create_experiment(name, artifact_location=artifacts, tags=kind)
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another process may have created it
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ValueError(f"experiment {name} was deleted; restore it or choose another name")
    return str(experiment.experiment_id)


def _save_network(network: nn.Module, example: Any, info: DataInfo, folder: Path, classifies: bool) -> None:
    """Writes ``network`` as an MLflow model of two flavors, for the CPU.

    Without ``info.mean`` or the classes, or if it does not classify, the model has the second flavor only.

    ``python_function`` classifies image files with the code that is copied into the model. ``pytorch`` is the network
    alone, a graph of torch operators in evaluation mode: a pickled network could only be loaded with the code of its
    class.

    Raises:
        UserError: the network has several inputs.
    """
    import mlflow.pyfunc
    import pandas as pd
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Map

    from autoslim.export.formats import description
    from autoslim.export.served import PACKAGE, copy_code

    if not isinstance(example, torch.Tensor):
        raise UserError(f"a logged model needs a single input tensor, but the inputs are a {type(example).__name__}")
    requirements = [f"{name}=={version(name)}" for name in ("torch", "numpy", "pandas", "pillow")]
    requirements = [requirement.partition("+")[0] for requirement in requirements]  # of CPU-only torch
    if not (classifies and info.mean and info.classes):  # data of the user's own are not image files
        _save_graph(network, example, folder, requirements)
        return
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch, "plain")
        _save_graph(network, example, plain, requirements)
        (plain / "data" / "autoslim.json").write_text(json.dumps(description(info)), encoding="utf-8")
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=f"{PACKAGE}.served",
            data_path=str(plain / "data"),
            code_paths=[str(copy_code(Path(scratch)))],
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, "image")]),
                Schema(
                    [
                        ColSpec(DataType.string, "class"),
                        ColSpec(DataType.double, "probability"),
                        ColSpec(Map(DataType.double), "probabilities"),
                    ]
                ),
                ParamSchema([ParamSpec("top", DataType.long, 5)]),
            ),
            input_example=pd.DataFrame({"image": [_png(example[0], info)]}),
            pip_requirements=requirements,  # set, so that MLflow does not infer them
        )
        model, graph = Model.load(str(folder)), Model.load(str(plain)).flavors["pytorch"]
        model.add_flavor("pytorch", **{**graph, "model_data": model.flavors["python_function"]["data"], "code": "code"})
        model.save(str(folder / "MLmodel"))


def _save_graph(network: nn.Module, example: Tensor, folder: Path, requirements: list[str]) -> None:
    """Writes ``network`` as an MLflow model of the flavor ``pytorch``, in float32 and for any batch size."""
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    plain = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
    # Two images: torch.export treats a size of one as a constant.
    images = (example[:2] if len(example) > 1 else torch.cat([example, example])).detach().to("cpu", torch.float32)
    # Only the signature of the input makes the batch size dynamic.
    signature = ModelSignature(Schema([TensorSpec(np.dtype(np.float32), (-1, *images.shape[1:]))]))
    mlflow.pytorch.save_model(
        plain,
        str(folder),
        serialization_format="pt2",
        signature=signature,
        input_example=images.contiguous().numpy(),
        pip_requirements=requirements,
    )
    model = Model.load(str(folder))
    # An exported graph cannot change its device. Without this setting MLflow would try to move it to CUDA, and fail.
    model.flavors["python_function"]["config"] = {"device": "cpu"}
    model.save(str(folder / "MLmodel"))


def _png(image: Tensor, info: DataInfo) -> bytes:
    """Returns a normalised image (C, H, W) as the contents of a PNG file."""
    import numpy as np
    from PIL import Image

    mean, std = (np.array(values)[:, None, None] for values in (info.mean, info.std))
    pixels = np.rint((image.detach().cpu().numpy() * std + mean) * 255).clip(0, 255).astype(np.uint8)  # (C, H, W)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


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
    """Returns the output of a git command in the working directory; empty if it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _shortened(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def _in_one_line(error: BaseException) -> str:
    return _shortened(first_line(error), 200)


def _warn(message: str) -> None:
    print(f"warning: {_redacted(message)}", file=sys.stderr)


def _redacted(message: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", message)  # user name and password in a URI


def _report(sent: int, failed: Sequence[str]) -> None:
    if sent:
        print(f"MLflow: received {sent} {'run' if sent == 1 else 'runs'} kept in checkpoints/mlflow", file=sys.stderr)
    for line in failed:
        _warn(line)


def _param_texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key: _shortened(text, _LONGEST_PARAM) for key, text in flattened(values).items()}


def _now() -> int:
    return int(time.time() * 1000)  # ms
