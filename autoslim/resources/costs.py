"""Costs of channel configurations, and the objective that a search reduces."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.errors import UserError
from autoslim.resources.budgets import Budget, format_amount
from autoslim.resources.latency.table import LatencyTable

Fits = Callable[[Channels], bool]
"""Returns whether a configuration is within the limits."""


@dataclass(frozen=True)
class Costs:
    """Computes the costs of a network's configurations.

    The resources are ``macs``, ``params``, ``memory`` (bytes) and, with a latency table, ``latency`` (milliseconds).

    Raises:
        UserError: the latency table was measured for another network.
    """

    graph: ChannelGraph
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        table, graph = self.table, self.graph
        if table is not None and (table.default != graph.default or table.input_shape != graph.input_shape):
            raise UserError(
                f"the latency table was measured for another network ({table.network}, {len(table.default)} groups, "
                f"input {list(table.input_shape)}), not for this one ({len(graph.groups)} groups, input "
                f"{list(graph.input_shape)}); measure this network with `autoslim latency measure`"
            )

    def of(self, channels: Mapping[str, int], resource: str) -> float:
        """Returns the cost of a configuration in ``resource``, in the resource's own unit.

        Raises:
            UserError: ``resource`` is latency and there is no latency table.
        """
        if resource != "latency":
            return self.graph.cost(channels, resource)
        if self.table is None:
            raise UserError(
                "there is no latency table; run `dvc repro resources`, or set latency.table to a file; in Python, "
                "pass table"
            )
        return self.table.predict(channels)

    def all(self, channels: Mapping[str, int]) -> dict[str, float]:
        """Returns the cost of a configuration by resource, without latency if there is no table."""
        resources = ("macs", "params", "memory", *(["latency"] if self.table is not None else []))
        return {resource: self.of(channels, resource) for resource in resources}

    def limits(self, budgets: Mapping[str, Budget]) -> dict[str, float]:
        """Returns resource -> upper bound in the resource's own unit. Shares refer to the traced network's cost.

        Raises:
            UserError: a budget is a share of the latency, and there is no latency table.
        """
        default = self.graph.default
        return {
            resource: budget.amount * self.of(default, resource) if budget.relative else budget.amount
            for resource, budget in budgets.items()
        }

    def within(self, channels: Mapping[str, int], limits: Mapping[str, float]) -> bool:
        """Returns whether a configuration satisfies every limit."""
        return all(self.of(channels, resource) <= limit for resource, limit in limits.items())


@dataclass(frozen=True)
class Objective:
    """The cost that a search reduces: one resource or, with several limits, the share of the binding limit.

    Attributes:
        resource: the resource that is reduced if there are no ``limits``.
        limits: resource -> limit in the resource's unit, if there are several.
    """

    costs: Costs
    resource: str
    limits: Mapping[str, float] = field(default_factory=dict)

    def cost(self, channels: Mapping[str, int]) -> float:
        """Returns the cost in the resource's unit or, with limits, the largest ratio of a cost to its limit."""
        if not self.limits:
            return self.costs.of(channels, self.resource)
        return max(self.costs.of(channels, resource) / limit for resource, limit in self.limits.items())

    def stop(self, fraction: float, default: Channels) -> float:
        """Returns the cost at which a search stops: ``fraction`` of the default network's cost.

        With limits, the search continues at least until all are satisfied.
        """
        end = fraction * self.cost(default)
        return min(1.0, end) if self.limits else end

    def written(self, cost: float) -> str:
        """Formats a cost for messages."""
        return f"{100 * cost:.1f} % of the limits" if self.limits else format_amount(cost, self.resource)
