"""What tracing records, and what the rules of operations share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.memory import Operation
from autoslim.tracing.capture import _FRAME, place
from autoslim.tracing.labels import Flow, Labels, Vector
from autoslim.tracing.operations import operation


def source_line(node: fx.Node) -> str:
    """The line of a ``forward`` that made this node."""
    return place((file, int(line)) for file, line in _FRAME.findall(node.stack_trace or ""))


@dataclass
class Call:
    """One convolution, linear layer or average pooling that ran, for the cost model (see ``graph.Layer``)."""

    name: str
    kind: str
    factor: int
    inputs: Vector | None  # labels of the input axis, for layers dense in it
    outputs: Vector
    positions: int
    weight: str | None


@dataclass
class Record:
    """Labels, the labels of every parameter's axes, and the calls that cost something.

    A parameter that a network has under several names is written down under the first.
    """

    first_name: dict[str, str]  # a parameter's or buffer's name -> the first name of the same tensor
    labels: Labels = field(default_factory=Labels)
    tensors: dict[str, dict[int, Vector]] = field(default_factory=dict)  # tensor -> axis -> labels
    modules: dict[str, tuple[Vector, Vector | None]] = field(default_factory=dict)  # path -> labels out, labels in
    calls: list[Call] = field(default_factory=list)
    depthwise: set[str] = field(default_factory=set)
    feeds: dict[str, Vector] = field(default_factory=dict)  # dense 1x1 convolution -> labels of its input
    not_prunable: dict[str, str] = field(default_factory=dict)  # layers without a rule, and why
    flows: dict[str, Flow] = field(default_factory=dict)  # operation -> where its output's channels lie
    operations: tuple[Operation, ...] = ()  # in evaluation mode, without their axes
    outputs: dict[str, Flow] = field(default_factory=dict)  # the flows of their outputs, and of the parts of these

    def index(self, tensor: str, axis: int, vector: Vector) -> None:
        """``tensor``'s ``axis`` is indexed by these channels; a tensor used twice serves the same channels twice."""
        tensor = self.first_name.get(tensor, tensor)
        axes = self.tensors.setdefault(tensor, {})
        if axis in axes:
            self.labels.unite(axes[axis], vector, f"{tensor} is used for channels that must stay")
        else:
            axes[axis] = vector


class NoRuleError(Exception):
    """An operation, or a use of it, that channels cannot be followed through."""


class Carrier:
    """The flows of a network's nodes, and the record that rules write to.

    ``flows`` holds for each node a ``Flow`` where its value is a tensor, None where it is a plain value, and containers
    of these where it is one.
    """

    def __init__(self, modules: dict[str, nn.Module], record: Record, batch: int) -> None:
        self.modules = modules
        self.record = record
        self.batch = batch
        self.flows: dict[fx.Node, Any] = {}
        self.values: dict[fx.Node, Any] = {}  # plain values: sizes and the like

    def given(self, node: fx.Node) -> Flow:
        """The flow of the first tensor that the node reads."""
        for argument in tree_leaves((node.args, node.kwargs)):
            if isinstance(argument, fx.Node):
                flow = self.flows[argument]
                if isinstance(flow, Flow):
                    return flow
        raise NoRuleError

    def all_given(self, node: fx.Node) -> list[Flow]:
        """The flows of all tensors that the node reads."""
        flows = fx.node.map_arg((node.args, node.kwargs), lambda other: self.flows[other])
        return [flow for flow in tree_leaves(flows) if isinstance(flow, Flow)]

    def along(self, flow: Flow, axis: int, node: fx.Node) -> Vector:
        """The labels along ``axis``; where the tensor has its channels elsewhere, these must stay."""
        vector = flow.along(axis)
        if vector is None:
            self.freeze([flow], f"{describe(node, self.modules)} reads its channels along another axis")
            return np.zeros(flow.shape[axis], np.int64)
        return vector

    def freeze(self, flows: Sequence[Flow], reason: str) -> None:
        for flow in flows:
            self.record.labels.freeze(flow.labels(), reason)

    def call(
        self, node: fx.Node, kind: str, factor: int, inputs: Vector | None, outputs: Vector, positions: int
    ) -> None:
        """Writes down a call that costs something (see ``graph.Layer`` for the numbers)."""
        name = str(node.target) if node.op == "call_module" else node.name
        weight = f"{name}.weight" if kind in ("conv", "depthwise", "grouped", "linear") else None
        self.record.calls.append(Call(name, kind, factor, inputs, outputs, positions, weight))


Rule = Callable[[Carrier, fx.Node, Any], Any]
"""(carrier, node, its value on the meta device) -> its flow. Raises ``NoRuleError``."""


def blank(value: Any) -> Any:
    """The flow of a value that holds no channels."""
    if isinstance(value, tuple | list):
        return tuple(blank(item) for item in value)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    return Flow(value.shape) if isinstance(value, Tensor) else None


def describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """An operation and its place in the user's source: ``ConvTranspose2d `up` at net.py:12``."""
    if node.op == "call_module":
        what = f"{type(modules[str(node.target)]).__name__} `{node.target}`"
    else:
        what = f"`{operation(node)}`"
    place = source_line(node)
    return f"{what} at {place}" if place else what
