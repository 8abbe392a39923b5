"""Incremental evaluation: running only the part of a supernet that a candidate changes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoslim.channels.copying import evaluation_mode
from autoslim.channels.equivalence import FLOAT32_FLOOR, output_tensors, relative_difference, rounding_tolerance
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis
from autoslim.channels.resize import kept
from autoslim.errors import first_line
from autoslim.supernet.supernet import Supernet
from autoslim.tracing.capture import symbolic_graph
from autoslim.tracing.interpreter import GraphRunner
from autoslim.tracing.operations import is_local, may_view, overwritten


class IncrementalEvaluator:
    """The operations of a supernet in order, and where each group begins to matter.

    A subnet with one group slimmed differs from the current one only from the group's first consumer on. Up to there
    its values are the current ones, less the channels taken away: a convolution's other outputs stay, and batch
    normalisation works channel by channel, on its own batch. So the current network runs once, and at the first
    operation that mixes a group's channels the subnet branches off and runs to its end (its *tail*), on slices.

    No more is held than the values that the current network still needs at that operation.

    Args:
        supernet: in evaluation mode, where ``forward`` must do the same for any data and any channels.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet
        graph = _traced(supernet)
        self.nodes = list(graph.nodes)
        self._runner = GraphRunner(supernet.network, graph)
        self._modules = self._runner.submodules
        self._last_use = {read: position for position, node in enumerate(self.nodes) for read in node.all_input_nodes}
        self._memory = _Memory(self.nodes, self._modules)
        self.start = {group: self._unshared(self._first_mixing(group)) for group in supernet.graph.groups}
        """Group -> the position of the first operation that mixes its channels; all before it are not run again."""

    def run(
        self, images: Tensor, current: Mapping[str, int], slimmer: Mapping[str, int]
    ) -> Iterator[tuple[str | None, Tensor]]:
        """Runs ``current`` on ``images`` (N, C, H, W), and each subnet with one group less.

        Args:
            slimmer: group -> its channels in the subnet that only it is slimmed in.

        Yields:
            (group, output) for each of ``slimmer``, in the order of the operations; then (None, output) of ``current``.
        """
        branches: dict[int, list[str]] = {}
        for group in slimmer:
            branches.setdefault(self.start[group], []).append(group)
        self.supernet.select(current)
        values: dict[fx.Node, Any] = {self.nodes[0]: images}
        for position, node in enumerate(self.nodes[1:], start=1):
            for group in branches.get(position, ()):
                narrow = {**current, group: slimmer[group]}
                self.supernet.select(narrow)
                yield group, self._finish(position, self._sliced(values, position, group, current, narrow))
                self.supernet.select(current)
            self._runner.step(node, values)
        yield None, values[self.nodes[-1]]

    def _finish(self, start: int, values: dict[fx.Node, Any]) -> Tensor:
        for node in self.nodes[start:]:
            self._runner.step(node, values)
        output: Tensor = values[self.nodes[-1]]
        return output

    def _sliced(
        self,
        values: Mapping[fx.Node, Any],
        start: int,
        group: str,
        current: Mapping[str, int],
        narrow: Mapping[str, int],
    ) -> dict[fx.Node, Any]:
        """The values at hand as the narrower subnet has them; those that its tail writes to are copies."""
        activations = self.supernet.graph.activations
        own = {}
        for node, value in values.items():
            where = activations.get(node.name)
            if where is not None and any(segment.group == group for segment in where[1]):
                value = _narrowed(value, *where, current, narrow)
            own[node] = value.clone() if self._memory.written(node) >= start else value
        return own

    def _first_mixing(self, group: str) -> int:
        graph = self.supernet.graph
        touched: set[fx.Node] = set()
        for position, node in enumerate(self.nodes):
            if _reads(node, group, graph) or touched.intersection(node.all_input_nodes):
                touched.add(node)
                if not is_local(node, group, graph, self._modules):
                    return position
        return len(self.nodes) - 1

    def _unshared(self, start: int) -> int:
        """The last position up to ``start`` where no memory that is written to later has two names: copies would part
        them."""
        alive = [node for node in self.nodes[:start] if self._last_use.get(node, -1) >= start]
        for number, node in enumerate(alive):
            if self._memory.written(node) >= start and any(self._memory.shared(node, o) for o in alive[:number]):
                return self._unshared(self.nodes.index(node))
        return start


def _traced(supernet: Supernet) -> fx.Graph:
    """The graph of the network in evaluation mode. The supernet's mode and selection are restored."""
    selected = dict(supernet.selected)
    supernet.select(supernet.widest)  # views of weights would hide the parameters from tracing
    try:
        with evaluation_mode(supernet):
            return symbolic_graph(supernet.network, supernet.graph.leaves)
    finally:
        supernet.select(selected)


def _reads(node: fx.Node, group: str, graph: ChannelGraph) -> bool:
    """Whether the operation's own tensors have channels of the group."""
    own = f"{node.target}."
    names = [name for name in graph.tensors if node.op == "call_module" and name.startswith(own)]
    if node.op == "get_attr":
        names = [str(node.target)]
    return any(s.group == group for name in names for axis in graph.tensors.get(name, ()) for s in axis)


def _narrowed(value: Tensor, dim: int, axis: Axis, current: Mapping[str, int], narrow: Mapping[str, int]) -> Tensor:
    pieces = [value.narrow(dim, start, length) for start, _, length in kept(axis, current, narrow)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class _Memory:
    """Which values may lie in the same memory, and when it is last written to."""

    def __init__(self, nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> None:
        self._place: dict[fx.Node, int] = {}
        self._written: dict[int, int] = {}
        for position, node in enumerate(nodes):
            over = overwritten(node, modules)
            shown = {self._place[other] for other in (node.all_input_nodes if may_view(node, modules) else over)}
            place = self._place[node] = min(shown, default=position)
            for other, known in self._place.items():
                if known in shown:
                    self._place[other] = place
            if over:
                self._written.update({self._place[other]: position for other in over})
            self._written[place] = max([-1, *(self._written.get(known, -1) for known in {place, *shown})])

    def written(self, node: fx.Node) -> int:
        """The last position of an operation that may write where the node's value lies."""
        return self._written[self._place[node]]

    def shared(self, node: fx.Node, other: fx.Node) -> bool:
        return self._place[node] == self._place[other]


def verified_evaluator(supernet: Supernet, images: Tensor) -> tuple[IncrementalEvaluator | None, str]:
    """Returns an ``IncrementalEvaluator`` if it agrees with whole runs of the supernet, otherwise None and the reason.

    Code that depends on shapes or on its modules' sizes cannot be reproduced from a traced graph. Therefore one search
    step is run both ways, from a configuration just below the widest one, and the outputs are compared.

    Args:
        supernet: A supernet in evaluation mode. Afterwards another configuration than before may be selected.
        images: A few images, (N, C, H, W).
    """
    current = dict(supernet.widest)
    for name, group in supernet.graph.groups.items():
        current[name] = max(group.unit, current[name] - group.unit)
    slimmer = {name: max(group.unit, current[name] - group.unit) for name, group in supernet.graph.groups.items()}

    def run_whole(channels: Mapping[str, int], batch: Tensor) -> list[Tensor]:
        supernet.select(channels)
        return output_tensors(supernet(batch.clone()))  # the network may overwrite its input

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
        except Exception as error:  # whatever the network's code raises at sizes other than those it was traced with
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
