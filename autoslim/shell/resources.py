"""From the budget and the stage ``resources`` to what configurations cost, and what a search lowers."""

from pathlib import Path

from autoslim.algorithms.latency import LatencyTable
from autoslim.algorithms.resources import Costs, Objective
from autoslim.engine.artifacts import read_json
from autoslim.networks.graph import ChannelGraph
from autoslim.shell.params import Params
from autoslim.shell.places import RESOURCES
from autoslim.vocabulary.errors import UserError


def load_costs(graph: ChannelGraph) -> Costs:
    """What configurations take; of latency, where the stage ``resources`` wrote a table.

    Raises:
        UserError: the stage has not run, or the table is of another network.
    """
    path = _written(RESOURCES / "latency.json")
    values = read_json(path, "resources")
    return Costs(graph, LatencyTable.from_dict(values, str(path)) if values else None)


def load_objective(costs: Costs) -> Objective:
    """What the search lowers, as the stage ``resources`` wrote it.

    Raises:
        UserError: the stage has not run.
    """
    values = read_json(_written(RESOURCES / "objective.json"), "resources")
    return Objective(costs, values["resource"], values["limits"])


def budget_limits(params: Params, costs: Costs) -> dict[str, float]:
    """The budgets in their resources' units.

    Raises:
        UserError: a share of the default network's latency is asked for, and there is no table.
    """
    default = costs.graph.default
    return {
        resource: budget.amount * costs.of(default, resource) if budget.relative else budget.amount
        for resource, budget in params.budgets.items()
    }


def objective(params: Params, costs: Costs) -> Objective:
    """One resource, whatever its budget: a search serves all of them. Several limits: what binds depends on them."""
    several = len(params.budgets) > 1
    return Objective(costs, params.resource, budget_limits(params, costs) if several else {})


def _written(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"there is no {path}; run `dvc repro resources`")
    return path
