"""The record that tracing fills in, and functions that the rules of operations share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.memory import Operation
from autoslim.tracing.attributes import Source
from autoslim.tracing.capture import _FRAME, user_line
from autoslim.tracing.labels import Flow, Labels, Vector, WeightFlow
from autoslim.tracing.operations import operation


def source_line(node: fx.Node) -> str:
    """Returns the line of the user's code that created this node, as ``net.py:12``, or ''."""
    return user_line((file, int(line)) for file, line in _FRAME.findall(node.stack_trace or ""))


@dataclass
class Call:
    """A call of a convolution, a linear layer or an average pooling, for the cost model (see ``graph.Layer``)."""

    name: str
    kind: str
    factor: int
    inputs: Vector | None  # labels of the input axis, for layers dense in it
    outputs: Vector
    positions: int
    weight: str | None

    @property
    def macs(self) -> int:
        """The multiply-adds for one image."""
        return self.factor * len(self.outputs) * (1 if self.inputs is None else len(self.inputs))


@dataclass(frozen=True)
class GroupedConvolution:
    """A call of a convolution with several groups that is not depthwise, until it is decided how it is slimmed.

    Whole groups of its channels can be removed, or the same channels of all groups. The second is possible more often,
    for example around a channel shuffle.
    """

    name: str
    groups: int
    inputs: Vector
    outputs: Vector
    call: Call
    weights: tuple[str, ...]  # names of its tensors with the axes of the weight
    second_axis: Vector  # labels of the weight's second axis if it is slimmed within the groups
    transposed: bool

    def unite(self, labels: Labels, *, within: bool) -> None:
        """Unites the channels that are removed together. ``within`` removes the same channels of all groups."""
        for vector in (self.inputs, self.outputs):
            rows = vector.reshape(self.groups, -1)
            first = np.broadcast_to(rows[:1] if within else rows[:, :1], rows.shape).flatten()
            labels.unite(first, vector, _READ_BY_GROUPED)
        if not within:
            each = len(self.outputs) // self.groups
            labels.unite(self.inputs[:: len(self.inputs) // self.groups], self.outputs[::each], _READ_BY_GROUPED)


_READ_BY_GROUPED = "a grouped convolution reads channels that are not prunable"


@dataclass
class Record:
    """The labels of all layers, the labels of every parameter's axes, and the calls that cost multiply-adds.

    A parameter that has several names is recorded under the first.
    """

    first_name: dict[str, str]  # a parameter's or buffer's name -> the first name of the same tensor
    labels: Labels = field(default_factory=Labels)
    tensors: dict[str, dict[int, Vector]] = field(default_factory=dict)  # tensor -> dimension -> labels of its entries
    modules: dict[str, tuple[Vector, Vector | None]] = field(default_factory=dict)  # path -> output and input labels
    calls: list[Call] = field(default_factory=list)
    depthwise: set[str] = field(default_factory=set)
    grouped: list[GroupedConvolution] = field(default_factory=list)  # those for which it is not yet decided
    slimmed_within: set[str] = field(default_factory=set)  # grouped convolutions that keep the number of groups
    weights: dict[str, int | None] = field(default_factory=dict)  # weight -> axis along which it produces channels
    weight_uses: list[tuple[Vector, bool]] = field(default_factory=list)  # labels of a used weight's axis, if produced
    weight_axes: list[tuple[Vector, Vector]] = field(default_factory=list)  # of a used weight: produced, and read
    combined: list[tuple[Vector, Vector]] = field(default_factory=list)  # labels of tensors that make up a weight
    feeds: dict[str, Vector] = field(default_factory=dict)  # dense 1x1 convolution -> labels of its input
    functional: set[str] = field(default_factory=set)  # layers written as functions
    not_prunable: dict[str, str] = field(default_factory=dict)  # layers without a rule -> reason
    not_counted: dict[str, str] = field(default_factory=dict)  # operation -> description
    flows: dict[str, Flow] = field(default_factory=dict)  # operation -> labels of its output
    sizes: dict[Source, Vector] = field(default_factory=dict)  # attribute of a module -> labels of the axis it sizes
    written: list[Vector] = field(default_factory=list)  # labels of axes whose size is a number in the code
    batch_norms: dict[str, None] = field(default_factory=dict)  # calls of F.batch_norm that a supernet cannot run
    operations: tuple[Operation, ...] = ()  # in evaluation mode, not yet with their axes
    outputs: dict[str, Flow | WeightFlow] = field(default_factory=dict)  # operation or part of its output -> labels

    def index(self, tensor: str, axis: int, vector: Vector) -> None:
        """Records that ``vector`` labels an axis of a parameter, and unites it with the labels of an earlier use."""
        tensor = self.first_name.get(tensor, tensor)
        axes = self.tensors.setdefault(tensor, {})
        if axis in axes:
            self.labels.unite(axes[axis], vector, f"{tensor} is also used for channels that are not prunable")
        else:
            axes[axis] = vector

    def size(self, source: Source, vector: Vector) -> None:
        """Records that an attribute of a module is the size of an axis, and unites it with the axes of other uses."""
        first = self.sizes.setdefault(source, vector)
        if first is not vector and len(first) == len(vector):
            self.labels.unite(first, vector, f"{source.name} of {source.module} is also the size of another axis")

    def written_roots(self) -> set[int]:
        """Returns the roots of the channels whose number is written in the code of ``forward``."""
        return {root for vector in self.written for root in self.labels.roots(vector[vector != 0]).tolist()}


class NoRuleError(Exception):
    """Raised by a rule if channels cannot be followed through this use of an operation. The message gives the reason.

    A rule raises it before it unites labels.
    """


class Carrier:
    """The state of a propagation: the flows of the nodes run so far, and the record that the rules fill in.

    ``flows`` maps each node to a ``Flow`` if its value is a tensor, to None if it is a plain value, and to a container
    of these if it is a container.
    """

    def __init__(self, modules: dict[str, nn.Module], record: Record, batch: int, at_one_size: bool) -> None:
        self.modules = modules
        self.at_one_size = at_one_size  # whether the graph has all sizes as numbers, wherever they come from
        self.record = record
        self.batch = batch
        self.flows: dict[fx.Node, Any] = {}
        self.mixed_sizes: list[tuple[Source, Flow, int]] = []  # sizes of a flow's axis, if channels lie along several
        self.values: dict[fx.Node, Any] = {}  # values other than tensors, such as sizes

    def input_flow(self, node: fx.Node) -> Flow:
        """Returns the flow of the first tensor that the node reads."""
        for argument in tree_leaves((node.args, node.kwargs)):
            if isinstance(argument, fx.Node):
                flow = self.flows[argument]
                if isinstance(flow, Flow):
                    return flow
        raise NoRuleError("it reads no tensor")

    def input_flows(self, node: fx.Node) -> list[Flow]:
        """Returns the flows of all tensors that the node reads."""
        return [flow for flow in self.all_flows(node) if isinstance(flow, Flow)]

    def all_flows(self, node: fx.Node) -> list[Flow | WeightFlow]:
        """Returns the flows of all tensors that the node reads, weights included."""
        flows = fx.node.map_arg((node.args, node.kwargs), lambda other: self.flows[other])
        return [flow for flow in tree_leaves(flows) if isinstance(flow, Flow | WeightFlow)]

    def along(self, flow: Flow, axis: int, node: fx.Node) -> Vector:
        """Returns the labels along ``axis``. If the channels lie along another axis, they become not prunable.

        If they lie along several axes, such as those of a linear layer that are arranged as maps, the channels at the
        same place along ``axis`` are united, and lie along ``axis`` from then on.
        """
        self.gather(flow, axis, node)
        vector = flow.along(axis)
        if vector is None:
            self.freeze([flow], f"{describe(node, self.modules)} reads its channels along another axis")
            return np.zeros(flow.shape[axis], np.int64)
        return vector

    def gather(self, flow: Flow, axis: int, node: fx.Node) -> None:
        """Unites the channels at the same place along ``axis`` if they lie along it and other axes, not the batch."""
        varying = flow.varying() if flow.is_mixed else []
        if axis not in varying or 0 in varying:
            return
        first, labels = flow.gather(axis)
        reason = f"{describe(node, self.modules)} reads it together with channels that are not prunable"
        self.record.labels.unite(first, labels, reason)
        for source, sized, dimension in self.mixed_sizes:
            known = Flow.of(torch.from_numpy(self.record.labels.roots(sized.full().numpy())))
            if known.axis == dimension:  # also if that tensor was reshaped or permuted after it got its sizes
                self.record.size(source, known.vector)

    def freeze(self, flows: Sequence[Flow | WeightFlow], reason: str) -> None:
        """Makes all channels of these tensors not prunable."""
        for flow in flows:
            self.record.labels.freeze(flow.labels(), reason)

    def call(
        self,
        node: fx.Node,
        kind: str,
        factor: int,
        inputs: Vector | None,
        outputs: Vector,
        positions: int,
        name: str | None = None,
    ) -> Call:
        """Records and returns a call that costs multiply-adds (see ``graph.Layer`` for the numbers)."""
        name = name or (str(node.target) if node.op == "call_module" else node.name)
        stored = node.op == "call_module" and kind in ("conv", "depthwise", "grouped", "linear")
        weight = f"{name}.weight" if stored else None
        self.record.calls.append(Call(name, kind, factor, inputs, outputs, positions, weight))
        return self.record.calls[-1]


Rule = Callable[[Carrier, fx.Node, Any], Any]
"""(carrier, node, its value on the meta device) -> the flow of the value. May raise ``NoRuleError``."""


def blank(value: Any) -> Any:
    """Returns the flow of a value without channels."""
    if isinstance(value, tuple | list):
        return tuple(blank(item) for item in value)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    return Flow(value.shape) if isinstance(value, Tensor) else None


def describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Returns an operation and its line in the user's source, as ``ConvTranspose2d `up` at net.py:12``."""
    if node.op == "call_module":
        what = f"{type(modules[str(node.target)]).__name__} `{node.target}`"
    elif operation(node) == "getattr":
        what = f"`.{node.args[1]}`"
    else:
        what = f"`{operation(node)}`"
    line = source_line(node)
    return f"{what} at {line}" if line else what
