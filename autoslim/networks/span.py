"""The span of a supernet: from which channel numbers to which, and in what steps."""

from dataclasses import dataclass

from autoslim.networks.graph import ChannelGraph
from autoslim.vocabulary.channels import Anchor, grid


@dataclass(frozen=True)
class Span:
    """What a supernet spans: its widest and narrowest as width multipliers, and the grid between them."""

    width: float
    narrowest: float
    steps: int
    divisor: int
    anchor: Anchor = "widest"

    def grid(self, graph: ChannelGraph) -> dict[str, tuple[int, ...]]:
        """Each group's numbers of channels, from the widest down (``vocabulary.channels.grid``)."""
        floor = {n: max(1, round(self.narrowest * g.size)) for n, g in graph.groups.items()}
        widest = graph.scaled(self.width, self.divisor)
        return grid(graph.groups, widest, floor, self.steps, self.divisor, self.anchor)
