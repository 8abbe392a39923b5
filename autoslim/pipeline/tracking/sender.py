"""Sends the events of a stage's run, and creates the runs of stages and experiments."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoslim.pipeline.experiment import EXPERIMENT, VIEW, shortened, view
from autoslim.pipeline.project import STAGES
from autoslim.pipeline.tracking.store import one_at_a_time
from autoslim.pipeline.tracking.tags import flattened

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


_LONGEST_PARAM = 6000  # characters; MLflow's limits
LONGEST_TAG = 8000
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
REPORT = "report"  # tag of an experiment's run: the report's metrics.json
_WAITS = "SCHEDULED"  # status of an experiment's run between two stages
INCOMPLETE = "tracking"  # tag of a run that has not received everything


class Sender:
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
                resume(self._client, self._client.get_run(self._id))
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
        self._client.set_tag(parent, _NOTE, shortened(event["table"], LONGEST_TAG))
        if len(report) <= LONGEST_TAG:  # `autoslim compare --all` reads it
            self._client.set_tag(parent, REPORT, report)
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


def create_run(client: MlflowClient, experiment_id: str, header: Mapping[str, Any]) -> str:
    """Creates the run of a stage, below the run of its experiment if it belongs to one."""
    tags = dict(header["tags"])
    if header.get("parent"):
        tags[_PARENT] = _experiment_run(client, experiment_id, header)
    run = client.create_run(experiment_id, header["time"], tags, header["run_name"])
    return str(run.info.run_id)


def _experiment_run(client: MlflowClient, experiment_id: str, header: Mapping[str, Any]) -> str:
    """Returns the run of the experiment that a stage belongs to, which is running from now on.

    It is the one with the same parameters that has not ended with its report. If all have, the report belongs to the
    latest one, and a stage before the report starts another one: DVC runs a stage again only if something else has
    changed, such as the code. Start times are the last resort, because the clock may have been set back.
    """
    parent, tags = header["parent"], header["tags"]
    same_key = f"tags.{_KEY} = '{parent['key']}'"
    # These two are of the stage's process, so that an experiment that was continued has those of the last one.
    shared = {key: tags[key] for key in _ORIGIN if key in tags}
    with one_at_a_time(client.tracking_uri):  # two stages that start together must not both create it
        for query in (f"{same_key} AND attributes.status != 'FINISHED'", same_key):
            latest = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time DESC"])
            if latest:
                break
        if latest and (latest[0].info.status != "FINISHED" or tags.get("stage") == STAGES[-1]):
            run_id = str(latest[0].info.run_id)
            resume(client, latest[0])
            for key, value in shared.items():
                client.set_tag(run_id, key, value)
            return run_id
        own = {"stage": EXPERIMENT, _KEY: parent["key"], **parent["tags"]}
        own = {key: shortened(value, LONGEST_TAG) for key, value in own.items()}
        run = client.create_run(experiment_id, header["time"], own | shared, parent["name"])
    run_id = str(run.info.run_id)
    Sender(client, experiment_id, run_id, False, None).send({"do": "params", "values": param_texts(parent["params"])})
    _show(client, experiment_id, ())
    return run_id


def parent_of(client: MlflowClient, run_id: str) -> str | None:
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


def resume(client: MlflowClient, run: Run) -> None:
    client.update_run(run.info.run_id, status="RUNNING")
    if "error" in run.data.tags:
        client.delete_tag(run.info.run_id, "error")


def param_texts(values: Mapping[str, object]) -> dict[str, str]:
    return {key: shortened(text, _LONGEST_PARAM) for key, text in flattened(values).items()}


def now() -> int:
    return int(time.time() * 1000)  # ms
