"""Incremental evaluation: runs only the part of a supernet that a candidate changes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoslim.channels.copying import evaluation_mode
from autoslim.channels.equivalence import FLOAT32_FLOOR, output_tensors, relative_difference, rounding_tolerance
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis
from autoslim.channels.inputs import Arguments
from autoslim.channels.resize import common_spans
from autoslim.errors import UserError, first_line
from autoslim.supernet.supernet import Supernet
from autoslim.tracing.capture import symbolic_graph
from autoslim.tracing.interpreter import GraphRunner
from autoslim.tracing.operations import is_local, may_view, overwritten


class IncrementalEvaluator:
    """Evaluates the current subnet and all subnets with one group slimmed, without repeating common operations.

    A subnet with one group slimmed differs from the current subnet only from the group's first consumer on. Before it,
    the values are those of the current subnet without the removed channels: the other outputs of a convolution do not
    change, and batch norm normalises each channel separately, with the statistics of the batch. The current subnet
    therefore runs once. At the first operation that mixes the channels of a group, the slimmed subnet continues from
    slices of the current values, up to its output.

    Only values that a later operation of the current subnet reads stay in memory.

    Args:
        supernet: A supernet in evaluation mode. Its ``forward`` must run the same operations for all data and all
            channels (see ``verified_evaluator``).
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        graph = _traced(supernet)
        self.nodes = list(graph.nodes)
        self._runner = GraphRunner(supernet.network, graph)
        self._inputs = [node for node in self.nodes if node.op == "placeholder"]
        self._modules = self._runner.submodules
        self._last_use = {read: position for position, node in enumerate(self.nodes) for read in node.all_input_nodes}
        self._memory = _Memory(self.nodes, self._modules)
        self.start = {group: self._unshared(self._first_mixing(group)) for group in supernet.graph.groups}
        """Group -> the position of the first operation that mixes its channels. Operations before it run only once."""

    def run(
        self, images: Arguments | Tensor, current: Mapping[str, int], slimmer: Mapping[str, int]
    ) -> Iterator[tuple[str | None, Any]]:
        """Runs the subnet ``current`` and, for each group in ``slimmer``, the subnet with only this group slimmed.

        Args:
            images: A batch.
            current: The current configuration.
            slimmer: The groups to slim, with the number of channels of each.

        Yields:
            (group, output) for each group in ``slimmer``, in the order of the operations; then (None, output) of
            ``current``.
        """
        branches: dict[int, list[str]] = {}
        for group in slimmer:
            branches.setdefault(self.start[group], []).append(group)
        self.supernet.select(current)
        values: dict[fx.Node, Any] = dict(zip(self._inputs, Arguments.of(images).tensors, strict=True))
        for position, node in enumerate(self.nodes[len(values) :], start=len(values)):
            for group in branches.get(position, ()):
                narrow = {**current, group: slimmer[group]}
                self.supernet.select(narrow)
                yield group, self._finish(position, self._sliced(values, position, group, current, narrow))
                self.supernet.select(current)
            self._runner.step(node, values)
        yield None, values[self.nodes[-1]]

    def _finish(self, start: int, values: dict[fx.Node, Any]) -> Any:
        for node in self.nodes[start:]:
            self._runner.step(node, values)
        return values[self.nodes[-1]]

    def _sliced(
        self,
        values: Mapping[fx.Node, Any],
        start: int,
        group: str,
        current: Mapping[str, int],
        narrow: Mapping[str, int],
    ) -> dict[fx.Node, Any]:
        """Returns the live values sliced to the narrower subnet; values that it overwrites later are copied."""
        activations = self.supernet.graph.activations
        sliced = {}
        for node, value in values.items():
            channels = activations.get(node.name)
            if channels is not None and any(segment.group == group for segment in channels[1]):
                value = _narrowed(value, *channels, current, narrow)
            sliced[node] = value.clone() if self._memory.written(node) >= start else value
        return sliced

    def _first_mixing(self, group: str) -> int:
        graph = self.supernet.graph
        dependent: set[fx.Node] = set()
        for position, node in enumerate(self.nodes):
            if _reads(node, group, graph) or dependent.intersection(node.all_input_nodes):
                dependent.add(node)
                if not is_local(node, group, graph, self._modules):
                    return position
        return len(self.nodes) - 1

    def _unshared(self, start: int) -> int:
        """Returns the last position up to ``start`` at which no two live values share memory that is overwritten later.

        Copies of such values would no longer share it. No number that comes from an attribute of a module is alive
        there either, because it may depend on the group.
        """
        live = [node for node in self.nodes[:start] if self._last_use.get(node, -1) >= start]
        for number, node in enumerate(live):
            if "first" in node.meta:
                return self._unshared(self.nodes.index(node.meta["first"]))
            if self._memory.written(node) >= start and any(self._memory.shared(node, o) for o in live[:number]):
                return self._unshared(self.nodes.index(node))
        return start


def _traced(supernet: Supernet) -> fx.Graph:
    """Returns the graph of the network in evaluation mode. The supernet's mode and selection are restored."""
    selected = dict(supernet.selected)
    supernet.select(supernet.widest)  # views of weights would hide the parameters from tracing
    try:
        with evaluation_mode(supernet):
            graph = supernet.graph
            if graph.part:
                raise UserError(f"only {graph.part!r} was traced, not the whole network")
            return symbolic_graph(supernet.network, graph.leaves, graph.inputs.zeros(1, "meta"))
    finally:
        supernet.select(selected)


def _reads(node: fx.Node, group: str, graph: ChannelGraph) -> bool:
    """Returns whether a parameter or buffer of the operation depends on the group."""
    prefix = f"{node.target}."
    names = [name for name in graph.tensors if node.op == "call_module" and name.startswith(prefix)]
    if node.op == "get_attr":
        names = [str(node.target)]
    return any(s.group == group for name in names for axis in graph.tensors.get(name, ()) for s in axis)


def _narrowed(value: Tensor, dim: int, axis: Axis, current: Mapping[str, int], narrow: Mapping[str, int]) -> Tensor:
    pieces = [value.narrow(dim, start, length) for start, _, length in common_spans(axis, current, narrow)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class _Memory:
    """Tracks which values may share memory, and which operation overwrites it last."""

    def __init__(self, nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> None:
        self._storage: dict[fx.Node, int] = {}
        self._written: dict[int, int] = {}
        for position, node in enumerate(nodes):
            over = overwritten(node, modules)
            aliased = {self._storage[other] for other in (node.all_input_nodes if may_view(node, modules) else over)}
            storage = self._storage[node] = min(aliased, default=position)
            for other, known in self._storage.items():
                if known in aliased:
                    self._storage[other] = storage
            if over:
                self._written.update({self._storage[other]: position for other in over})
            self._written[storage] = max([-1, *(self._written.get(known, -1) for known in {storage, *aliased})])

    def written(self, node: fx.Node) -> int:
        """Returns the last position of an operation that may overwrite the node's value; -1 if there is none."""
        return self._written[self._storage[node]]

    def shared(self, node: fx.Node, other: fx.Node) -> bool:
        """Returns whether the values of two nodes may share memory."""
        return self._storage[node] == self._storage[other]


def verified_evaluator(supernet: Supernet, images: Arguments | Tensor) -> tuple[IncrementalEvaluator | None, str]:
    """Returns an ``IncrementalEvaluator`` and "" if it agrees with full runs of the supernet; else None and the reason.

    A traced graph cannot reproduce code that depends on shapes or on the sizes of modules. Therefore one search step is
    run both ways, from a configuration just below the widest one, and the outputs are compared.

    Args:
        supernet: A supernet in evaluation mode. The selected configuration may change.
        images: A few images.
    """
    images = Arguments.of(images)
    current = dict(supernet.widest)
    for name, group in supernet.graph.groups.items():
        current[name] = max(group.unit, current[name] - group.unit)
    slimmer = {name: max(group.unit, current[name] - group.unit) for name, group in supernet.graph.groups.items()}

    def run_whole(channels: Mapping[str, int], batch: Arguments) -> list[Tensor]:
        supernet.select(channels)
        return output_tensors(batch.clone().run(supernet))  # the network may overwrite its input

    with torch.no_grad():
        expected = run_whole(current, images)
        generator = torch.Generator().manual_seed(0)
        tolerance = rounding_tolerance(
            lambda noisy: run_whole(current, noisy), images, expected, FLOAT32_FLOOR, generator
        )
        try:
            evaluator = IncrementalEvaluator(supernet)
            outputs = [
                (name, output_tensors(output)) for name, output in evaluator.run(images.clone(), current, slimmer)
            ]
        except Exception as error:  # the network's code may raise anything at sizes other than those of the trace
            return None, first_line(error)
        for slimmed, tensors in outputs:
            channels = current if slimmed is None else {**current, slimmed: slimmer[slimmed]}
            difference = relative_difference(run_whole(channels, images), tensors)
            if not difference <= tolerance:  # also if it is NaN
                return (
                    None,
                    f"with fewer channels of {slimmed} the outputs differ (relative difference {difference:.1g})",
                )
    return evaluator, ""
