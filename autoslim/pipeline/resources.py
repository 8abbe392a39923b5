"""Stage ``resources``: measures latency if the budget limits it, and checks that the methods can reach the budget."""

import sys
from pathlib import Path

from autoslim.data.prepared import read_info
from autoslim.files import write_sealed
from autoslim.pipeline.assembly import grid_spec, traced_network
from autoslim.pipeline.checks import (
    check_kernels,
    check_methods,
    check_reach,
    check_reliable,
    check_runs,
    check_table,
)
from autoslim.pipeline.costs import latency_target, measured_table, objective, read_table
from autoslim.pipeline.needs import write_needs
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import PREPARED, RESOURCES
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.resources.costs import Costs
from autoslim.search.methods import need_supernet
from autoslim.tasks.building import find_task


def run() -> None:
    """Measures latency if the budget limits it. Checks that the budget can be reached before anything is trained.

    Raises:
        UserError: a parameter is wrong, the budget cannot be reached, or the latency table is not reliable.
    """
    recorded = RecordedInputs("resources")
    params = load_params()
    info = read_info(PREPARED)
    network, graph = traced_network(params.model, info, find_task(params.task))
    check_reach(params, graph)
    check_methods(params, network, graph)
    target = latency_target(params.latency)  # the report measures latency, whichever resources the budget limits
    table = None
    if params.latency.table is not None or "latency" not in params.budgets:
        check_runs(network, graph, info, target)
    if params.latency.table is not None:
        check_table(params.latency.table)
        table = read_table(Path(params.latency.table))
        check_kernels(table, network, graph, graph.grid(grid_spec(params.supernet)))
    elif "latency" in params.budgets:
        table = measured_table(params, network, graph)
        check_reliable(table)
    costs = Costs(graph, table)
    if table is not None:
        print(f"resources: {table.summary()}", file=sys.stderr)
    check_reach(params, graph, table)
    chosen = objective(params, costs)
    write_sealed(RESOURCES / "latency.json", {} if table is None else table.to_dict())
    write_sealed(RESOURCES / "objective.json", {"resource": chosen.resource, "limits": dict(chosen.limits)})
    write_needs(supernet=need_supernet(params.methods))
    recorded.check()
