"""Reads the MLflow store of a test project."""

from pathlib import Path
from typing import Any


def runs(project: Path) -> list[dict[str, str]]:
    """Returns the tags of each stage's run in the project's SQLite store, including ``status``, oldest first."""
    client = client_of(project)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs_found = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    tags = [{**run.data.tags, "status": run.info.status} for run in runs_found]
    return [each for each in tags if each.get("stage") != "experiment"]


def client_of(project: Path) -> Any:
    from mlflow import MlflowClient  # the import takes seconds

    return MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
