"""allocate: the channels that each method gives for the budget."""

from autoslim.shell import environment  # noqa: F401  (first: torch and mlflow read it when they are imported)

# isort: split
import typer

from autoslim.algorithms.allocation import allocate
from autoslim.engine.artifacts import Allocation, read_trajectory
from autoslim.engine.data.info import read_info
from autoslim.networks.released import released_method
from autoslim.shell.assembly import budget_limit, traced_network
from autoslim.shell.checks import check_reach, check_trajectory
from autoslim.shell.exits import ending_clearly
from autoslim.shell.params import load_params
from autoslim.shell.places import CHANNELS, PREPARED, SEARCH


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
        budget, resource = str(params.budget), params.resource
        if listed := released_method(method):
            budget, resource = listed.budget, "macs"
        costs = graph.macs(channels), graph.params(channels)
        Allocation(method, budget, resource, channels, *costs).write(CHANNELS)


if __name__ == "__main__":
    typer.run(main)
