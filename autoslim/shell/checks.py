"""Checks of the parameters against the network and the data. They say no or nothing: no number depends on them."""

from autoslim.engine.data import DataInfo
from autoslim.networks.graph import ChannelGraph
from autoslim.shell.assembly import budget_limit, span, traced_network
from autoslim.shell.params import Params
from autoslim.vocabulary.budgets import format_amount
from autoslim.vocabulary.errors import UserError


def check_pipeline(params: Params, info: DataInfo) -> None:
    """The network fits the data, and the budget the network.

    Raises:
        UserError: they do not.
    """
    _, graph = traced_network(params.model, info)
    check_reach(params, graph)


def check_reach(params: Params, graph: ChannelGraph) -> None:
    """The budget lies where the search and the methods can go.

    Raises:
        UserError: the budget is above the widest subnet, below the narrowest, or below where the search stops.
    """
    resource = params.resource
    levels = span(params.supernet).grid(graph)
    default = graph.cost(graph.default, resource)
    widest = graph.cost({name: options[0] for name, options in levels.items()}, resource)
    narrowest = graph.cost({name: options[-1] for name, options in levels.items()}, resource)
    budget = budget_limit(params, graph)
    written, bounds = (
        f"budget {params.budget} ({format_amount(budget, resource)} {resource})",
        f"the supernet spans {format_amount(narrowest, resource)} to {format_amount(widest, resource)}, the default network takes {format_amount(default, resource)}",
    )
    if budget > widest:
        raise UserError(f"{written} is above the widest subnet; {bounds}: lower budget or raise supernet.width")
    if budget < narrowest:
        raise UserError(
            f"{written} is below the narrowest subnet; {bounds}: raise budget or lower supernet.grid.narrowest"
        )
    if budget < params.search.stop * default:
        raise UserError(
            f"{written} is below {format_amount(params.search.stop * default, resource)}, where the search stops; {bounds}: "
            f"raise budget or lower search.stop ({params.search.stop})"
        )
