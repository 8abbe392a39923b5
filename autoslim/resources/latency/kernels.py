"""Kernels: the parts of a network that a backend runs as one unit, and the channels that their time depends on."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.copying import evaluation_mode, float_dtype, on_meta, zeroed
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
    """A tensor that a kernel reads, with its shape in the traced network for a batch of images."""

    name: str  # of the torch.fx node
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[tuple[int, Axis], ...]  # the dimensions of its channels, and these axes

    def at(self, channels: Mapping[str, int], default: Mapping[str, int]) -> Tensor:
        """Returns a tensor of ones with the shape that it has at ``channels``."""
        shape = [*self.shape]
        for dimension, axis in self.axes:
            shape[dimension] = shape[dimension] * axis_size(axis, channels) // axis_size(axis, default)
        return torch.ones(shape, dtype=self.dtype)


@dataclass(frozen=True)
class Kernel:
    """A layer with the normalisation and the activation after it, or another operation.

    Attributes:
        name: The name of its first torch.fx node.
        inputs: The groups that it reads but does not write, on which its time depends.
        outputs: The groups that it writes, on which its time depends.
        reads: The tensors that it reads.
        writes: The torch.fx node whose output is the kernel's output.
        module: The kernel as a network, with the widths of the traced network.
        graph: The channel graph of the network, restricted to the kernel's tensors.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[Reading, ...]
    writes: str
    module: fx.GraphModule
    graph: ChannelGraph

    def at(self, channels: Mapping[str, int]) -> tuple[nn.Module, list[Tensor]]:
        """Returns the kernel as a network with these channels, and tensors of ones as its inputs."""
        chosen = {**self.graph.default, **channels}
        module = resize(self.module, self.graph, chosen, seed=None).eval()
        return module, [reading.at(chosen, self.graph.default) for reading in self.reads]

    @property
    def work(self) -> str:
        """A description of its operations and shapes in the traced network that does not depend on torch's version."""
        modules = dict(self.module.named_modules())
        steps = []
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                module = modules[str(node.target)]
                settings = {name: getattr(module, name) for name in _SETTINGS if hasattr(module, name)}
                steps.append(type(module).__name__ + "".join(f" {name} {value}" for name, value in settings.items()))
            elif node.op.startswith("call_"):
                numbers = [
                    repr(value) for value in tree_leaves((node.args, node.kwargs)) if isinstance(value, int | float)
                ]
                steps.append(" ".join([operation(node), *numbers]))
        weights = ["x".join(map(str, value.shape)) for value in self.module.parameters() if value.dim() > 1]
        images = ["x".join(map(str, reading.shape)) or "number" for reading in self.reads]
        return f"{', '.join(steps)} {' '.join(weights)} of {', '.join(images) or 'nothing'}"


def find_kernels(network: nn.Module, graph: ChannelGraph, batch: int = 1) -> list[Kernel]:
    """Returns the kernels of a network in evaluation mode, in order, for batches of ``batch`` images.

    The batch norm and the activation after a layer belong to its kernel, because backends fuse them; so do views of its
    output. Any other operation is a separate kernel.

    Raises:
        UserError: If the network's code depends on shapes, so it cannot be divided, if it does not run on such a batch,
            or if only a part of it was traced.
    """
    if graph.part:
        raise UserError(
            f"latency requires a network that was traced as a whole, and only {graph.part!r} was: trace and measure "
            f"network.{graph.part} as a network of its own"
        )
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
    kernels = (_kernel(network, graph, modules, piece, known, shapes) for piece in pieces)
    return [kernel for kernel in kernels if kernel is not None]


def _operations(network: nn.Module, graph: ChannelGraph) -> fx.Graph:
    try:
        return symbolic_graph(network, graph.leaves, graph.inputs.zeros(1, "meta"))
    except UserError as error:
        raise UserError(f"latency requires a network that can be divided into kernels: {error}") from error


def _computes(node: fx.Node, known: Mapping[str, Operation]) -> bool:
    """Returns whether the operation computes tensors. Selecting one of several outputs computes none."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if operation(node) == "getitem" and known[node.all_input_nodes[0].name].shape is None:
        return False
    return known[node.name].shape is not None or bool(known[node.name].parts)


def _shapes(
    network: nn.Module, operations: fx.Graph, graph: ChannelGraph, batch: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and the dtype of the output of each operation that returns one tensor."""
    # Leaf modules may depend on data, which meta tensors do not have.
    prototype, device = (zeroed(network), "cpu") if graph.leaves else (on_meta(network), "meta")
    dtype = float_dtype(network)
    runner = _Shapes(prototype, operations, torch.device(device))
    try:
        with for_shapes(torch.device(device)):
            runner.run(*graph.inputs.zeros(batch, device).to(dtype).tensors)
    except Exception as error:  # the user's code may raise anything
        remedy = "correct the network" if batch == 1 else "measure latency with latency.batch 1, or correct the network"
        raise UserError(
            f"{type(network).__name__} does not run on a batch of {batch} images ({first_line(error)}); {remedy}"
        ) from error
    return runner.outputs


class _Shapes(GraphRunner):
    """Records the shape and the dtype of each operation's output."""

    def __init__(self, network: nn.Module, graph: fx.Graph, device: torch.device) -> None:
        super().__init__(network, graph, device)
        self.outputs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.outputs[n.name] = (tuple(value.shape), value.dtype)
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
    """Returns ``piece`` as a kernel, or None if it only returns its inputs or views of them."""
    own = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    reads: list[fx.Node] = []

    def copy(node: fx.Node) -> fx.Node:
        if node not in copied:
            if node in piece or node.op == "get_attr" or (known[node.name].shape is None and node.op != "placeholder"):
                for read in node.all_input_nodes:  # numbers and tuples are computed again where they are needed
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
        element_bytes={name: size for name, size in graph.element_bytes.items() if name in tensors},
        attributes=tuple(a for a in graph.attributes if a.module in paths),
    )
    outputs = _groups(written)
    weighed = {s.group: None for axes in part.tensors.values() for axis in axes for s in axis if s.group}
    inputs = tuple(group for group in dict.fromkeys((*_groups(read), *weighed)) if group not in outputs)
    readings = tuple(Reading(node.name, *shapes[node.name], known[node.name].axes) for node in reads)
    return Kernel(piece[0].name, inputs, tuple(outputs), readings, piece[-1].name, module, part)


def _tensors(operation: Operation) -> Sequence[Operation]:
    return operation.parts if operation.shape is None else [operation]


def _groups(operations: Sequence[Operation]) -> dict[str, None]:
    """Returns the groups on the operations' axes, in order."""
    axes = [axis for operation in operations for _, axis in operation.axes]
    return {segment.group: None for axis in axes for segment in axis if segment.group is not None}


def describe_kernel(module: nn.Module, values: Sequence[Tensor]) -> str:
    """Returns a description that is equal, in every process, for kernels that do the same on the same shapes."""
    assert isinstance(module, fx.GraphModule)
    numbers: dict[fx.Node, str] = {}
    lines = [str(_shapes_and_dtypes(values))]
    for number, node in enumerate(module.graph.nodes):
        what = node.op
        if node.op == "call_module":
            what = _described_module(str(node.target), module.get_submodule(str(node.target)))
        elif node.op == "get_attr":
            what = str(_shapes_and_dtypes([attrgetter(str(node.target))(module)]))
        elif node.op in ("call_function", "call_method"):
            what = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
        lines.append(f"{what} {fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__)}")
        numbers[node] = f"%{number}"
    return _ADDRESS.sub("", "\n".join(lines))


def _described_module(path: str, module: nn.Module) -> str:
    """Returns the repr of a module, which states all options of torch's modules, and the path of other modules."""
    parts = list(module.modules())
    known = all(type(part).__module__.startswith("torch.") for part in parts)
    return f"{module!r} {_shapes_and_dtypes(module.state_dict().values())}{'' if known else f' at {path}'}"


def _shapes_and_dtypes(values: Iterable[Any]) -> list[Any]:
    return [(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value for value in values]
