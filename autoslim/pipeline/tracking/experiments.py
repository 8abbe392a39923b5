"""Reads the runs of experiments from MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from autoslim.errors import UserError
from autoslim.files import parse_json
from autoslim.pipeline.experiment import EXPERIMENT, VIEW
from autoslim.pipeline.tracking.sender import REPORT
from autoslim.pipeline.tracking.store import (
    no_warnings,
    redacted,
    tracking_uri,
    usable_store,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


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
    return redacted(f"{server}/#/experiments/{found.experiment_id}/runs?viewStateShareKey={VIEW}")


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
    with no_warnings():
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
            "report": parse_json(text) if (text := run.data.tags.get(REPORT)) else None,
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
    with usable_store() as client:
        return client, client.get_experiment_by_name(name)
