"""Kernels: the pieces of a network that a runtime runs in one go, and the channels that their time depends on."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.copying import evaluation_mode, on_meta, zeroed
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis, axis_size
from autoslim.channels.memory import Operation
from autoslim.channels.resize import resize
from autoslim.errors import UserError, first_line
from autoslim.tracing import operations as kinds
from autoslim.tracing.capture import symbolic_graph
from autoslim.tracing.interpreter import GraphRunner, for_shapes
from autoslim.tracing.operations import operation, overwritten

_FOLLOWING = kinds.ELEMENTWISE | kinds.MOVEMENT | kinds.PASSING | kinds.FUNCTIONAL_NORMS
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "output_size", "scale_factor", "num_heads")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_FOLLOWING_MODULES = (*kinds.NORMALISATIONS, *kinds.MOVEMENT_MODULES, nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Reading:
    """A tensor that a kernel reads: its shape in the network as traced, for a batch of images, and its channels."""

    name: str  # of the torch.fx node
    shape: tuple[int, ...]
    number_format: torch.dtype
    axis: tuple[int, Axis] | None

    def at(self, channels: Mapping[str, int], default: Mapping[str, int]) -> Tensor:
        shape = [*self.shape]
        if self.axis is not None:
            dimension, axis = self.axis
            shape[dimension] = shape[dimension] * axis_size(axis, channels) // axis_size(axis, default)
        return torch.ones(shape, dtype=self.number_format)


@dataclass(frozen=True)
class Kernel:
    """A layer with the normalisation and the activation after it, or another operation.

    Its time depends on the channels that it reads and does not write (``inputs``) and on those that it writes
    (``outputs``): groups, empty where there are none.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[Reading, ...]
    writes: str  # the torch.fx node whose output is the kernel's
    module: fx.GraphModule
    graph: ChannelGraph

    def at(self, channels: Mapping[str, int]) -> tuple[nn.Module, list[Tensor]]:
        """The kernel as a network of its own with these channels, and what it reads: ones."""
        chosen = {**self.graph.default, **channels}
        module = resize(self.module, self.graph, chosen).eval()
        return module, [reading.at(chosen, self.graph.default) for reading in self.reads]

    @property
    def work(self) -> str:
        """What it does and reads in the network as traced, in words that torch's versions share."""
        modules = dict(self.module.named_modules())
        done = []
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                module = modules[str(node.target)]
                settings = {name: getattr(module, name) for name in _SETTINGS if hasattr(module, name)}
                done.append(type(module).__name__ + "".join(f" {name} {value}" for name, value in settings.items()))
            elif node.op.startswith("call_"):
                told = [
                    repr(value) for value in tree_leaves((node.args, node.kwargs)) if isinstance(value, int | float)
                ]
                done.append(" ".join([operation(node), *told]))
        weights = ["x".join(map(str, value.shape)) for value in self.module.parameters() if value.dim() > 1]
        images = ["x".join(map(str, reading.shape)) or "number" for reading in self.reads]
        return f"{', '.join(done)} {' '.join(weights)} of {', '.join(images) or 'nothing'}"


def find_kernels(network: nn.Module, graph: ChannelGraph, batch: int = 1) -> list[Kernel]:
    """The kernels of a network in evaluation mode, in their order, for batches of ``batch`` images.

    A layer's batch normalisation and activation belong to it, as runtimes fuse them; so do views of its output. Any
    other operation is a kernel of its own.

    Raises:
        UserError: the network's code depends on shapes, so that it cannot be taken apart, or does not run on a batch.
    """
    with evaluation_mode(network):
        operations = _operations(network, graph)
        shapes = _shapes(network, operations, graph, batch)
    known = {operation.name: operation for operation in graph.operations}
    modules = dict(network.named_modules())
    pieces: list[list[fx.Node]] = []
    for node in operations.nodes:
        if not _computes(node, known):
            continue
        before = [read for read in node.all_input_nodes if read.op != "get_attr"]
        follows = pieces and before == [pieces[-1][-1]] and list(before[0].users) == [node]
        if follows and _can_follow(node, modules):
            pieces[-1].append(node)
        else:
            pieces.append([node])
    found = (_kernel(network, graph, modules, piece, known, shapes) for piece in pieces)
    return [kernel for kernel in found if kernel is not None]


def _operations(network: nn.Module, graph: ChannelGraph) -> fx.Graph:
    try:
        return symbolic_graph(network, graph.leaves)
    except UserError as error:
        raise UserError(f"latency needs a network that can be taken apart: {error}") from error


def _computes(node: fx.Node, known: Mapping[str, Operation]) -> bool:
    """Whether the operation makes a tensor, or several. To take one of several makes none."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if operation(node) == "getitem" and known[node.all_input_nodes[0].name].shape is None:
        return False
    return known[node.name].shape is not None or bool(known[node.name].parts)


def _shapes(
    network: nn.Module, operations: fx.Graph, graph: ChannelGraph, batch: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and the number format of each operation's output, where that is one tensor."""
    # Leaves may depend on data, which the meta device has none of.
    prototype, device = (zeroed(network), "cpu") if graph.leaves else (on_meta(network), "meta")
    number_format = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    runner = _Shapes(prototype, operations, torch.device(device))
    try:
        with for_shapes(torch.device(device)):
            runner.run(torch.zeros(batch, *graph.input_shape, dtype=number_format))
    except Exception as error:  # whatever the user's code raises
        remedy = "mend the network" if batch == 1 else "measure latency with latency.batch 1, or mend the network"
        raise UserError(
            f"{type(network).__name__} does not run on a batch of {batch} images ({first_line(error)}); {remedy}"
        ) from error
    return runner.found


class _Shapes(GraphRunner):
    def __init__(self, network: nn.Module, graph: fx.Graph, device: torch.device) -> None:
        super().__init__(network, graph, device)
        self.found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n.name] = (tuple(value.shape), value.dtype)
        return value


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
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> Kernel | None:
    """``piece`` as a network of its own; None where it only hands on what it reads."""
    own = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    reads: list[fx.Node] = []

    def copy(node: fx.Node) -> fx.Node:
        if node not in copied:
            if node in piece or node.op == "get_attr" or (known[node.name].shape is None and node.op != "placeholder"):
                for read in node.all_input_nodes:  # numbers and tuples are made anew where they are needed
                    copy(read)
                copied[node] = own.node_copy(node, copied.__getitem__)
            else:
                reads.append(node)
                copied[node] = own.placeholder(node.name)
        return copied[node]

    for node in piece:
        copy(node)
    own.output(copied[piece[-1]])
    read, written = [known[node.name] for node in reads], _tensors(known[piece[-1].name])
    writes_over = any(overwritten(node, modules) for node in piece)
    if not writes_over and {each.storage for each in written} <= {each.storage for each in read}:
        return None
    module = fx.GraphModule(network, own)
    tensors = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    paths = {path for path, _ in module.named_modules()}
    part = dataclasses.replace(
        graph,
        tensors={name: axes for name, axes in graph.tensors.items() if name in tensors},
        attributes=tuple(a for a in graph.attributes if a.module in paths),
    )
    outputs = _groups(written)
    weighed = {s.group: None for axes in part.tensors.values() for axis in axes for s in axis if s.group}
    inputs = tuple(group for group in dict.fromkeys((*_groups(read), *weighed)) if group not in outputs)
    readings = tuple(Reading(node.name, *shapes[node.name], known[node.name].axis) for node in reads)
    return Kernel(piece[0].name, inputs, tuple(outputs), readings, piece[-1].name, module, part)


def _tensors(operation: Operation) -> Sequence[Operation]:
    return operation.parts if operation.shape is None else [operation]


def _groups(operations: Sequence[Operation]) -> dict[str, None]:
    """The groups on the operations' axes, in order."""
    axes = [operation.axis[1] for operation in operations if operation.axis is not None]
    return {segment.group: None for axis in axes for segment in axis if segment.group is not None}


def described(module: nn.Module, values: Sequence[Tensor]) -> str:
    """What the kernel does and on what shapes: equal for kernels that take equally long, in every process alike."""
    assert isinstance(module, fx.GraphModule)
    place: dict[fx.Node, str] = {}
    lines = [str(_formats(values))]
    for number, node in enumerate(module.graph.nodes):
        what = node.op
        if node.op == "call_module":
            what = _told(str(node.target), module.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            what = str(_formats([attrgetter(str(node.target))(module)]))
        elif node.op in ("call_function", "call_method"):
            what = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
        lines.append(f"{what} {fx.node.map_arg((node.args, node.kwargs), place.__getitem__)}")
        place[node] = f"%{number}"
    return _ADDRESS.sub("", "\n".join(lines))


def _told(path: str, module: nn.Module) -> str:
    """What a module is. Torch's own write out what their time depends on; of others only their place is sure."""
    parts = list(module.modules())
    known = all(type(part).__module__.startswith("torch.") for part in parts)
    return f"{module!r} {_formats(module.state_dict().values())}{'' if known else f' at {path}'}"


def _formats(values: Iterable[Any]) -> list[Any]:
    return [(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value for value in values]
