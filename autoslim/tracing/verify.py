"""Tries a channel graph on the network itself: sizes that are written as numbers in its code show only then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.equivalence import find_failing
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels, axis_size
from autoslim.errors import UserError, first_line
from autoslim.tracing.capture import error_line
from autoslim.tracing.groups import build_graph
from autoslim.tracing.interpreter import for_shapes, macs_of
from autoslim.tracing.record import Record

BATCH = 2  # batch norm in training mode needs more than one value per channel
SLIMMED_EIGHTHS = ((4,), (4, 6, 2))
"""All groups evenly, and unevenly: code that computes with sizes may take two groups for one."""


@dataclass(frozen=True)
class VerificationRuns:
    """How a network is run to try it: the device, and the modes (training or not) in which it does different things."""

    device: torch.device
    modes: tuple[bool, ...]
    leaves: frozenset[str] = frozenset()  # modules that were not looked into
    counted: bool = False  # whether its costs are tried too: it was traced at one size, and may do more at another


def verified_graph(
    prototype: nn.Module, record: Record, input_shape: tuple[int, ...], runs: VerificationRuns
) -> ChannelGraph:
    """The graph of what was recorded, less the groups that the network's code does not let change."""
    while True:
        graph = build_graph(prototype, record, input_shape, runs.leaves)
        trial = _Verification(prototype, graph, runs)
        culprits = next(filter(None, map(trial.culprits, SLIMMED_EIGHTHS)), None)
        if culprits is None:
            return replace(graph, not_widenable=trial.not_widenable())
        for name, reason in culprits.items():
            for member in graph.groups[name].members:
                record.labels.freeze(
                    record.labels.sources[member], f"its size is written in the network's code: {reason}"
                )


class _Verification:
    """The network run at other sizes than its own."""

    def __init__(self, prototype: nn.Module, graph: ChannelGraph, runs: VerificationRuns) -> None:
        self.graph, self.runs = graph, runs
        self.network = copy_with(prototype, lambda _, tensor: tensor.clone())
        try:
            self.expected = self._output_shapes()
        except Exception as error:
            raise UserError(
                f"{type(prototype).__name__} does not run without data: {first_line(error)}; "
                "take what depends on data out of its forward"
            ) from error

    def culprits(self, eighths: Sequence[int]) -> dict[str, str]:
        """Groups that cannot have these eighths of their channels (given in turn), and what goes wrong."""
        return self._failing(self._of(eighths))

    def not_widenable(self) -> dict[str, str]:
        """Groups that cannot have more channels, all others having more, and what goes wrong."""
        wider = self._of((12,))
        not_widenable: dict[str, str] = {}
        while found := self._failing({name: count for name, count in wider.items() if name not in not_widenable}):
            not_widenable |= {
                name: f"its size is written in the network's code: {reason}" for name, reason in found.items()
            }
        return not_widenable

    def _of(self, eighths: Sequence[int]) -> Channels:
        channels = {}
        for index, group in enumerate(self.graph.groups.values()):
            units = group.size // group.unit
            channels[group.name] = max(1, units * eighths[index % len(eighths)] // 8) * group.unit
        return channels

    def _failing(self, resized: Channels) -> dict[str, str]:
        """Those of the resized groups that fail even if the others keep their size, with the reasons."""
        return find_failing(list(resized), lambda names: self._failure({name: resized[name] for name in names}))

    def _failure(self, resized: Channels) -> str | None:
        """What goes wrong when the network is run with some groups resized, or None."""
        channels = self.graph.default | resized
        if channels == self.graph.default:
            return None
        try:
            self._resize(channels)
            found = self._output_shapes()
        except Exception as error:  # whatever the user's code raises at another size
            where = error_line(error)
            return f"{first_line(error)} ({where})" if where else first_line(error)
        if found != self.expected:
            return "the output changes its shape"
        if self.runs.counted and self._macs() != self.graph.macs(channels):
            return "its code does other things at another size"
        return None

    def _macs(self) -> int:
        with for_shapes(self.runs.device):
            return macs_of(lambda: self.network.eval()(self._images())) // BATCH

    def _images(self) -> Tensor:
        return torch.zeros((BATCH, *self.graph.input_shape))

    def _resize(self, channels: Channels) -> None:
        """In place and without the weights, for it is done many times."""
        tensors = named_tensors(self.network)
        for name, axes in self.graph.tensors.items():
            tensors[name].data = tensors[name].new_zeros([axis_size(axis, channels) for axis in axes])
        for attribute in self.graph.attributes:
            setattr(self.network.get_submodule(attribute.module), attribute.name, attribute.value(channels))

    def _output_shapes(self) -> list[Any]:
        """The shapes of the outputs in each mode. The mode is left as it falls."""
        with for_shapes(self.runs.device):
            return [_shapes(self.network.train(mode)(self._images())) for mode in self.runs.modes]


def _shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.shape
    if isinstance(output, dict):
        return {key: _shapes(value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return [_shapes(value) for value in output]
    return output
