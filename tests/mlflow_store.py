"""What an MLflow store of a test's project holds."""

from pathlib import Path


def runs(project: Path) -> list[dict[str, str]]:
    """The tags of each run in the project's SQLite store, oldest first; ``status`` among them."""
    from mlflow import MlflowClient  # the one place, besides tests of tracking, where a test reads the store

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return [{**run.data.tags, "status": run.info.status} for run in found]
