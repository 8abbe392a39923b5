"""Stage ``allocate``: chooses each method's channels within the budget, and writes the weights to retrain from."""

from autoslim.data.prepared import PreparedData, read_info
from autoslim.models.released import released_method
from autoslim.pipeline.artifacts import Allocation, RequestedBudget, write_initial_weights
from autoslim.pipeline.assembly import run_context, traced_network
from autoslim.pipeline.checks import check_measured_here, check_reach, check_trajectory
from autoslim.pipeline.costs import budget_limits, load_costs
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import CHANNELS, PREPARED, SEARCH, SUPERNET, repository_root
from autoslim.resources.budgets import format_amount, format_budgets, parse_budget
from autoslim.resources.costs import Costs
from autoslim.search.methods import allocate
from autoslim.search.search import read_trajectory
from autoslim.supernet.extract import load_supernet, subnet_extractor


def run() -> None:
    """Writes each method's channels to a separate file, so that only networks whose channels changed are retrained.

    Raises:
        UserError: a parameter is wrong, an earlier stage has not run, or no network of a method is within the budget.
    """
    params = load_params()
    network, graph = traced_network(params.model, read_info(PREPARED))
    costs = load_costs(graph)
    check_measured_here(params, costs.table)
    check_reach(params, graph, costs.table)
    configurations, narrowest = [], None
    if not all(released_method(method) for method in params.methods):  # released lists need no search
        trajectory = read_trajectory(SEARCH / "trajectory.json")
        check_trajectory(trajectory, SEARCH / "trajectory.json", params, graph)
        configurations = [step["channels"] for step in trajectory["steps"]]
        narrowest = trajectory["narrowest"]["channels"]
    limits = budget_limits(params, costs)
    extract = None
    if params.retrain.start == "supernet":
        supernet, _ = load_supernet(SUPERNET, network, graph)
        data = PreparedData.open(PREPARED, relative_to=repository_root())
        extract = subnet_extractor(supernet, data, run_context(params.runtime), seed=params.data.seed)
    requested = {}
    for method in params.methods:
        channels = allocate(method, costs, configurations, limits, params.supernet.grid.divisor, narrowest)
        is_released = released_method(method) is not None  # the budget of a released list is its own cost
        budgets = {"macs": parse_budget(format_amount(graph.macs(channels)))} if is_released else params.budgets
        # Latency is left out: measuring a table again must not cause the same channels to be retrained.
        Allocation(method, channels, Costs(graph).all(channels)).write(CHANNELS)
        write_initial_weights(CHANNELS, method, None if extract is None else extract(channels))
        requested[method] = RequestedBudget(format_budgets(budgets), ", ".join(budgets))
    RequestedBudget.write(CHANNELS, requested)
