"""Carries channel labels through a traced network, one rule for each kind of operation.

Anything without a rule keeps its channels as they are, with the operation and its place in the source as the reason: a
network may then be slimmed less, but never wrongly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from autoslim.networks.labels import Flow, Labels, Vector

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
LEAVES = (*CONVOLUTIONS, nn.Linear, *NORMALISATIONS, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
"""Modules, with their subclasses, that the rules know as a whole and that tracing does not look into."""

_AVERAGE_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_SPATIAL_MODULES = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.Upsample,
)
_MOVEMENT_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold)

# Operations by name, as functions (torch.x, F.x, operator.x) or as methods.
_ELEMENTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "radd",
        "rsub",
        "rmul",
        "pow",
        "neg",
        "abs",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "maximum",
        "minimum",
        "where",
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "softplus",
        "softsign",
        "logsigmoid",
        "softmax",
        "log_softmax",
        "dropout",
        "dropout_",
        "dropout2d",
        "alpha_dropout",
        "feature_dropout",
        "stochastic_depth",
        "contiguous",
        "clone",
        "detach",
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "type_as",
        "add_",
        "sub_",
        "mul_",
        "div_",
        "clamp_",
        "hardtanh_",
        "silu_",
        "sign",
        "square",
        "normalize",
        "identity",
        "bernoulli_",
    ]
)
_MOVEMENT = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
        "t",
        "squeeze",
        "unsqueeze",
        "cat",
        "concat",
        "concatenate",
        "stack",
        "chunk",
        "split",
        "tensor_split",
        "unbind",
        "narrow",
        "select",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "roll",
        "flip",
        "getitem",
        "channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "view_as",
        "reshape_as",
    ]
)
_SPATIAL = frozenset(
    [
        "avg_pool2d",
        "max_pool2d",
        "boolean_dispatch",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "adaptive_avg_pool1d",
        "adaptive_max_pool1d",
        "avg_pool1d",
        "max_pool1d",
        "interpolate",
        "pad",
        "lp_pool2d",
        "avg_pool3d",
        "max_pool3d",
        "adaptive_avg_pool3d",
    ]
)
_REDUCTIONS = frozenset(["mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "logsumexp"])
_SPLITS = frozenset(["chunk", "split", "tensor_split"])


@dataclass
class Call:
    """One convolution, linear layer or average pooling that ran, for the cost model."""

    name: str
    kind: str
    factor: int
    inputs: Vector | None  # labels of the input axis, for layers dense in it
    outputs: Vector
    positions: int
    weight: str | None


@dataclass
class Trace:
    """What propagation gathers: labels, the labels of every parameter axis, and the calls that cost something."""

    labels: Labels = field(default_factory=Labels)
    tensors: dict[str, dict[int, Vector]] = field(default_factory=dict)  # tensor name -> axis -> labels
    calls: list[Call] = field(default_factory=list)
    depthwise: set[str] = field(default_factory=set)
    feeds: dict[str, Vector] = field(default_factory=dict)  # dense 1x1 convolution -> labels of its input

    def record(self, tensor: str, axis: int, vector: Vector) -> None:
        """``tensor``'s ``axis`` is indexed by these channels; a tensor used twice serves the same channels twice."""
        axes = self.tensors.setdefault(tensor, {})
        if axis in axes:
            self.labels.unite(axes[axis], vector, f"{tensor} is used for channels that must stay")
        else:
            axes[axis] = vector


class Propagation(fx.Interpreter):
    """Runs a traced network on meta tensors and carries labels beside the values."""

    def __init__(self, module: fx.GraphModule, trace: Trace, batch: int) -> None:
        super().__init__(module)
        self.trace = trace
        self.batch = batch
        self.flows: dict[fx.Node, Any] = {}  # a Flow for a tensor, containers of them as the values are
        self.modules: dict[str, nn.Module] = dict(module.named_modules())

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.flows[n] = self._flow(n, value)
        return value

    def _flow(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            return _blank(value)
        if node.op == "get_attr":
            return self._parameter(str(node.target), value)
        if node.op == "output":
            self._fix(_flatten(self._flows_of(node.args)), "it is the network's output")
            return None
        if not any(isinstance(leaf, Tensor) for leaf in _flatten(value)):
            return None
        rule = self._rule(node)
        if rule is None:
            return self._unknown(node, value)
        return rule(node, value)

    def _rule(self, node: fx.Node) -> Callable[[fx.Node, Any], Any] | None:
        if node.op == "call_module":
            return self._module_rule(self.modules[str(node.target)])
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        for names, rule in (
            (_ELEMENTWISE, self._elementwise),
            (_MOVEMENT, self._movement),
            (_SPATIAL, self._spatial),
            (_REDUCTIONS, self._reduction),
        ):
            if name in names:
                return rule
        return self._functional_norm if name in ("layer_norm", "batch_norm") else None

    def _module_rule(self, module: nn.Module) -> Callable[[fx.Node, Any], Any] | None:
        rules: tuple[tuple[tuple[type, ...], Callable[[fx.Node, Any], Any]], ...] = (
            (CONVOLUTIONS, self._convolution),
            ((nn.Linear,), self._linear),
            ((*NORMALISATIONS, nn.PReLU), self._per_channel),
            ((nn.LayerNorm,), self._layer_norm),
            ((nn.GroupNorm,), self._group_norm),
            (_SPATIAL_MODULES, self._spatial),
            (_MOVEMENT_MODULES, self._movement),
        )
        for kinds, rule in rules:
            if isinstance(module, kinds):
                return rule
        known = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.linear")
        if type(module).__module__ in known and not isinstance(module, nn.MultiheadAttention | nn.Bilinear | nn.GLU):
            return self._elementwise
        return None

    # Layers with parameters

    def _convolution(self, node: fx.Node, value: Tensor) -> Flow:
        name, module = str(node.target), self.modules[str(node.target)]
        assert isinstance(module, CONVOLUTIONS)
        flow: Flow = self.flows[node.all_input_nodes[0]]
        axis = len(flow.shape) - len(module.kernel_size) - 1
        given = self._along(flow, axis, node)
        positions = value.numel() // (self.batch * module.out_channels)
        area = int(np.prod(module.kernel_size))
        produced = self.trace.labels.produce(name, module.out_channels)
        if module.groups == 1:
            self.trace.record(f"{name}.weight", 1, given)
            if area == 1:
                self.trace.feeds[name] = given
            self._call(node, "conv", positions * area, given, produced, positions)
        else:
            self._tie_groups(given, produced, module)
            if module.groups == module.in_channels:
                self.trace.depthwise.add(name)
            kind = "depthwise" if module.groups == module.in_channels else "grouped"
            per_group = module.in_channels // module.groups
            self._call(node, kind, positions * area * per_group, None, produced, positions)
        self._own_parameters(name, module, produced, module.out_channels)
        return Flow(value.shape, axis, produced) if produced.any() else Flow(value.shape)

    def _tie_groups(self, given: Vector, produced: Vector, module: Any) -> None:
        """A grouped convolution is slimmed by whole groups: all channels of one come and go together."""
        wide_in, wide_out = module.in_channels // module.groups, module.out_channels // module.groups
        reason = "a grouped convolution reads channels that must stay"
        for group in range(module.groups):
            inputs = given[group * wide_in : (group + 1) * wide_in]
            outputs = produced[group * wide_out : (group + 1) * wide_out]
            leader = inputs[:1]
            self.trace.labels.unite(np.repeat(leader, len(inputs)), inputs, reason)
            self.trace.labels.unite(np.repeat(leader, len(outputs)), outputs, reason)

    def _linear(self, node: fx.Node, value: Tensor) -> Flow:
        name, module = str(node.target), self.modules[str(node.target)]
        assert isinstance(module, nn.Linear)
        flow: Flow = self.flows[node.all_input_nodes[0]]
        positions = value.numel() // (self.batch * module.out_features)
        last = len(flow.shape) - 1
        if not flow.is_constant and not flow.is_mixed and flow.axis != last:
            # The layer mixes along another axis than the channels' one; these only pass through.
            vector = flow.along(flow.axis or 0)
            assert vector is not None and flow.axis is not None
            others = positions // max(1, len(vector)) if flow.axis else positions
            self._call(node, "linear", others * module.in_features * module.out_features, None, vector, positions)
            return Flow(value.shape, flow.axis, vector)
        given = self._along(flow, last, node)
        produced = self.trace.labels.produce(name, module.out_features)
        self.trace.record(f"{name}.weight", 1, given)
        self._call(node, "linear", positions, given, produced, positions)
        self._own_parameters(name, module, produced, module.out_features)
        return Flow(value.shape, last, produced) if produced.any() else Flow(value.shape)

    def _own_parameters(self, name: str, module: nn.Module, vector: Vector, size: int) -> None:
        """The first axis of the layer's own tensors (weight, bias, statistics, gains) is its output channels."""
        for own in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
            for parameter, tensor in own:
                if tensor.dim() > 0 and tensor.shape[0] == size:
                    self.trace.record(f"{name}.{parameter}", 0, vector)

    def _per_channel(self, node: fx.Node, value: Tensor) -> Flow:
        flow: Flow = self.flows[node.all_input_nodes[0]]
        module = self.modules[str(node.target)]
        vector = self._along(flow, 1, node)
        if not isinstance(module, nn.PReLU) or module.num_parameters > 1:
            self._own_parameters(str(node.target), module, vector, len(vector))
        return Flow(value.shape, 1, vector) if vector.any() else Flow(value.shape)

    def _layer_norm(self, node: fx.Node, value: Tensor) -> Flow:
        name, module = str(node.target), self.modules[str(node.target)]
        assert isinstance(module, nn.LayerNorm)
        flow: Flow = self.flows[node.all_input_nodes[0]]
        if type(module).forward is not nn.LayerNorm.forward and len(flow.shape) == 4 and flow.axis == 1:
            vector = self._along(flow, 1, node)  # a channels-first layer norm: it permutes inside
        elif len(module.normalized_shape) > 1:
            self._unknown(node, value)
            return Flow(value.shape)
        else:
            vector = self._along(flow, len(flow.shape) - 1, node)
        self._own_parameters(name, module, vector, len(vector))
        return flow.reshaped_like(value.shape)

    def _group_norm(self, node: fx.Node, value: Tensor) -> Flow:
        name, module = str(node.target), self.modules[str(node.target)]
        assert isinstance(module, nn.GroupNorm)
        vector = self._along(self.flows[node.all_input_nodes[0]], 1, node)
        if module.num_groups > 1:
            width = module.num_channels // module.num_groups
            for start in range(0, len(vector), width):
                group = vector[start : start + width]
                self.trace.labels.unite(
                    np.repeat(group[:1], len(group)), group, f"group norm {name} reads channels that must stay"
                )
        self._own_parameters(name, module, vector, len(vector))
        return Flow(value.shape, 1, vector) if vector.any() else Flow(value.shape)

    def _parameter(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        long = [axis for axis in range(value.dim()) if value.size(axis) > 1]
        if len(long) != 1:
            return Flow(value.shape)
        vector = self.trace.labels.produce(name, value.size(long[0]))
        if long[0] not in self.trace.tensors.get(name, {}):
            self.trace.record(name, long[0], vector)
        return Flow(value.shape, long[0], vector)

    def _functional_norm(self, node: fx.Node, value: Tensor) -> Flow:
        """``F.layer_norm`` and ``F.batch_norm`` with parameters of their own, as in channels-last networks."""
        flow: Flow = self.flows[node.all_input_nodes[0]]
        name = getattr(node.target, "__name__", "")
        axis = len(flow.shape) - 1 if name == "layer_norm" else 1
        vector = self._along(flow, axis, node)
        for other in node.all_input_nodes[1:]:
            parameter = self.flows.get(other)
            if isinstance(parameter, Flow) and not parameter.is_constant:
                self.trace.labels.unite(
                    vector, parameter.labels(), "it is normalised together with channels that must stay"
                )
        return flow.reshaped_like(value.shape)

    # Operations without parameters

    def _elementwise(self, node: fx.Node, value: Tensor) -> Flow:
        flows = [flow for flow in _flatten(self._flows_of((node.args, node.kwargs))) if isinstance(flow, Flow)]
        shape = value.shape
        if any(flow.is_mixed for flow in flows):
            if len(flows) == 1 and flows[0].shape == shape:
                return flows[0]
            self._unknown(node, value)
            return Flow(shape)
        leader = next((flow for flow in flows if flow.axis is not None), None)
        if leader is None or leader.axis is None:
            return Flow(shape)
        axis = leader.axis - len(leader.shape) + len(shape)
        for flow in flows:
            if flow is leader:
                continue
            own = axis - len(shape) + len(flow.shape)
            size = flow.shape[own] if own >= 0 else 1
            if size == len(leader.vector) and flow.axis in (None, own):
                other = flow.along(own)
                assert other is not None
                self.trace.labels.unite(
                    leader.vector, other, f"`{node.name}` joins it to a tensor of fixed size{_place(node)}"
                )
            elif not flow.is_constant:
                self._fix([leader, flow], f"`{node.name}` broadcasts channels against channels{_place(node)}")
        return Flow(shape, axis, leader.vector)

    def _movement(self, node: fx.Node, value: Any) -> Any:
        """Whatever only moves elements is run on the labels themselves."""
        if node.op == "call_module":
            flow: Flow = self.flows[node.all_input_nodes[0]]
            return Flow.of(self.modules[str(node.target)](flow.full()))
        flows = _flatten(self._flows_of((node.args, node.kwargs)))
        if all(flow.is_constant for flow in flows if isinstance(flow, Flow)):
            return fx.node.map_aggregate(value, lambda leaf: _blank(leaf))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._labels_or_value)
        if isinstance(node.target, str):
            method = (
                "reshape" if node.target == "view" else node.target
            )  # labels are views that repeat: not viewable again
            moved = getattr(args[0], method)(*args[1:], **kwargs)
        else:
            moved = node.target(*args, **kwargs)
        if isinstance(moved, Tensor):
            return Flow.of(moved)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        pieces = tuple(Flow.of(piece) if isinstance(piece, Tensor) else piece for piece in moved)
        if name in _SPLITS:
            self._tie_pieces(pieces)
        return pieces

    def _tie_pieces(self, pieces: Sequence[Any]) -> None:
        """Equal pieces of a split stay equal."""
        first = pieces[0]
        for piece in pieces[1:]:
            if (
                isinstance(piece, Flow)
                and piece.axis is not None
                and first.axis == piece.axis
                and len(piece.vector) == len(first.vector)
            ):
                self.trace.labels.unite(
                    first.vector, piece.vector, "its tensor is split evenly beside channels that must stay"
                )

    def _spatial(self, node: fx.Node, value: Tensor) -> Flow:
        flow: Flow = self.flows[node.all_input_nodes[0]]
        if flow.is_constant:
            return Flow(value.shape)
        if flow.is_mixed or flow.axis is None or value.shape[flow.axis] != flow.shape[flow.axis]:
            self._unknown(node, value)
            return Flow(value.shape)
        if self._is_average_pool(node):
            self._call(node, "avgpool", int(np.prod(flow.shape[2:])), None, flow.vector, int(np.prod(value.shape[2:])))
        return flow.reshaped_like(value.shape)

    def _is_average_pool(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], _AVERAGE_POOLS)
        return getattr(node.target, "__name__", "") in ("avg_pool2d", "adaptive_avg_pool2d")

    def _reduction(self, node: fx.Node, value: Any) -> Any:
        flow = self.flows[node.all_input_nodes[0]]
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(flow, Flow) or not isinstance(value, Tensor) or flow.is_mixed:
            return self._unknown(node, value)
        if flow.axis is None:
            return Flow(value.shape)
        if dims is None or not isinstance(dims, int | tuple | list):
            return self._unknown(node, value)
        reduced = sorted({int(dim) % len(flow.shape) for dim in ((dims,) if isinstance(dims, int) else dims)})
        if flow.axis in reduced:
            return Flow(value.shape)  # a sum over the channels, whatever their number
        kept = len(value.shape) == len(flow.shape)
        return Flow(
            value.shape, flow.axis if kept else flow.axis - sum(dim < flow.axis for dim in reduced), flow.vector
        )

    def _unknown(self, node: fx.Node, value: Any) -> Any:
        kind = type(self.modules[str(node.target)]).__name__ if node.op == "call_module" else node.name
        self._fix(_flatten(self._flows_of((node.args, node.kwargs))), f"`{kind}` has no slimming rule{_place(node)}")
        return fx.node.map_aggregate(value, lambda leaf: _blank(leaf))

    # Small pieces

    def _call(
        self, node: fx.Node, kind: str, factor: int, inputs: Vector | None, outputs: Vector, positions: int
    ) -> None:
        module = str(node.target) if node.op == "call_module" else node.name
        weight = f"{module}.weight" if kind != "avgpool" else None
        self.trace.calls.append(Call(module, kind, factor, inputs, outputs, positions, weight))

    def _along(self, flow: Flow, axis: int, node: fx.Node) -> Vector:
        vector = flow.along(axis)
        if vector is None:
            self._fix([flow], f"`{node.name}` reads it along another axis{_place(node)}")
            return np.zeros(flow.shape[axis], np.int64)
        return vector

    def _fix(self, flows: Sequence[Any], reason: str) -> None:
        for flow in flows:
            if isinstance(flow, Flow):
                self.trace.labels.fix(flow.labels(), reason)

    def _flows_of(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.flows[node])

    def _labels_or_value(self, node: fx.Node) -> Any:
        flow = self.flows[node]
        if flow is None:
            return self.env[node]
        return fx.node.map_aggregate(flow, lambda leaf: leaf.full() if isinstance(leaf, Flow) else leaf)


def _blank(value: Any) -> Any:
    return Flow(value.shape) if isinstance(value, Tensor) else value


def _flatten(value: Any) -> list[Any]:
    return list(_leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _place(node: fx.Node) -> str:
    """Where in the user's source an operation stands, as `` at file.py:12``."""
    frames = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    path, line = frames[-1].split(",")[:2]
    return f" at {path[5:].strip().strip(chr(34)).rsplit('/', 1)[-1]}:{line.replace('line', '').strip()}"
