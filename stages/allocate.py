"""allocate: the channels that each method gives for the budget, and the weights that retraining starts from."""

from autoslim.shell import environment  # noqa: F401  (first: torch and mlflow read it when they are imported)

# isort: split
import typer

from autoslim.algorithms.allocation import allocate
from autoslim.algorithms.resources import Costs
from autoslim.engine.artifacts import Allocation, Asked, load_supernet, write_start
from autoslim.engine.data import PreparedData
from autoslim.engine.data.info import read_info
from autoslim.engine.starting import subnets_of
from autoslim.engine.trajectory import read_trajectory
from autoslim.networks.released import released_method
from autoslim.shell.assembly import machine, traced_network
from autoslim.shell.checks import check_measured_here, check_reach, check_trajectory
from autoslim.shell.exits import ending_clearly
from autoslim.shell.params import load_params
from autoslim.shell.places import CHANNELS, PREPARED, SEARCH, SUPERNET, repository_root
from autoslim.shell.resources import budget_limits, load_costs
from autoslim.vocabulary.budgets import format_amount, parse_budget, write_budgets


@ending_clearly
def main() -> None:
    """Writes down each method's channels, so that retraining runs again only where these are others."""
    params = load_params()
    network, graph = traced_network(params.model, read_info(PREPARED))
    costs = load_costs(graph)
    check_measured_here(params, costs.table)
    check_reach(params, graph, costs.table)
    configurations, narrowest = [], None
    if not all(released_method(method) for method in params.methods):  # these lists need no search
        trajectory = read_trajectory(SEARCH / "trajectory.json")
        check_trajectory(trajectory, SEARCH / "trajectory.json", params, graph)
        configurations = [step["channels"] for step in trajectory["steps"]]
        narrowest = trajectory["narrowest"]["channels"]
    limits = budget_limits(params, costs)
    cut = None
    if params.retrain.start == "supernet":
        supernet, _ = load_supernet(SUPERNET, network, graph)
        data = PreparedData.open(PREPARED, relative_to=repository_root())
        cut = subnets_of(supernet, data, machine(params.runtime), seed=params.data.seed)
    asked = {}
    for method in params.methods:
        channels = allocate(method, costs, configurations, limits, params.supernet.grid.divisor, narrowest)
        own = released_method(method) is not None  # a budget of its own: what it costs here
        budgets = {"macs": parse_budget(format_amount(graph.macs(channels)))} if own else params.budgets
        # Latency is left to the report: a table measured again must not retrain the same channels.
        taken = Costs(graph).all(channels)
        Allocation(method, channels, taken).write(CHANNELS)
        write_start(CHANNELS, method, None if cut is None else cut(channels))
        asked[method] = Asked(write_budgets(budgets), ", ".join(budgets))
    Asked.write(CHANNELS, asked)


if __name__ == "__main__":
    typer.run(main)
