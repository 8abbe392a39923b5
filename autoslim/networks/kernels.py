"""Kernels: the pieces of a network that a runtime runs in one go, and the channels that their time depends on."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autoslim.networks.axes import Operation, axis_size
from autoslim.networks.graph import ChannelGraph
from autoslim.networks.resizing import resize
from autoslim.networks.tracing import operations as kinds
from autoslim.networks.tracing.carrying import leaves, operation
from autoslim.networks.tracing.locality import overwritten
from autoslim.networks.tracing.symbolic import symbolic_graph
from autoslim.vocabulary.errors import UserError

_FOLLOWING = kinds.ELEMENTWISE | kinds.MOVEMENT | kinds.PASSING | kinds.FUNCTIONAL_NORMS
_FOLLOWING_MODULES = (*kinds.NORMALISATIONS, *kinds.MOVEMENT_MODULES, nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Kernel:
    """A layer with the normalisation and the activation after it, or another operation.

    Its time depends on the channels that it reads and does not write (``inputs``) and on those that it writes
    (``outputs``): groups, empty where there are none.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[Operation, ...]
    writes: Operation
    module: fx.GraphModule
    graph: ChannelGraph

    def at(self, channels: Mapping[str, int], batch: int) -> tuple[nn.Module, list[Tensor]]:
        """The kernel as a network of its own with these channels, and what it reads: ones, for ``batch`` images."""
        module = resize(self.module, self.graph, {**self.graph.default, **channels}).eval()
        return module, [torch.ones(_shape(operation, channels, batch)) for operation in self.reads]


def find_kernels(network: nn.Module, graph: ChannelGraph) -> list[Kernel]:
    """The kernels of a network in evaluation mode, in their order.

    A layer's batch normalisation and activation belong to it, as runtimes fuse them; so do views of its output. Any
    other operation is a kernel of its own.

    Raises:
        UserError: the network's code depends on shapes, so that it cannot be taken apart.
    """
    training = network.training
    try:
        nodes = [node for node in symbolic_graph(network.eval(), graph.leaves).nodes if node.op != "output"]
    except UserError as error:
        raise UserError(f"latency needs a network that can be taken apart: {error}") from error
    finally:
        network.train(training)
    known = {operation.name: operation for operation in graph.operations}
    modules = dict(network.named_modules())
    computed = [n for n in nodes if n.op not in ("placeholder", "get_attr") and known[n.name].shape is not None]
    pieces: list[list[fx.Node]] = []
    for node in computed:
        before = [read for read in node.all_input_nodes if read.op != "get_attr"]
        follows = pieces and before == [pieces[-1][-1]] and list(before[0].users) == [node]
        if follows and _can_follow(node, modules):
            pieces[-1].append(node)
        else:
            pieces.append([node])
    return [kernel for piece in pieces if (kernel := _kernel(network, graph, modules, piece, known)) is not None]


def _can_follow(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, kinds.NOT_ELEMENTWISE):
            return False
        return isinstance(module, _FOLLOWING_MODULES) or type(module).__module__ in kinds.ELEMENTWISE_HOMES
    return operation(node) in _FOLLOWING


def _kernel(
    network: nn.Module,
    graph: ChannelGraph,
    modules: Mapping[str, nn.Module],
    piece: Sequence[fx.Node],
    known: Mapping[str, Operation],
) -> Kernel | None:
    """``piece`` as a network of its own; None where it only hands on what it reads."""
    own = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    reads: list[Operation] = []

    def copy(node: fx.Node) -> fx.Node:
        if node not in copied:
            if node in piece or node.op == "get_attr" or (known[node.name].shape is None and node.op != "placeholder"):
                for read in node.all_input_nodes:  # numbers and tuples are made anew where they are needed
                    copy(read)
                copied[node] = own.node_copy(node, copied.__getitem__)
            else:
                reads.append(known[node.name])
                copied[node] = own.placeholder(node.name)
        return copied[node]

    for node in piece:
        copy(node)
    own.output(copied[piece[-1]])
    writes_over = any(overwritten(node, modules) for node in piece)
    if not writes_over and known[piece[-1].name].storage in {operation.storage for operation in reads}:
        return None
    module = fx.GraphModule(network, own)
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    paths = {path for path, _ in module.named_modules()}
    part = dataclasses.replace(
        graph,
        tensors={name: axes for name, axes in graph.tensors.items() if name in tensors},
        attributes=tuple(a for a in graph.attributes if a.module in paths),
    )
    last = known[piece[-1].name]
    written = _groups([last])
    weighed = {s.group: None for axes in part.tensors.values() for axis in axes for s in axis if s.group}
    inputs = tuple(group for group in dict.fromkeys((*_groups(reads), *weighed)) if group not in written)
    return Kernel(piece[0].name, inputs, tuple(written), tuple(reads), last, module, part)


def _groups(operations: Sequence[Operation]) -> dict[str, None]:
    """The groups on the operations' axes, in order."""
    axes = [operation.axis[1] for operation in operations if operation.axis is not None]
    return {segment.group: None for axis in axes for segment in axis if segment.group is not None}


def _shape(operation: Operation, channels: Mapping[str, int], batch: int) -> tuple[int, ...]:
    assert operation.shape is not None
    shape = [*operation.shape]
    if operation.axis is not None:
        dimension, axis = operation.axis
        shape[dimension] = axis_size(axis, channels)
    if shape[0] == 1:
        shape[0] = batch
    return tuple(shape)


def described(module: nn.Module, values: Sequence[Tensor]) -> str:
    """What the kernel does and on what shapes: equal for kernels that take equally long."""
    assert isinstance(module, fx.GraphModule)
    place: dict[fx.Node, int] = {}

    def told(argument: Any) -> str:
        return f"%{place[argument]}" if isinstance(argument, fx.Node) else repr(argument)

    lines = [str([tuple(value.shape) for value in values])]
    for number, node in enumerate(module.graph.nodes):
        what: object = node.target if node.op in ("call_function", "call_method") else node.op
        if node.op == "call_module":
            what = module.get_submodule(str(node.target))
        lines.append(f"{what} {[told(argument) for argument in leaves((node.args, node.kwargs))]}")
        place[node] = number
    return "\n".join(lines)
