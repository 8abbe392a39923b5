"""Tries a channel graph on the network itself: sizes that are written as numbers in its code show only then."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.networks.graph import ChannelGraph
from autoslim.networks.resizing import resize
from autoslim.networks.tracing.assembling import build_graph
from autoslim.networks.tracing.record import Record
from autoslim.vocabulary.channels import Channels
from autoslim.vocabulary.errors import UserError, first_line

BATCH = 2  # batch norm in training mode needs more than one value per channel


@dataclass(frozen=True)
class Runs:
    """How a network is run to try it: the device, and the modes (training or not) in which it does different things."""

    device: torch.device
    modes: tuple[bool, ...]


def tried_graph(prototype: nn.Module, record: Record, input_shape: tuple[int, ...], runs: Runs) -> ChannelGraph:
    """The graph of what was recorded, less the groups that the network's code does not let change."""
    while True:
        graph = build_graph(prototype, record, input_shape)
        culprits = _Trial(prototype, graph, runs).culprits(list(graph.groups))
        if not culprits:
            return graph
        for name, reason in culprits.items():
            for member in graph.groups[name].members:
                record.labels.fix(record.labels.sources[member], f"its size is written in the network's code: {reason}")


class _Trial:
    """The network run at other sizes than its own."""

    def __init__(self, prototype: nn.Module, graph: ChannelGraph, runs: Runs) -> None:
        self.prototype, self.graph, self.runs = prototype, graph, runs
        try:
            self.expected = self._output_shapes(prototype)
        except Exception as error:
            raise UserError(
                f"{type(prototype).__name__} does not run without data: {first_line(error)}; "
                "take what depends on data out of its forward"
            ) from error

    def failure(self, names: Sequence[str]) -> str | None:
        """What goes wrong when these groups are slimmed and the network is run, or None.

        They are slimmed evenly, and unevenly: code that computes with sizes may take two groups for one.
        """
        for eighths in ((4,), (4, 6, 2)):
            channels = self._slimmed(names, eighths)
            if channels == self.graph.default:
                continue
            try:
                found = self._output_shapes(resize(self.prototype, self.graph, channels))
            except Exception as error:  # whatever the user's code raises at another size
                return first_line(error)
            if found != self.expected:
                return "the output changes its shape"
        return None

    def culprits(self, names: Sequence[str]) -> dict[str, str]:
        """Groups that cannot change, even with others at their size, by bisection; and what goes wrong."""
        failure = self.failure(names)
        if failure is None:
            return {}
        if len(names) == 1:
            return {names[0]: failure}
        middle = len(names) // 2
        found = self.culprits(names[:middle]) | self.culprits(names[middle:])
        return found or {names[0]: failure}  # they only fail together

    def _slimmed(self, names: Sequence[str], eighths: Sequence[int]) -> Channels:
        channels = self.graph.default
        for index, name in enumerate(names):
            group = self.graph.groups[name]
            units = group.size // group.unit
            channels[name] = max(1, units * eighths[index % len(eighths)] // 8) * group.unit
        return channels

    def _output_shapes(self, network: nn.Module) -> list[Any]:
        """The shapes of the outputs in each mode. The mode is left as it falls."""
        with torch.no_grad(), self.runs.device:
            images = torch.zeros((BATCH, *self.graph.input_shape))
            return [_shapes(network.train(mode)(images)) for mode in self.runs.modes]


def _shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.shape
    if isinstance(output, dict):
        return {key: _shapes(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [_shapes(value) for value in output]
    return output
