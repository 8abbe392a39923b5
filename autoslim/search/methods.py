"""The methods that choose channels, by name, and those of them that need neither a supernet nor a trained network."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence

from autoslim.channels.groups import ChannelGroup, Channels
from autoslim.channels.limits import GroupRange
from autoslim.errors import UserError
from autoslim.models.released import released_lists, released_method
from autoslim.resources.budgets import format_named_amount
from autoslim.resources.costs import Costs, Fits

DEFAULT = "default"
"""The method that keeps the default network as it is."""

ON_SUPERNET = "autoslim", "random", "evolution"
"""The methods that score networks of a supernet. They also need the search: its channels, or how much it evaluated."""

ON_TRAINED = "l1", "bn_scale", "taylor", "sensitivity"
"""The methods that prune a trained network. They need no supernet."""


def check_method(method: str) -> None:
    """Raises ``UserError`` if there is no such method."""
    named = DEFAULT, "uniform", *ON_SUPERNET, *ON_TRAINED
    if released_method(method) is None and method not in named:
        lists = ", ".join(f"released/{name}" for name in released_lists())
        raise UserError(f"method {method!r} is unknown; methods are {', '.join(named)}, and {lists}")


def is_within_budget(method: str) -> bool:
    """Returns whether ``method`` chooses its channels within the budget, and not ``default`` or a released list."""
    return method != DEFAULT and released_method(method) is None


def need_supernet(methods: Iterable[str]) -> bool:
    """Returns whether one of ``methods`` needs a supernet, and the search on it."""
    return any(method in ON_SUPERNET for method in methods)


def allocate(
    method: str,
    costs: Costs,
    configurations: Sequence[Channels],
    limits: Mapping[str, float],
    divisor: int = 1,
    narrowest: Mapping[str, int] | None = None,
    ranges: Mapping[str, GroupRange] | None = None,
) -> Channels:
    """Returns the channels that a method chooses within ``limits``, without running a network.

    Args:
        method: ``autoslim``, ``uniform``, or ``default`` and ``released/NAME``, which ignore the limits.
        costs: the costs of the network's configurations.
        configurations: the trajectory from the widest configuration down. ``uniform`` is at most as wide as the first.
        limits: resource -> upper bound in its unit.
        divisor: ``uniform`` has multiples of this number if latency is limited.
        narrowest: ``uniform`` has at least these channels if latency is limited.
        ranges: limits of groups (see ``group_ranges``), which ``uniform`` satisfies too.

    Raises:
        UserError: the method is unknown, no network is within the limits, or the list belongs to another network.
    """
    check_method(method)
    graph = costs.graph
    if method == DEFAULT:
        return graph.default
    if listed := released_method(method):
        return listed.channels(graph)

    def fits(channels: Channels) -> bool:
        return costs.within(channels, limits)

    measured = "latency" in limits
    maximum, minimum = configurations[0], (narrowest or {}) if measured else {}
    widest = max(maximum[name] / group.size for name, group in graph.groups.items())
    # `maximum` is rounded, so the same width multiplier may exceed it in some groups.
    bounds = {name: (minimum.get(name, 1), count) for name, count in maximum.items()}
    for name, allowed in (ranges or {}).items():
        highest, lowest = allowed.clamped(maximum[name], bounds[name][0])
        bounds[name] = lowest, highest
    multiples = {name: allowed.multiple for name, allowed in (ranges or {}).items()}
    try:
        if method == "autoslim":
            return from_trajectory(configurations, fits)
        divisor = divisor if measured else 1
        return uniform(graph.groups, fits, widest, divisor, bounds=bounds, multiples=multiples, monotone=not measured)
    except UserError as error:
        budget = ", ".join(format_named_amount(limit, resource) for resource, limit in limits.items())
        last = ", ".join(format_named_amount(costs.of(configurations[-1], resource), resource) for resource in limits)
        end = f", the search ended at {last}" if method == "autoslim" else ""
        raise UserError(f"{error} (the budget is {budget}{end})") from error


def from_trajectory(configurations: Iterable[Channels], fits: Fits) -> Channels:
    """Returns the first, which is the widest, configuration of a trajectory that is within the limits.

    Raises:
        UserError: no configuration is within the limits.
    """
    for channels in configurations:
        if fits(channels):
            return channels
    raise UserError("the trajectory has no configuration within the budget; lower search.stop or raise budget")


def uniform(
    groups: Mapping[str, ChannelGroup],
    fits: Fits,
    widest: float,
    divisor: int = 1,
    *,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    multiples: Mapping[str, int] | None = None,
    monotone: bool = True,
) -> Channels:
    """Returns the configuration of the largest width multiplier up to ``widest`` that is within the limits.

    Each group gets the multiple of ``divisor`` (and of its unit) nearest to ``width * size``, but at least one such
    multiple. With a divisor of 1 the width multiplier is as fine as possible, so that no method looks better only
    because it uses more of the budget. If latency is limited, the divisor should be the grid's: tables have no times
    between the grid's numbers of channels, and odd numbers of channels are slow.

    Args:
        groups: the channel groups.
        fits: returns whether a configuration is within the limits.
        widest: the largest width multiplier.
        divisor: see above.
        bounds: the minimum and maximum number of channels of each group, to which counts are clamped: those of the
            supernet, or those that were measured.
        multiples: further numbers of which the channels of some groups are multiples.
        monotone: whether costs never decrease as the width grows. Otherwise (latency) every width is tried.

    Raises:
        UserError: even the narrowest configuration exceeds the limits.
    """
    steps = {name: math.lcm(group.unit, divisor, (multiples or {}).get(name, 1)) for name, group in groups.items()}

    def at(width: float) -> Channels:
        counts = {n: max(1, int(width * g.size / steps[n] + 0.5)) * steps[n] for n, g in groups.items()}
        if bounds is None:
            return counts
        return {name: min(max(count, bounds[name][0]), bounds[name][1]) for name, count in counts.items()}

    changes = {  # the widths at which a group gains one step
        (number + 0.5) / (group.size / steps[name]) * (1 + 1e-12)
        for name, group in groups.items()
        for number in range(1, int(widest * group.size / steps[name] + 0.5))
    }
    widths = [0.0, *sorted(changes), widest]
    if monotone:
        fitting = bisect.bisect_left(widths, True, key=lambda width: not fits(at(width)))
        widths = widths[:fitting]
    for width in reversed(widths):
        if fits(channels := at(width)):
            return channels
    raise UserError("no uniform width multiplier is within the budget; raise budget")
