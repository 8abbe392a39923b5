"""Sends the journals of what MLflow has not received."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoslim.pipeline.tracking.run_file import read_run_file, write_run_file
from autoslim.pipeline.tracking.sender import INCOMPLETE, Sender, create_run, now, parent_of
from autoslim.pipeline.tracking.store import (
    id_of_experiment,
    in_one_line,
    tracking_uri,
    usable_store,
)
from autoslim.pipeline.unsent import Journal, unsent_folder, unsent_journals

if TYPE_CHECKING:
    from mlflow import MlflowClient


def send_unsent() -> tuple[int, list[str]]:
    """Sends what MLflow has not received (see ``unsent``), also to a server that did not answer before.

    Returns:
        The number of runs that were sent, and a line for each run that was not.

    Raises:
        UserError: the store cannot be used.
    """
    if not any(unsent_folder().glob("[0-9]*")):
        return 0, []
    with usable_store(ask_again=True) as client:
        return send_journals(client, tracking_uri())


def send_journals(client: MlflowClient, uri: str) -> tuple[int, list[str]]:
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
                f"a run is still kept in {journal.folder}, because it cannot be sent ({in_one_line(failure)})"
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
        run_id = create_run(client, id_of_experiment(client, uri, header["experiment"]), header)
        journal.append({"do": "created", "run_id": run_id})
        run_file = None if header["run_file"] is None else Path(header["run_file"])
        if read_run_file(run_file, header["made_by"]).get("journal") == journal.folder.name:
            write_run_file(run_file, run_id, None, header["made_by"])
    run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":  # the user has deleted it
        return False
    sender = Sender(client, run.info.experiment_id, run_id, True, parent_of(client, run_id))
    sender.send({"do": "params", "values": header["params"]})
    for event in events:
        sender.send(event, journal.folder)
    if run.info.status == "RUNNING" and (not events or events[-1]["do"] != "end"):
        sender.send({"do": "end", "status": "KILLED", "time": (events or [header])[-1].get("time", now())})
    if INCOMPLETE in run.data.tags:
        client.delete_tag(run_id, INCOMPLETE)
    return bool(events) or header["run_id"] is None
