"""Channel allocation: how a method chooses channel numbers within a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from autoslim.networks.graph import ChannelGraph
from autoslim.networks.released import released_lists, released_method
from autoslim.vocabulary.channels import ChannelGroup, Channels
from autoslim.vocabulary.errors import UserError

Cost = Callable[[Mapping[str, int]], float]


def check_method(method: str) -> None:
    """Raises:
    UserError: there is no such method.
    """
    if released_method(method) is None and method not in ("autoslim", "uniform"):
        lists = ", ".join(f"released/{name}" for name in released_lists())
        raise UserError(f"method {method!r} is unknown; methods are autoslim, uniform, and {lists}")


def allocate(
    method: str, graph: ChannelGraph, configurations: Sequence[Channels], resource: str, budget: float
) -> Channels:
    """The channels that a method gives within a budget (in the resource's unit).

    Args:
        method: ``autoslim``, ``uniform``, or ``released/NAME``, which has a budget of its own and heeds no other.
        configurations: the trajectory, from the widest down; its first entry bounds ``uniform`` too.

    Raises:
        UserError: the method is unknown, has nothing within the budget, or is the list of another network.
    """
    check_method(method)
    if listed := released_method(method):
        return listed.channels(graph)

    def cost(channels: Mapping[str, int]) -> float:
        return graph.cost(channels, resource)

    if method == "autoslim":
        return from_trajectory(configurations, cost, budget)
    widest = max(configurations[0][name] / group.size for name, group in graph.groups.items())
    return uniform(graph.groups, cost, budget, widest)


def from_trajectory(configurations: Iterable[Channels], cost: Cost, budget: float) -> Channels:
    """The costliest configuration within the budget that greedy slimming passed; the first one where costs are equal.

    Raises:
        UserError: none of them is within the budget.
    """
    best: Channels | None = None
    for channels in configurations:
        if cost(channels) <= budget and (best is None or cost(channels) > cost(best)):
            best = channels
    if best is None:
        raise UserError("the trajectory has no configuration within the budget; lower search.stop or raise budget")
    return best


def uniform(groups: Mapping[str, ChannelGroup], cost: Cost, budget: float, widest: float) -> Channels:
    """The configuration of the largest width multiplier up to ``widest`` within the budget.

    Each group has the multiple of its unit nearest to ``width * size``, at least one: the finest uniform network there
    is, so that a method is not praised for using a budget better.

    Raises:
        UserError: even one unit a group is beyond the budget.
    """

    def at(width: float) -> Channels:
        return {n: max(1, int(width * g.size / g.unit + 0.5)) * g.unit for n, g in groups.items()}

    if cost(at(0.0)) > budget:
        raise UserError("no uniform width multiplier is within the budget; raise budget")
    low, high = 0.0, widest
    if cost(at(high)) <= budget:
        return at(high)
    while high - low > 1e-9:  # the cost does not fall as the width grows, so bisection finds the last width that fits
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    return at(low)
