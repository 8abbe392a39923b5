"""Rules for layers with parameters: which labels they create, and which axes of their parameters these index."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from autoslim.tracing.attributes import Source
from autoslim.tracing.labels import Flow, Vector
from autoslim.tracing.operations import (
    CONVOLUTIONS,
    LAST_AXIS_NORMS,
    NORMALISATIONS,
    RECURRENT,
    TRANSPOSED_CONVOLUTIONS,
)
from autoslim.tracing.record import Carrier, GroupedConvolution, NoRuleError, Rule, blank
from autoslim.tracing.subclasses import computes_more


def layer_rule(module: nn.Module) -> Rule | None:
    """Returns the rule for a layer that has channels itself, or None."""
    if computes_more(module):
        return None
    rules: tuple[tuple[tuple[type, ...], Rule], ...] = (
        ((*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS), _convolution),
        ((nn.Linear,), _linear),
        ((*NORMALISATIONS, nn.PReLU), _per_channel),
        (LAST_AXIS_NORMS, _layer_norm),
        ((nn.GroupNorm,), _group_norm),
        (RECURRENT, _recurrent),
    )
    return next((rule for kinds, rule in rules if isinstance(module, kinds)), None)


def _convolution(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
    weights = _weights(module)
    flow = carrier.input_flow(node)
    axis = len(flow.shape) - len(module.kernel_size) - 1
    if flow.axis is not None and flow.axis > axis:
        return _over_channels(carrier, node, flow, value)
    inputs = carrier.along(flow, axis, node)
    positions = value.numel() // (carrier.batch * module.out_channels)
    # The kernel is multiplied at each position of the output, or of the input of a transposed convolution.
    reads = flow.shape.numel() // (carrier.batch * module.in_channels) if module.transposed else positions
    factor = reads * int(np.prod(module.kernel_size))
    produced = carrier.record.labels.produce(name, module.out_channels)
    axes: tuple[Vector, ...]
    if module.groups == 1:
        if not module.transposed and np.prod(module.kernel_size) == 1:
            carrier.record.feeds[name] = inputs
        carrier.call(node, "conv", factor, inputs, produced, positions)
        axes = (inputs, produced) if module.transposed else (produced, inputs)
    else:
        per_group = module.in_channels // module.groups
        axes = (inputs,) if module.transposed else (produced,)
        if per_group == 1:
            carrier.record.depthwise.add(name)
            tie_groups(carrier, inputs, produced, per_group)
            carrier.call(node, "depthwise", factor, None, produced, positions)
        else:
            call = carrier.call(node, "grouped", factor * per_group, None, produced, positions)
            second = (produced if module.transposed else inputs)[: module.get_parameter(weights[0]).shape[1]]
            names = tuple(f"{name}.{weight}" for weight in weights if module.get_parameter(weight).shape[1] > 1)
            carrier.record.grouped.append(
                GroupedConvolution(name, module.groups, inputs, produced, call, names, second, module.transposed)
            )
    carrier.record.weights[f"{name}.{weights[0]}"] = int(module.transposed and module.groups == 1)
    _index_weights(carrier, name, module, weights, axes)
    _index_parameters(carrier, name, module, produced, inputs, weights)
    return Flow(value.shape, axis, produced)


def _over_channels(carrier: Carrier, node: fx.Node, flow: Flow, value: Tensor) -> Flow:
    """Handles a convolution that slides over any number of channels, as in efficient channel attention."""
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
    if module.transposed:
        raise NoRuleError("it slides over the channels")
    if flow.axis is None or value.shape[flow.axis] != flow.shape[flow.axis]:
        raise NoRuleError("it slides over the channels and changes their number")
    carrier.record.not_prunable.setdefault(name, "it slides over the channels")
    outputs = value.numel() // (carrier.batch * len(flow.vector))  # for each channel
    area = module.in_channels // module.groups * int(np.prod(module.kernel_size))
    carrier.call(node, "conv", outputs * area, None, flow.vector, outputs)
    return flow.reshaped_like(value.shape)


def tie_groups(carrier: Carrier, inputs: Vector, produced: Vector, per_group: int) -> None:
    """Unites the channels of each convolution group, because a grouped convolution is slimmed by whole groups.

    ``per_group`` is the number of input channels of each.
    """
    reason = "a grouped convolution reads channels that are not prunable"
    leaders = inputs[::per_group]
    for vector in (inputs, produced):
        carrier.record.labels.unite(np.repeat(leaders, len(vector) // len(leaders)), vector, reason)


def _linear(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, nn.Linear)
    weights = _weights(module)
    flow = carrier.input_flow(node)
    last = len(flow.shape) - 1
    if flow.axis == 0 < last:
        raise NoRuleError("it reads channels along the first axis")
    produced = carrier.record.labels.produce(name, module.out_features)
    if flow.axis is not None and flow.axis != last:
        # It mixes positions; the channels lie along another axis and are passed on.
        carrier.record.labels.freeze(produced, "it mixes positions, not channels")
        outputs = value.numel() // (carrier.batch * len(flow.vector))  # for each channel
        carrier.call(node, "linear", outputs * module.in_features, None, flow.vector, outputs)
        return flow.reshaped_like(value.shape)
    inputs = carrier.along(flow, last, node)
    positions = value.numel() // (carrier.batch * module.out_features)
    carrier.call(node, "linear", positions, inputs, produced, positions)
    carrier.record.weights[f"{name}.{weights[0]}"] = 0
    _index_weights(carrier, name, module, weights, (produced, inputs))
    _index_parameters(carrier, name, module, produced, inputs, weights)
    return Flow(value.shape, last, produced)


def _recurrent(carrier: Carrier, node: fx.Node, value: Any) -> Any:
    """Handles an LSTM, GRU or RNN: its input may be slimmed, and its hidden state keeps its size."""
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, RECURRENT)
    first = [f"weight_ih_l0{end}" for end in (("", "_reverse") if module.bidirectional else ("",))]
    if type(module) not in RECURRENT or any(weight not in module._parameters for weight in first):
        raise NoRuleError("its forward is overridden, or its weight is computed at each call")
    flow, *states = carrier.input_flows(node)
    if any(not state.is_constant for state in states):
        raise NoRuleError("its initial state has channels")
    last = len(flow.shape) - 1
    if len(flow.shape) != 3 or not (flow.is_constant or flow.is_mixed or flow.axis == last):
        raise NoRuleError("its channels lie along another axis than the last one of three")
    inputs = carrier.along(flow, last, node)
    for weight in first:
        carrier.record.weights[f"{name}.{weight}"] = None
        carrier.record.index(f"{name}.{weight}", 1, inputs)
    carrier.record.size(Source(name, "input_size"), inputs)
    rows = sum(len(module.get_parameter(weight)) for weight in first)
    others = sum(
        parameter.numel()
        for weight, parameter in module.named_parameters()
        if weight.startswith("weight_") and weight not in first
    )
    steps = flow.shape.numel() // (carrier.batch * module.input_size)
    carrier.call(node, "recurrent", steps, inputs, np.zeros(rows, np.int64), steps)
    carrier.call(node, "recurrent", steps * others, None, np.zeros(1, np.int64), 1)
    carrier.record.not_prunable.setdefault(name, "a recurrent layer keeps its hidden size; only its input is slimmed")
    return blank(value)


def _weights(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the layer's tensors that have the axes of its weight.

    These are the weight itself, or the two parameters of a normalised weight g * v / |v|, where the axes along which
    the norm is computed have the size 1 in g.

    Raises:
        NoRuleError: The weight is computed at each call in another way.
    """
    if isinstance(module._parameters.get("weight"), nn.Parameter):
        return ("weight",)
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, WeightNorm) and hook.name == "weight" for hook in hooks):
        return ("weight_v", "weight_g")
    if any(isinstance(hook, SpectralNorm) for hook in hooks):
        raise NoRuleError(_SPECTRAL)
    if is_parametrized(module, "weight"):
        steps = [type(step) for step in module.parametrizations["weight"]]  # type: ignore[index]
        if steps == [parametrizations._WeightNorm]:
            return ("parametrizations.weight.original1", "parametrizations.weight.original0")
        if parametrizations._SpectralNorm in steps:
            raise NoRuleError(_SPECTRAL)
    raise NoRuleError("its weight is computed at each call")


_SPECTRAL = "its spectral norm is estimated for the whole weight; remove the normalisation, or use weight norm"


def _index_weights(
    carrier: Carrier, name: str, module: nn.Module, weights: Sequence[str], axes: Sequence[Vector]
) -> None:
    """Records which channels index the first axes of a layer's weights."""
    for weight in weights:
        tensor = module.get_parameter(weight)
        for axis, vector in enumerate(axes[: tensor.dim()]):
            if tensor.shape[axis] == len(vector):
                carrier.record.index(f"{name}.{weight}", axis, vector)


def _per_channel(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    module = carrier.modules[str(node.target)]
    vector = carrier.along(carrier.input_flow(node), 1, node)
    if not isinstance(module, nn.PReLU) or module.num_parameters > 1:
        _index_parameters(carrier, str(node.target), module, vector)
    return Flow(value.shape, 1, vector)


def _layer_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    module = carrier.modules[str(node.target)]
    assert isinstance(module, LAST_AXIS_NORMS)
    flow = carrier.input_flow(node)
    axis = len(flow.shape) - 1
    if (
        type(module).forward not in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        and len(flow.shape) == 4
        and flow.axis == 1
    ):
        axis = 1  # a channels-first layer norm, which permutes inside
    elif len(module.normalized_shape) > 1:
        raise NoRuleError("it normalises over several axes")
    _index_parameters(carrier, str(node.target), module, carrier.along(flow, axis, node))
    return flow.reshaped_like(value.shape)


def _group_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, nn.GroupNorm)
    vector = carrier.along(carrier.input_flow(node), 1, node)
    if module.num_groups > 1:
        width = module.num_channels // module.num_groups
        reason = f"group norm {name} reads channels that are not prunable"
        carrier.record.labels.unite(np.repeat(vector[::width], width), vector, reason)
    _index_parameters(carrier, name, module, vector)
    return Flow(value.shape, 1, vector)


def _index_parameters(
    carrier: Carrier,
    name: str,
    module: nn.Module,
    outputs: Vector,
    inputs: Vector | None = None,
    weights: Sequence[str] = (),
) -> None:
    """Records that output channels index the first axis of the layer's other tensors (bias, statistics, gains)."""
    carrier.record.modules[name] = (outputs, inputs)
    for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        for parameter, tensor in tensors:
            if parameter not in weights and tensor.dim() > 0 and tensor.shape[0] == len(outputs):
                carrier.record.index(f"{name}.{parameter}", 0, outputs)
