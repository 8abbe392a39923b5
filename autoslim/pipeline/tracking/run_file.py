"""The file next to checkpoints that names the MLflow run, so that an interrupted training is continued as one run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoslim.errors import UserError
from autoslim.files import parse_json, write_json
from autoslim.pipeline.tracking.sender import resume
from autoslim.pipeline.unsent import Journal, unsent_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient


def interrupted(client: MlflowClient, run_file: Path | None, made_by: str) -> str | None:
    """Returns the run that ``run_file`` names, which is running again; None if there is none that can be continued."""
    run_id = read_run_file(run_file, made_by).get("run_id")
    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except Exception:  # a run that was deleted
        return None
    if run.info.lifecycle_stage != "active":
        return None
    resume(client, run)
    return str(run_id)


def read_run_file(run_file: Path | None, made_by: str) -> dict[str, Any]:
    """Returns the content of the file; empty if there is none, if it is damaged, or if it belongs to another run."""
    try:
        content = {} if run_file is None else parse_json(run_file.read_text(encoding="utf-8"))
        return content if content.get("made_by") == made_by else {}
    except (OSError, ValueError, AttributeError):
        return {}


def write_run_file(run_file: Path | None, run_id: str | None, journal: Journal | None, made_by: str) -> None:
    """Names the run, or the journal of a run that the store does not have, for ``read_run_file``."""
    if run_file is not None:
        with suppress(OSError, UserError):  # the disk is full: a later run is a new one
            name = None if journal is None else journal.folder.name
            write_json(run_file, {"run_id": run_id, "journal": name, "made_by": made_by})


def new_journal(header: Mapping[str, Any]) -> Journal | None:
    try:
        return Journal.start(header)
    except (OSError, UserError):
        return None


def continued_journal(header: dict[str, Any], run_file: Path | None) -> Journal | None:
    """Returns a journal that continues the interrupted run that ``run_file`` names, or else a new one."""
    before = read_run_file(run_file, header["made_by"])
    name = Path(str(before.get("journal"))).name  # no other folder, whatever the file contains
    journal = Journal.open(unsent_folder() / name)
    if journal is None:
        journal = new_journal(header | {"run_id": before.get("run_id")})
    if journal is not None and before:
        try:
            journal.events()  # removes a line that was not completed
            journal.append({"do": "resume"})
        except (OSError, UserError):
            journal.close()
            return None
    if journal is not None:
        write_run_file(run_file, before.get("run_id"), journal, header["made_by"])
    return journal
