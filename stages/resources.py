"""resources: the budget's resources -> what the search lowers, and the latency table where latency is bounded."""

from autoslim.shell import environment  # noqa: F401  (first: torch and mlflow read it when they are imported)

# isort: split
import sys
from pathlib import Path

import typer

from autoslim.algorithms.resources import Costs
from autoslim.engine.checkpoints import write_json
from autoslim.engine.data.info import read_info
from autoslim.shell.assembly import span, traced_network
from autoslim.shell.checks import check_kernels, check_reach, check_runs, check_table, check_trusted
from autoslim.shell.exits import ending_clearly
from autoslim.shell.params import load_params
from autoslim.shell.places import PREPARED, RESOURCES
from autoslim.shell.resources import objective
from autoslim.shell.targets import latency_target, measured_table, read_table


@ending_clearly
def main() -> None:
    """Measures latency where it is bounded, and sees that the budget is within reach before anything is trained."""
    params = load_params()
    network, graph = traced_network(params.model, read_info(PREPARED))
    check_reach(params, graph)
    target = latency_target(params.latency)  # which the report measures on, whatever the budget bounds
    table = None
    if params.latency.table is not None or "latency" not in params.budgets:
        check_runs(network, graph, target)
    if params.latency.table is not None:
        check_table(params.latency.table)
        table = read_table(Path(params.latency.table))
        check_kernels(table, network, graph, span(params.supernet).grid(graph))
    elif "latency" in params.budgets:
        table = measured_table(params, network, graph)
        check_trusted(table)
    costs = Costs(graph, table)
    if table is not None:
        print(f"resources: {table.summary()}", file=sys.stderr)
    check_reach(params, graph, table)
    lowered = objective(params, costs)
    write_json(RESOURCES / "latency.json", {} if table is None else table.to_dict())
    write_json(RESOURCES / "objective.json", {"resource": lowered.resource, "limits": dict(lowered.limits)})
    write_json(RESOURCES / "reach.json", {"within_reach": True})  # the supernet waits for it, and never changes with it


if __name__ == "__main__":
    typer.run(main)
