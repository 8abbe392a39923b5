"""Tracks a stage, or any other block, as one MLflow run."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoslim.errors import UserError
from autoslim.pipeline.experiment import Experiment, dataset, model_name, network_name, shortened
from autoslim.pipeline.project import PREPARED, STAGES
from autoslim.pipeline.tracking.kept import send_journals
from autoslim.pipeline.tracking.run_file import continued_journal, interrupted, new_journal, write_run_file
from autoslim.pipeline.tracking.sender import LONGEST_TAG, create_run, now, param_texts, parent_of, resume
from autoslim.pipeline.tracking.store import (
    SILENCE_S,
    answers,
    connect,
    id_of_experiment,
    in_one_line,
    no_warnings,
    prepare_mlflow,
    tracking_uri,
    warn,
)
from autoslim.pipeline.tracking.tags import flattened, origin
from autoslim.pipeline.tracking.tracker import KEPT, MlflowTracker, NullTracker, Tracker

if TYPE_CHECKING:
    from autoslim.pipeline.params import Params


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
    prepare_mlflow()
    uri = tracking_uri()
    source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
    all_tags = {"mlflow.user": _user(), **source, **tags}
    header: dict[str, Any] = {
        "experiment": experiment,
        "run_name": run_name,
        "time": now(),
        "tags": {key: shortened(value, LONGEST_TAG) for key, value in all_tags.items()},
        "params": param_texts(params),
        "run_id": None,
        "run_file": None if run_file is None else str(run_file),
        "parent": None if parent is None else parent.to_dict(),
        "made_by": _digest({"uri": uri, "experiment": experiment, "params": flattened(params)}),
    }
    try:
        if not answers(uri):
            raise ConnectionError(f"the server does not answer; it is asked again after {SILENCE_S / 60:.0f} minutes")
        with no_warnings():
            client = connect(uri)
            experiment_id = id_of_experiment(client, uri, experiment)
            _report(*send_journals(client, uri))
            run_id = interrupted(client, run_file, header["made_by"])
            resumed = run_id is not None
            if run_id is None:
                run_id = create_run(client, experiment_id, header)
            else:
                for key, value in header["tags"].items():
                    client.set_tag(run_id, key, value)
            parent_id = parent_of(client, run_id)
            if resumed and parent_id is not None:
                resume(client, client.get_run(parent_id))
    except Exception as failure:
        journal = continued_journal(header, run_file)
        next_step = "is not tracked" if journal is None else f"is {KEPT}"
        warn(f"MLflow at {uri} cannot be used; this run {next_step} ({in_one_line(failure)})")
        return None if journal is None else MlflowTracker(None, "", None, journal=journal)
    journal = new_journal(header | {"run_id": run_id})
    if not resumed:
        write_run_file(run_file, run_id, journal, header["made_by"])
    tracker = MlflowTracker(client, experiment_id, run_id, resumed, journal, parent_id)
    if not resumed:
        tracker.params(params)
    return tracker


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _user() -> str:
    """Returns the user's name, or the user id if the user has no name (in containers)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the latter since Python 3.13
        return str(os.getuid())


def _report(sent: int, failed: Sequence[str]) -> None:
    if sent:
        print(f"MLflow: received {sent} {'run' if sent == 1 else 'runs'} kept in checkpoints/mlflow", file=sys.stderr)
    for line in failed:
        warn(line)
