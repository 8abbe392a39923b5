"""Rules for layers with parameters: which labels they create, and which axes of their parameters these index."""

from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from autoslim.tracing.labels import Flow, Vector
from autoslim.tracing.operations import CONVOLUTIONS, NORMALISATIONS
from autoslim.tracing.record import Carrier, NoRuleError, Rule
from autoslim.tracing.subclasses import computes_more


def layer_rule(module: nn.Module) -> Rule | None:
    """Returns the rule for a layer that has channels itself, or None."""
    if computes_more(module):
        return None
    rules: tuple[tuple[tuple[type, ...], Rule], ...] = (
        (CONVOLUTIONS, _convolution),
        ((nn.Linear,), _linear),
        ((*NORMALISATIONS, nn.PReLU), _per_channel),
        ((nn.LayerNorm,), _layer_norm),
        ((nn.GroupNorm,), _group_norm),
    )
    return next((rule for kinds, rule in rules if isinstance(module, kinds)), None)


def _convolution(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, CONVOLUTIONS)
    _require_stored_weight(module)
    flow = carrier.input_flow(node)
    axis = len(flow.shape) - len(module.kernel_size) - 1
    if flow.axis is not None and flow.axis > axis:
        return _over_channels(carrier, node, flow, value)
    inputs = carrier.along(flow, axis, node)
    positions = value.numel() // (carrier.batch * module.out_channels)
    area = int(np.prod(module.kernel_size))
    produced = carrier.record.labels.produce(name, module.out_channels)
    if module.groups == 1:
        carrier.record.index(f"{name}.weight", 1, inputs)
        if area == 1:
            carrier.record.feeds[name] = inputs
        carrier.call(node, "conv", positions * area, inputs, produced, positions)
    else:
        _tie_groups(carrier, inputs, produced, module)
        depthwise = module.groups == module.in_channels
        if depthwise:
            carrier.record.depthwise.add(name)
        per_group = module.in_channels // module.groups
        carrier.call(
            node, "depthwise" if depthwise else "grouped", positions * area * per_group, None, produced, positions
        )
    _index_parameters(carrier, name, module, produced, inputs)
    return Flow(value.shape, axis, produced)


def _over_channels(carrier: Carrier, node: fx.Node, flow: Flow, value: Tensor) -> Flow:
    """Handles a convolution that slides over any number of channels, as in efficient channel attention."""
    name, module = str(node.target), carrier.modules[str(node.target)]
    if flow.axis is None or value.shape[flow.axis] != flow.shape[flow.axis]:
        raise NoRuleError("it slides over the channels and changes their number")
    carrier.record.not_prunable.setdefault(name, "it slides over the channels")
    outputs = value.numel() // (carrier.batch * len(flow.vector))  # for each channel
    weight = module.get_parameter("weight")
    carrier.call(node, "conv", outputs * weight[0].numel(), None, flow.vector, outputs)
    return flow.reshaped_like(value.shape)


def _tie_groups(carrier: Carrier, inputs: Vector, produced: Vector, module: Any) -> None:
    """Unites the channels of each convolution group, because a grouped convolution is slimmed by whole groups."""
    reason = "a grouped convolution reads channels that are not prunable"
    leaders = inputs[:: module.in_channels // module.groups]
    for vector in (inputs, produced):
        carrier.record.labels.unite(np.repeat(leaders, len(vector) // len(leaders)), vector, reason)


def _linear(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, nn.Linear)
    _require_stored_weight(module)
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
    carrier.record.index(f"{name}.weight", 1, inputs)
    carrier.call(node, "linear", positions, inputs, produced, positions)
    _index_parameters(carrier, name, module, produced, inputs)
    return Flow(value.shape, last, produced)


def _require_stored_weight(module: nn.Module) -> None:
    """Raises ``NoRuleError`` if the weight is computed at each call, as by weight and spectral normalisation."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise NoRuleError("its weight is computed at each call")


def _per_channel(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    module = carrier.modules[str(node.target)]
    vector = carrier.along(carrier.input_flow(node), 1, node)
    if not isinstance(module, nn.PReLU) or module.num_parameters > 1:
        _index_parameters(carrier, str(node.target), module, vector)
    return Flow(value.shape, 1, vector)


def _layer_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    module = carrier.modules[str(node.target)]
    assert isinstance(module, nn.LayerNorm)
    flow = carrier.input_flow(node)
    axis = len(flow.shape) - 1
    if type(module).forward is not nn.LayerNorm.forward and len(flow.shape) == 4 and flow.axis == 1:
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
    carrier: Carrier, name: str, module: nn.Module, outputs: Vector, inputs: Vector | None = None
) -> None:
    """Records that output channels index the first axis of the layer's tensors (weight, bias, statistics, gains)."""
    carrier.record.modules[name] = (outputs, inputs)
    for tensors in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        for parameter, tensor in tensors:
            if tensor.dim() > 0 and tensor.shape[0] == len(outputs):
                carrier.record.index(f"{name}.{parameter}", 0, outputs)
