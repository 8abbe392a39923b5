"""What a stage logs with: a run in MLflow that keeps what the store does not receive, or nothing."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoslim.errors import UserError
from autoslim.pipeline.experiment import shortened, summary
from autoslim.pipeline.tracking.logged_network import save_network
from autoslim.pipeline.tracking.sender import INCOMPLETE, LONGEST_TAG, Sender, now, param_texts
from autoslim.pipeline.tracking.store import answers, in_one_line, no_warnings, tracking_uri, warn
from autoslim.pipeline.unsent import Journal

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from torch import nn

    from autoslim.data.prepared import DataInfo


KEPT = "kept in checkpoints/mlflow, and sent by the next stage that reaches MLflow, or by `autoslim sync`"


class Tracker:
    """Logs a stage's run. No method raises if the store fails. In this class, the methods do nothing.

    Attributes:
        run_id: MLflow's id of the run, or None if nothing is tracked.
    """

    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers at ``step`` (an epoch or a slimming step), or for the whole run."""

    def tag(self, key: str, value: str) -> None:
        """Sets a tag of the run."""

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


class NullTracker(Tracker):
    """Tracks nothing."""


class MlflowTracker(Tracker):
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
        self._run = None if client is None or run_id is None else Sender(client, experiment_id, run_id, resumed, parent)
        self._journal = journal
        self._lost = self._run is None
        self._silent = False
        self._kept = self._lost  # whether the journal has events that the store has not received

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        numbers_ = {key: float(value) for key, value in values.items()}
        self._log({"do": "metrics", "values": numbers_, "step": step, "time": now()})

    def tag(self, key: str, value: str) -> None:
        self._log({"do": "tag", "key": key, "value": shortened(value, LONGEST_TAG)})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._log({"do": "artifact", "path": str(path), "folder": folder})

    def summary(self, report: Mapping[str, Any], table: str) -> None:
        values = {"values": summary(report), "report": dict(report), "table": table}
        self._log({"do": "summary", **values, "time": now()})

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
                with no_warnings(), redirect_stderr(io.StringIO()):  # torch.export prints the graph if it fails
                    save_network(network, example, info, Path(folder, "model"), classifies)
                path = str(Path(folder, "model"))
                self._log({"do": "network", "path": path, "name": name, "tags": dict(tags or {})})
        except Exception as error:
            warn(f"the network is not logged in MLflow, because it cannot be exported ({in_one_line(error)})")

    def dataset(self, values: Mapping[str, str]) -> None:
        """Logs a data set (see ``experiment.dataset``) as an input of the experiment."""
        self._log({"do": "dataset", "values": dict(values)})

    def params(self, values: Mapping[str, object]) -> None:
        self._log({"do": "params", "values": param_texts(values)})

    def close(self, error: BaseException | None = None) -> None:
        """Ends the run. If tracking failed, the run is tagged as incomplete and ended too."""
        status = _status(error)
        if error is not None and status != "FINISHED":
            self.tag("error", f"{type(error).__name__}: {in_one_line(error)}")
        self._log({"do": "end", "status": status, "time": now()})
        if self._lost and self._run is not None and not self._silent:
            with suppress(Exception), no_warnings():
                self._run.send({"do": "tag", "key": INCOMPLETE, "value": "incomplete"})
                self._run.send({"do": "end", "status": status, "time": now()})
        if self._journal is not None:
            (self._journal.close if self._kept else self._journal.remove)()

    def _log(self, event: dict[str, Any]) -> None:
        """Sends an event. After the store has failed, events are kept."""
        if self._lost or self._run is None:
            self._keep(event)
            return
        try:
            with no_warnings():
                self._run.send(event)
        except Exception as failure:
            self._lost = True
            next_step = f"the rest is {KEPT}" if self._keep(event) else "this run continues untracked"
            warn(f"MLflow failed; {next_step} ({in_one_line(failure)})")
            with suppress(Exception):
                self._silent = not answers(tracking_uri())

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
                warn(f"what MLflow has not received can no longer be kept ({in_one_line(failure)})")
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


def _status(error: BaseException | None) -> str:
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
