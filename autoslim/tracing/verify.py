"""Verifies a channel graph by running the resized network, for example to find sizes written as numbers in its code."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.channels.copying import copy_with, float_dtype, named_tensors
from autoslim.channels.equivalence import find_failing
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels, axis_size
from autoslim.channels.inputs import Inputs
from autoslim.channels.outputs import nested
from autoslim.errors import UserError, first_sentence
from autoslim.tracing.capture import error_line
from autoslim.tracing.execution import Execution
from autoslim.tracing.groups import build_graph
from autoslim.tracing.interpreter import for_shapes
from autoslim.tracing.record import Record

BATCH = 2  # batch norm in training mode requires more than one value per channel
SLIMMED_EIGHTHS = ((4,), (4, 6, 2))
"""Eighths of their channels that the groups get in turn: first all the same, then different ones, because code that
computes with sizes may confuse two groups of equal size."""

_DOES_NOT_RUN = "the network does not run at another size"


@dataclass(frozen=True)
class VerificationRuns:
    """How a network is run to verify its graph: on which device, and in which modes (True for training)."""

    device: torch.device
    modes: tuple[bool, ...]
    leaves: frozenset[str] = frozenset()  # modules that were traced as one operation


def verified_graph(prototype: nn.Module, record: Record, inputs: Inputs, runs: VerificationRuns) -> ChannelGraph:
    """Returns the recorded channel graph without the groups whose size the network's code does not allow to change."""
    expected: _Run | None = None
    while True:
        graph = build_graph(prototype, record, inputs, runs.leaves)
        verification = _Verification(prototype, graph, runs, expected)
        expected = verification.expected
        failing = next(filter(None, map(verification.failing, SLIMMED_EIGHTHS)), None)
        if failing is None:
            return replace(graph, not_widenable=verification.not_widenable())
        written = record.written_roots()
        for name, reason in failing.items():
            for member in graph.groups[name].members:
                labels = record.labels.sources[member]
                if not written.isdisjoint(record.labels.roots(labels).tolist()):
                    reason = reason.replace(_DOES_NOT_RUN, "its size is written in the network's code")
                record.labels.freeze(labels, reason)


class _Verification:
    """Runs a copy of the network with other numbers of channels.

    ``expected`` is what a run with all channels gives, if it is known.
    """

    def __init__(
        self, prototype: nn.Module, graph: ChannelGraph, runs: VerificationRuns, expected: "_Run | None" = None
    ) -> None:
        self.graph, self.runs = graph, runs
        self.network = copy_with(prototype, lambda _, tensor: tensor.clone())
        try:
            self.expected = expected or self._run()
        except Exception as error:
            raise UserError(
                f"{type(prototype).__name__} does not run without real data: {first_sentence(error)}; "
                "name the module that depends on data in model.leaves, or remove what depends on data from its forward"
            ) from error
        if self.expected.macs != graph.macs():
            raise UserError(
                f"the trace of {type(prototype).__name__} has {graph.macs():,} MACs, but a run has "
                f"{self.expected.macs:,}; name the modules whose forward takes different branches in model.leaves"
            )

    def failing(self, eighths: Sequence[int]) -> dict[str, str]:
        """Returns the groups that cannot have these eighths of their channels, assigned in turn, with the errors."""
        return self._failing(self._configuration(eighths))

    def not_widenable(self) -> dict[str, str]:
        """Returns the groups that cannot have more channels while all others have more, with the errors."""
        wider = self._configuration((12,))
        not_widenable: dict[str, str] = {}
        while failed := self._failing({name: count for name, count in wider.items() if name not in not_widenable}):
            not_widenable |= failed
        return not_widenable

    def _configuration(self, eighths: Sequence[int]) -> Channels:
        channels = {}
        for index, group in enumerate(self.graph.groups.values()):
            units = group.size // group.unit
            channels[group.name] = max(1, units * eighths[index % len(eighths)] // 8) * group.unit
        return channels

    def _failing(self, resized: Channels) -> dict[str, str]:
        """Returns the groups that cannot be resized, with the errors.

        Runs that only check shapes are faster, and most groups that cannot be resized fail in them.
        """

        def failing(recorded: bool) -> dict[str, str]:
            return find_failing(list(resized), lambda names: self._failure({n: resized[n] for n in names}, recorded))

        return failing(recorded=False) or failing(recorded=True)

    def _failure(self, resized: Channels, recorded: bool) -> str | None:
        """Returns the error that the network raises with some groups resized, or None.

        Only ``recorded`` runs detect other operations than those of the graph.
        """
        channels = self.graph.default | resized
        if channels == self.graph.default:
            return None
        try:
            self._resize(channels)
            run = self._run(recorded)
        except Exception as error:  # the user's code may raise anything at another size
            where = error_line(error)
            what = f"{_DOES_NOT_RUN}: {first_sentence(error)}"
            return f"{what} ({where})" if where else what
        if run.shapes != self.expected.shapes:
            return "the network's output has another shape or value at another size"
        if recorded and (run.macs != self.graph.macs(channels) or run.names != self.expected.names):
            return "its code runs other operations at another size"
        return None

    def _resize(self, channels: Channels) -> None:
        """Resizes the network in place, with zero weights; this is faster than ``resize``."""
        tensors = named_tensors(self.network)
        for name, axes in self.graph.tensors.items():
            tensors[name].data = tensors[name].new_zeros([axis_size(axis, channels) for axis in axes])
        for attribute in self.graph.attributes:
            setattr(self.network.get_submodule(attribute.module), attribute.name, attribute.value(channels))

    def _run(self, recorded: bool = True) -> "_Run":
        """Runs the network in each mode. It remains in the last one."""
        run = _Run()
        for mode in self.runs.modes:
            recording = recorded and not mode
            with for_shapes(self.runs.device, recorded=recording):
                images = self.graph.inputs.zeros(BATCH, self.runs.device).to(float_dtype(self.network))
                execution = Execution(self.network, images.tensors, self.runs.leaves) if recording else None
                with execution or contextlib.nullcontext():
                    run.shapes.append(_shapes(images.run(self.network.train(mode))))
            if execution:
                run.macs, run.names = execution.macs // BATCH, execution.names
        return run


@dataclass
class _Run:
    """The output shapes in each mode, and the multiply-adds and operations in evaluation mode if they are recorded."""

    shapes: list[Any] = field(default_factory=list)
    macs: int = 0
    names: list[str] = field(default_factory=list)


def _shapes(output: Any) -> Any:
    return nested(output, lambda leaf: leaf.shape if isinstance(leaf, Tensor) else leaf)
