"""Counts multiply-adds with ptflops, an independent check of the closed form, and traces torchvision's networks."""

import contextlib
import io
from typing import Any

import torch
import torchvision.models as tv
from ptflops import get_model_complexity_info
from torch import nn

from autoslim import trace
from autoslim.channels.graph import ChannelGraph


def counted(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns MACs by ptflops (backend ``aten``), minus one for each output of a layer with a bias, which it adds."""
    biases = 0

    def bias(module: nn.Module, _: object, output: Any) -> None:
        nonlocal biases
        if isinstance(module, nn.RNNBase):
            positions = output[0].numel() // output[0].shape[-1]
            biases += positions * sum(tensor.numel() for name, tensor in module.named_parameters() if "bias" in name)
        else:
            biases += output.numel() if module.bias is not None else 0

    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.RNNBase | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_hook(bias) for layer in layers]
    with contextlib.redirect_stdout(io.StringIO()):
        macs, _ = get_model_complexity_info(
            network.eval(), shape, backend="aten", as_strings=False, print_per_layer_stat=False
        )
    for hook in hooks:
        hook.remove()
    assert macs is not None
    return int(macs) - biases


def counted_with_hooks(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns the MACs of convolutions and linear layers for one input. ptflops also counts products of activations."""
    macs = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        macs += output.numel() * module.weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    device = next(network.parameters()).device
    with torch.no_grad():
        network.eval()(torch.zeros(1, *shape, device=device))
    for hook in hooks:
        hook.remove()
    return macs


def graph_at_224(name: str) -> ChannelGraph:
    with torch.device("meta"):
        network = getattr(tv, name)()
    return trace(network, torch.empty(1, 3, 224, 224))
