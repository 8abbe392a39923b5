"""Profiles of a network at a configuration: groups, layers and costs, and an independent count of the costs."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from torch import nn

from autoslim.channels.copying import on_meta
from autoslim.channels.graph import ChannelGraph, Layer, is_slimmable, slimmable_share
from autoslim.channels.groups import axis_size
from autoslim.channels.resize import resize
from autoslim.errors import UserError


def profile(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> dict[str, Any]:
    """Returns the profile of the network resized to ``channels``, as plain values that can be written as JSON.

    It has the keys ``input`` (C, H, W), ``groups``, ``layers`` (without average pooling), ``totals`` and ``fixed`` (the
    modules that are not prunable, with the reasons). One multiply-add is one MAC; convolution and linear layers are
    counted, at batch size 1. ``macs_with_pooling`` adds average pooling, as the AutoSlim authors do. ``memory`` is in
    bytes (see ``ChannelGraph.memory``). ``slimmable_share`` is the share of MACs in layers that can be slimmed, in
    [0, 1].
    """
    plain = resize(on_meta(network), graph, channels)
    total = graph.macs(channels)
    uncounted = {name: parameter.numel() for name, parameter in plain.named_parameters()}
    layers = [_layer(plain, layer, channels, total, uncounted) for layer in graph.layers if layer.kind != "avgpool"]
    return {
        "input": list(graph.input_shape),
        "groups": [
            {
                "name": group.name,
                "channels": channels[group.name],
                "default": group.size,
                "unit": group.unit,
                "members": list(group.members),
            }
            for group in graph.groups.values()
        ],
        "layers": layers,
        "totals": {
            "macs": total,
            "macs_with_pooling": graph.macs(channels, pooling=True),
            "params": graph.params(channels),
            "memory": graph.memory(channels),
            "slimmable_share": slimmable_share(graph, channels),
        },
        "not_prunable": {
            name: graph.not_prunable[name] for name, _ in plain.named_modules() if name in graph.not_prunable
        },
    }


def counted_by_ptflops(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> dict[str, int]:
    """Returns MACs and parameters of the resized network as ptflops counts them at run time (backend ``aten``).

    ptflops counts one MAC for each output of a layer with a bias. These are subtracted, because ``ChannelGraph`` does
    not count them.

    Raises:
        UserError: If ptflops fails on this network.
    """
    from ptflops import get_model_complexity_info

    plain = resize(network, graph, channels).eval()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        macs, params = get_model_complexity_info(
            plain, graph.input_shape, backend="aten", as_strings=False, print_per_layer_stat=False
        )
    if macs is None:
        raise UserError(f"ptflops cannot count this network ({printed.getvalue().strip()[:200]}); omit --verify")
    biases = sum(
        layer.positions * axis_size(layer.outputs, channels) for layer in graph.layers if _biased(plain, layer)
    )
    return {"macs": int(macs) - biases, "params": int(params)}


def _layer(
    plain: nn.Module, layer: Layer, channels: Mapping[str, int], total: int, uncounted: dict[str, int]
) -> dict[str, Any]:
    """Returns the entry of a layer. Its parameters are removed from ``uncounted``, so a second call has none."""
    outputs = axis_size(layer.outputs, channels)
    module = _module(plain, layer)
    inputs = axis_size(layer.inputs, channels) if layer.inputs else getattr(module, "in_channels", outputs)
    names = {layer.weight, layer.weight.removesuffix("weight") + "bias"} if layer.weight else set()
    macs = layer.macs(channels)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "in": inputs,
        "out": outputs,
        "macs": macs,
        "params": sum(uncounted.pop(name, 0) for name in names),
        "share": macs / max(1, total),
        "slimmable": is_slimmable(layer),
    }


def _module(plain: nn.Module, layer: Layer) -> nn.Module | None:
    return plain.get_submodule(layer.weight.rpartition(".")[0]) if layer.weight else None


def _biased(plain: nn.Module, layer: Layer) -> bool:
    return layer.kind != "avgpool" and getattr(_module(plain, layer), "bias", None) is not None
