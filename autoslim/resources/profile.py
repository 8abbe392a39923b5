"""Profiles of a network at a configuration: groups, layers and costs, and an independent count of the costs."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from autoslim.channels.copying import float_dtype, on_meta, zeroed
from autoslim.channels.graph import ChannelGraph, Layer, is_slimmable, slimmable_share
from autoslim.channels.groups import axis_size
from autoslim.channels.inputs import Arguments
from autoslim.channels.resize import resize
from autoslim.tracing.execution import Execution
from autoslim.tracing.interpreter import for_shapes


def profile(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> dict[str, Any]:
    """Returns the profile of the network resized to ``channels``, as plain values that can be written as JSON.

    It has the keys ``input`` ([C, H, W], or a mapping from names to shapes if there are several), ``part`` (the path of
    the part that was traced, or ""), ``groups``, ``layers`` (without average pooling), ``totals``, ``not_prunable``
    (the layers that keep their size, with the reasons) and ``not_counted`` (see ``ChannelGraph``). One multiply-add is
    one MAC; convolution and linear layers are counted, at batch size 1. ``macs_with_pooling`` adds average pooling, as
    the AutoSlim authors do. ``memory`` is in bytes (see ``ChannelGraph.memory``). ``slimmable_share`` is the share of
    MACs in layers that can be slimmed, in [0, 1].
    """
    plain = resize(on_meta(network), graph, channels)
    shapes = {tensor.name: list(tensor.shape) for tensor in graph.inputs.tensors}
    total = graph.macs(channels)
    uncounted = {name: parameter.numel() for name, parameter in plain.named_parameters()}
    layers = [_layer(plain, layer, channels, total, uncounted) for layer in graph.layers if layer.kind != "avgpool"]
    return {
        "input": list(graph.input_shape) if graph.inputs.is_single else shapes,
        "part": graph.part,
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
        "not_counted": graph.not_counted,
    }


def counted_at_run_time(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int]) -> dict[str, Any]:
    """Returns MACs and parameters of the resized network as they are counted while it runs on zeros.

    The keys are ``run``, the count by the dispatcher of torch (see ``autoslim.tracing.execution.Execution``),
    ``ptflops``, the count of ptflops (backend ``aten``), and ``products_of_activations``, the MACs of products such as
    those in attention, which neither the profile nor ``run`` includes. ptflops counts these products, those of weights,
    and one MAC for each output of a layer with a bias; all are subtracted. It does not count deformable convolutions,
    recurrent and bilinear layers. If it fails on this network, ``ptflops`` is None.
    """
    from ptflops import get_model_complexity_info

    plain = resize(zeroed(network) if graph.leaves else on_meta(network), graph, channels, seed=None).eval()
    part = plain.get_submodule(graph.part)
    images = graph.inputs.zeros(1, "cpu" if graph.leaves else "meta").to(float_dtype(part))
    with for_shapes(images.device, recorded=True), Execution(part, images.tensors) as execution:
        images.run(part)
    params = sum(parameter.numel() for parameter in part.parameters())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        macs, counted_params = get_model_complexity_info(
            _Call(part, images),
            (1,),
            backend="aten",
            as_strings=False,
            print_per_layer_stat=False,
        )
    others = execution.biases + execution.other_products + execution.weight_products
    return {
        "run": {"macs": execution.macs, "params": params},
        "ptflops": None if macs is None else {"macs": int(macs) - others, "params": int(counted_params or 0)},
        "products_of_activations": execution.other_products,
    }


class _Call(nn.Module):
    """Runs a network on given arguments, because ptflops only makes one tensor of real numbers."""

    def __init__(self, network: nn.Module, arguments: Arguments) -> None:
        super().__init__()
        self.network, self.arguments = network, arguments

    def forward(self, _: Tensor) -> Any:
        return self.arguments.run(self.network)


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
