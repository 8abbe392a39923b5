"""What the rules of tracing share: the labels of the tensors so far, and the ways to write down what follows."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from autoslim.networks.tracing.flow import Flow
from autoslim.networks.tracing.labels import Vector
from autoslim.networks.tracing.record import Call, Record
from autoslim.networks.tracing.source import place_of


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
        for argument in leaves((node.args, node.kwargs)):
            if isinstance(argument, fx.Node):
                flow = self.flows[argument]
                if isinstance(flow, Flow):
                    return flow
        raise NoRuleError

    def all_given(self, node: fx.Node) -> list[Flow]:
        """The flows of all tensors that the node reads."""
        flows = fx.node.map_arg((node.args, node.kwargs), lambda other: self.flows[other])
        return [flow for flow in leaves(flows) if isinstance(flow, Flow)]

    def along(self, flow: Flow, axis: int, node: fx.Node) -> Vector:
        """The labels along ``axis``; where the tensor has its channels elsewhere, these must stay."""
        vector = flow.along(axis)
        if vector is None:
            self.fix([flow], f"{describe(node, self.modules)} reads its channels along another axis")
            return np.zeros(flow.shape[axis], np.int64)
        return vector

    def fix(self, flows: Sequence[Flow], reason: str) -> None:
        for flow in flows:
            self.record.labels.fix(flow.labels(), reason)

    def call(
        self, node: fx.Node, kind: str, factor: int, inputs: Vector | None, outputs: Vector, positions: int
    ) -> None:
        """Writes down a call that costs something (see ``graph.Layer`` for the numbers)."""
        name = str(node.target) if node.op == "call_module" else node.name
        weight = f"{name}.weight" if kind in ("conv", "depthwise", "grouped", "linear") else None
        self.record.calls.append(Call(name, kind, factor, inputs, outputs, positions, weight))


Rule = Callable[[Carrier, fx.Node, Any], Any]
"""(carrier, node, its value on the meta device) -> its flow. Raises ``NoRuleError``."""


def leaves(value: Any) -> Iterator[Any]:
    """What nested tuples, lists and dictionaries hold."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


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
    place = place_of(node)
    return f"{what} at {place}" if place else what


def operation(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
