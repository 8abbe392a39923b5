"""Resource models: what a configuration takes of each resource, and what a search lowers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.errors import UserError
from autoslim.resources.budgets import format_amount
from autoslim.resources.latency.table import LatencyTable


@dataclass(frozen=True)
class Costs:
    """What configurations of a network take: ``macs``, ``params``, ``memory`` (bytes), and ``latency`` (milliseconds)
    where there is a table of it.

    Raises:
        UserError: the table is of another network.
    """

    graph: ChannelGraph
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        table, graph = self.table, self.graph
        if table is not None and (table.default != graph.default or table.input_shape != graph.input_shape):
            raise UserError(
                f"the latency table is of another network ({table.network}, {len(table.default)} groups, input "
                f"{list(table.input_shape)}) than this one ({len(graph.groups)} groups, input "
                f"{list(graph.input_shape)}); measure this one with `autoslim latency measure`"
            )

    def of(self, channels: Mapping[str, int], resource: str) -> float:
        """Raises:
        UserError: latency is asked for, and there is no table.
        """
        if resource != "latency":
            return self.graph.cost(channels, resource)
        if self.table is None:
            raise UserError("there is no latency table; run `dvc repro resources`, or give latency.table")
        return self.table.predict(channels)

    def all(self, channels: Mapping[str, int]) -> dict[str, float]:
        """Each resource that is known."""
        known = ("macs", "params", "memory", *(["latency"] if self.table is not None else []))
        return {resource: self.of(channels, resource) for resource in known}

    def within(self, channels: Mapping[str, int], limits: Mapping[str, float]) -> bool:
        """Whether a configuration holds every limit."""
        return all(self.of(channels, resource) <= limit for resource, limit in limits.items())


@dataclass(frozen=True)
class Objective:
    """What a search lowers: one resource, or with several limits the share of the limit that binds.

    Attributes:
        resource: what is lowered where there are no ``limits``.
        limits: several resources, each with its limit in its own unit.
    """

    costs: Costs
    resource: str
    limits: Mapping[str, float] = field(default_factory=dict)

    def cost(self, channels: Mapping[str, int]) -> float:
        """In the resource's unit; with limits the largest share of one that is taken, 1 where all are just held."""
        if not self.limits:
            return self.costs.of(channels, self.resource)
        return max(self.costs.of(channels, resource) / limit for resource, limit in self.limits.items())

    def stop(self, fraction: float, default: Channels) -> float:
        """The cost where a search ends: ``fraction`` of the default network's, and with limits where all are held."""
        end = fraction * self.cost(default)
        return min(1.0, end) if self.limits else end

    def written(self, cost: float) -> str:
        return f"{100 * cost:.1f} % of the limits" if self.limits else format_amount(cost, self.resource)
