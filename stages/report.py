"""report: the methods' networks side by side on the test split, as a table and pictures."""

from autoslim.shell import environment  # noqa: F401  (first: torch and mlflow read it when they are imported)

# isort: split
import rich
import typer

from autoslim.engine.artifacts import Allocation
from autoslim.engine.checkpoints import write_json
from autoslim.engine.data import PreparedData
from autoslim.engine.retraining import retrained_top1
from autoslim.engine.trajectory import read_trajectory
from autoslim.shell.assembly import budget_limit, machine, recipe, traced_network
from autoslim.shell.exits import ending_clearly
from autoslim.shell.params import load_params
from autoslim.shell.places import CHANNELS, PREPARED, REPORT, RETRAIN, SEARCH, SUPERNET, repository_root
from autoslim.shell.report.curves import read_curves
from autoslim.shell.report.pictures import channels_picture, curves_picture, trajectory_picture
from autoslim.shell.report.table import Result, compare, csv_table, markdown_table, metrics, terminal_table
from autoslim.shell.tracking import lineage, numbers, tracked


@ending_clearly
def main() -> None:
    """Compares the methods on the test split, which no stage before has looked at."""
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    network, graph = traced_network(params.model, data.info)
    place = machine(params.runtime)
    trajectory = read_trajectory(SEARCH / "trajectory.json")
    methods = params.methods
    found = {method: Allocation.read(CHANNELS, method).channels for method in methods}
    results = [
        Result(
            method,
            graph.macs(channels),
            graph.params(channels),
            retrained_top1(
                network,
                graph,
                channels,
                data,
                recipe(params.retrain),
                place,
                seeds=params.retrain.seeds,
                folder=RETRAIN / method / "weights",
            ),
        )
        for method, channels in found.items()
    ]
    limit = budget_limit(params, graph)
    comparison = compare(results, budget=str(params.budget), resource=params.resource, limit=limit)
    dpi = params.report.picture_dpi
    REPORT.mkdir(parents=True, exist_ok=True)
    trajectory_picture(REPORT / "trajectory.png", trajectory, results, {str(params.budget): limit}, dpi)
    channels_picture(REPORT / "channels.png", graph.default, found, dpi)
    retrained = {method: read_curves(RETRAIN / method / "curves.csv") for method in methods}
    curves_picture(REPORT / "curves.png", read_curves(SUPERNET / "curves.csv"), retrained, dpi)
    (REPORT / "comparison.csv").write_text(csv_table(comparison))
    (REPORT / "table.md").write_text(markdown_table(comparison))
    figures = metrics(comparison)
    write_json(REPORT / "metrics.json", figures)
    with tracked(
        "report",
        run_name=f"report {params.budget}",
        params={"budget": params.budget, "resource": params.resource, "methods": params.methods},
        tags={
            "source": params.data.source,
            "budget": str(params.budget),
            "resource": params.resource,
            **lineage(SUPERNET / "weights.safetensors"),
        },
        enabled=params.tracking.enabled,
        experiment=params.tracking.experiment,
    ) as tracker:
        tracker.metrics(numbers(figures))
        tracker.artifact(REPORT)
    rich.print(terminal_table(comparison))
    print(f"Pictures: {REPORT}/trajectory.png, channels.png, curves.png. Runs: mlflow ui (make ui), or dvc exp show.")


if __name__ == "__main__":
    typer.run(main)
