"""Reads the MLflow store of a test project."""

from pathlib import Path
from typing import Any


def runs(project: Path) -> list[dict[str, str]]:
    """Returns the tags of each run in the project's SQLite store, including ``status``, oldest first."""
    client = client_of(project)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs_found = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return [{**run.data.tags, "status": run.info.status} for run in runs_found]


def client_of(project: Path) -> Any:
    from mlflow import MlflowClient  # the import takes seconds

    return MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
