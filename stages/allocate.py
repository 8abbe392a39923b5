"""allocate: the channels that each method gives for the budget."""

from autoslim.shell import environment  # noqa: F401  (first: torch and mlflow read it when they are imported)

# isort: split
import typer

from autoslim.algorithms.allocation import allocate
from autoslim.engine.artifacts import Allocation
from autoslim.engine.data.info import read_info
from autoslim.engine.trajectory import read_trajectory
from autoslim.networks.released import released_method
from autoslim.shell.assembly import budget_limit, traced_network
from autoslim.shell.checks import check_reach, check_trajectory
from autoslim.shell.exits import ending_clearly
from autoslim.shell.params import load_params
from autoslim.shell.places import CHANNELS, PREPARED, SEARCH
from autoslim.vocabulary.budgets import format_amount


@ending_clearly
def main() -> None:
    """Writes down each method's channels, so that retraining runs again only where these are others."""
    params = load_params()
    _, graph = traced_network(params.model, read_info(PREPARED))
    check_reach(params, graph)
    configurations = []
    if not all(released_method(method) for method in params.methods):  # these lists need no search
        trajectory = read_trajectory(SEARCH / "trajectory.json")
        check_trajectory(trajectory, SEARCH / "trajectory.json", params, graph)
        configurations = [step["channels"] for step in trajectory["steps"]]
    limit = budget_limit(params, graph)
    for method in params.methods:
        channels = allocate(method, graph, configurations, params.resource, limit)
        macs = graph.macs(channels)
        own = released_method(method) is not None  # a budget of its own: what it costs here
        budget, resource = (format_amount(macs), "macs") if own else (str(params.budget), params.resource)
        Allocation(method, budget, resource, channels, macs, graph.params(channels)).write(CHANNELS)


if __name__ == "__main__":
    typer.run(main)
