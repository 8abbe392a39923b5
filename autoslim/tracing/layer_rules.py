"""Rules for layers with parameters: where labels come from, and which parameter axes they index."""

from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from autoslim.tracing.labels import Flow, Vector
from autoslim.tracing.operations import CONVOLUTIONS, NORMALISATIONS
from autoslim.tracing.record import Carrier, NoRuleError, Rule


def layer_rule(module: nn.Module) -> Rule | None:
    """The rule for a module with channels of its own."""
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
    _require_own_weight(module)
    flow = carrier.given(node)
    axis = len(flow.shape) - len(module.kernel_size) - 1
    if flow.axis is not None and flow.axis > axis:
        return _over_channels(carrier, node, flow, value)
    given = carrier.along(flow, axis, node)
    positions = value.numel() // (carrier.batch * module.out_channels)
    area = int(np.prod(module.kernel_size))
    produced = carrier.record.labels.produce(name, module.out_channels)
    if module.groups == 1:
        carrier.record.index(f"{name}.weight", 1, given)
        if area == 1:
            carrier.record.feeds[name] = given
        carrier.call(node, "conv", positions * area, given, produced, positions)
    else:
        _tie_groups(carrier, given, produced, module)
        depthwise = module.groups == module.in_channels
        if depthwise:
            carrier.record.depthwise.add(name)
        per_group = module.in_channels // module.groups
        carrier.call(
            node, "depthwise" if depthwise else "grouped", positions * area * per_group, None, produced, positions
        )
    _index_own(carrier, name, module, produced, given)
    return Flow(value.shape, axis, produced)


def _over_channels(carrier: Carrier, node: fx.Node, flow: Flow, value: Tensor) -> Flow:
    """Channels that lie where pixels do, as in efficient channel attention: a kernel slides over any number of them."""
    name, module = str(node.target), carrier.modules[str(node.target)]
    if flow.axis is None or value.shape[flow.axis] != flow.shape[flow.axis]:
        raise NoRuleError
    carrier.record.not_prunable.setdefault(name, "it slides over the channels")
    outputs = value.numel() // (carrier.batch * len(flow.vector))  # for each channel
    weight = module.get_parameter("weight")
    carrier.call(node, "conv", outputs * weight[0].numel(), None, flow.vector, outputs)
    return flow.reshaped_like(value.shape)


def _tie_groups(carrier: Carrier, given: Vector, produced: Vector, module: Any) -> None:
    """A grouped convolution is slimmed by whole groups: all channels of one come and go together."""
    reason = "a grouped convolution reads channels that must stay"
    leaders = given[:: module.in_channels // module.groups]
    for vector in (given, produced):
        carrier.record.labels.unite(np.repeat(leaders, len(vector) // len(leaders)), vector, reason)


def _linear(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, nn.Linear)
    _require_own_weight(module)
    flow = carrier.given(node)
    last = len(flow.shape) - 1
    if flow.axis == 0 < last:
        raise NoRuleError
    produced = carrier.record.labels.produce(name, module.out_features)
    if flow.axis is not None and flow.axis != last:
        # It mixes positions; the channels on another axis only pass through.
        carrier.record.labels.freeze(produced, "it mixes positions, not channels")
        outputs = value.numel() // (carrier.batch * len(flow.vector))  # for each channel
        carrier.call(node, "linear", outputs * module.in_features, None, flow.vector, outputs)
        return flow.reshaped_like(value.shape)
    given = carrier.along(flow, last, node)
    positions = value.numel() // (carrier.batch * module.out_features)
    carrier.record.index(f"{name}.weight", 1, given)
    carrier.call(node, "linear", positions, given, produced, positions)
    _index_own(carrier, name, module, produced, given)
    return Flow(value.shape, last, produced)


def _require_own_weight(module: nn.Module) -> None:
    """Weight and spectral normalisation compute the weight anew for each call: its axes cannot be cut."""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise NoRuleError


def _per_channel(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    module = carrier.modules[str(node.target)]
    vector = carrier.along(carrier.given(node), 1, node)
    if not isinstance(module, nn.PReLU) or module.num_parameters > 1:
        _index_own(carrier, str(node.target), module, vector)
    return Flow(value.shape, 1, vector)


def _layer_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    module = carrier.modules[str(node.target)]
    assert isinstance(module, nn.LayerNorm)
    flow = carrier.given(node)
    axis = len(flow.shape) - 1
    if type(module).forward is not nn.LayerNorm.forward and len(flow.shape) == 4 and flow.axis == 1:
        axis = 1  # a channels-first layer norm: it permutes inside
    elif len(module.normalized_shape) > 1:
        raise NoRuleError
    _index_own(carrier, str(node.target), module, carrier.along(flow, axis, node))
    return flow.reshaped_like(value.shape)


def _group_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    name, module = str(node.target), carrier.modules[str(node.target)]
    assert isinstance(module, nn.GroupNorm)
    vector = carrier.along(carrier.given(node), 1, node)
    if module.num_groups > 1:
        width = module.num_channels // module.num_groups
        reason = f"group norm {name} reads channels that must stay"
        carrier.record.labels.unite(np.repeat(vector[::width], width), vector, reason)
    _index_own(carrier, name, module, vector)
    return Flow(value.shape, 1, vector)


def _index_own(carrier: Carrier, name: str, module: nn.Module, outputs: Vector, inputs: Vector | None = None) -> None:
    """The first axis of the layer's own tensors (weight, bias, statistics, gains) is its output channels."""
    carrier.record.modules[name] = (outputs, inputs)
    for own in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
        for parameter, tensor in own:
            if tensor.dim() > 0 and tensor.shape[0] == len(outputs):
                carrier.record.index(f"{name}.{parameter}", 0, outputs)
