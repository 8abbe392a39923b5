"""Rules for operations that bring tensors together: channels that meet are united."""

import numpy as np
import torch
from torch import Tensor, fx

from autoslim.networks.tracing.carrying import Carrier, NoRuleError, describe, operation
from autoslim.networks.tracing.flow import Flow
from autoslim.networks.tracing.labels import Vector


def elementwise(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """Sums, products, activations: element by element, the smaller tensor repeated."""
    flows = carrier.all_given(node)
    shape = value.shape
    if any(flow.is_mixed for flow in flows):
        return _mixed(carrier, node, flows, shape)
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
            carrier.record.labels.unite(leader.vector, other, _joined_to_fixed(carrier, node))
        elif not flow.is_constant:
            reason = f"{describe(node, carrier.modules)} broadcasts channels against channels"
            carrier.fix([leader, flow], reason)
    return Flow(shape, axis, leader.vector)


def _mixed(carrier: Carrier, node: fx.Node, flows: list[Flow], shape: torch.Size) -> Flow:
    """Where channels lie along several axes, as in the branches of a selective kernel, every element is united."""
    leader = next((flow for flow in flows if flow.is_mixed and flow.shape == shape), None)
    if leader is None:
        raise NoRuleError
    for flow in flows:
        if flow is leader:
            continue
        sizes = (1,) * (len(shape) - len(flow.shape)) + tuple(flow.shape)
        if flow.is_constant and all(sizes[axis] == 1 for axis in leader.varying()):
            continue
        one, other = torch.broadcast_tensors(leader.narrowed(), flow.narrowed())
        carrier.record.labels.unite(one.flatten().numpy(), other.flatten().numpy(), _joined_to_fixed(carrier, node))
    return leader


def _joined_to_fixed(carrier: Carrier, node: fx.Node) -> str:
    return f"{describe(node, carrier.modules)} joins it to a tensor of fixed size"


def functional_norm(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """``F.layer_norm``, ``F.batch_norm`` and the like with a number for each channel, as in channels-last networks."""
    flow, *parameters = carrier.all_given(node)
    vector = carrier.along(flow, len(flow.shape) - 1 if operation(node) == "layer_norm" else 1, node)
    for parameter in parameters:
        if not parameter.is_constant:
            reason = "it is normalised together with channels that must stay"
            carrier.record.labels.unite(vector, parameter.labels(), reason)
    return flow.reshaped_like(value.shape)


def matrix_product(carrier: Carrier, node: fx.Node, value: Tensor) -> Flow:
    """A product of two stacks of matrices, each of activations: what is summed over is united, the rest passes on."""
    left, right = carrier.all_given(node)
    rank = len(value.shape)
    if left.is_mixed or right.is_mixed or not len(left.shape) == len(right.shape) == rank > 2:
        raise NoRuleError  # a product with one matrix is a linear layer and would cost something
    rows, columns = left.axis == rank - 2, right.axis == rank - 1
    if (rows and columns) or any(flow.axis is not None and flow.axis < rank - 2 for flow in (left, right)):
        raise NoRuleError
    carrier.record.labels.unite(_along(left, rank - 1), _along(right, rank - 2), _joined_to_fixed(carrier, node))
    if rows:
        return Flow(value.shape, rank - 2, left.vector)
    return Flow(value.shape, rank - 1, right.vector) if columns else Flow(value.shape)


def _along(flow: Flow, axis: int) -> Vector:
    return flow.vector if flow.axis == axis else np.zeros(flow.shape[axis], np.int64)
