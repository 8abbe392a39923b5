"""``autoslim sync``: sends what MLflow has not received."""

from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project


@with_clear_errors
def sync_cli() -> None:
    """Send to MLflow the runs that it has not received, for example because its server did not answer.

    They are kept in checkpoints/mlflow. The next stage that reaches MLflow also sends them.

    Example:

    autoslim sync
    """
    enter_project()
    from autoslim.pipeline.tracking.kept import send_unsent

    sent, failed = send_unsent()
    print(f"MLflow received {sent} {'run' if sent == 1 else 'runs'}" if sent or failed else "MLflow has all runs")
    if failed:
        raise UserError(f"{'; '.join(failed)}; run again, or delete the folder")
