"""Copies of networks with replaced tensors, and temporary evaluation mode."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def inference_mode(network: nn.Module) -> Any:
    """Evaluation mode without gradients, and the mode that each module was in afterwards."""
    with evaluation_mode(network), torch.inference_mode():
        yield


def copy_with(network: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A deep copy of ``network``, each of its tensors put in as ``replace(name, tensor)`` gives it.

    Parameters, buffers and tensors that are plain attributes of a module count, detached. A tensor that has several
    names is replaced once, under the first, and stays one tensor. Parameters stay parameters, trainable or not.
    """
    memo: dict[int, Any] = {}
    for name, tensor in _all_tensors(network):
        if id(tensor) not in memo:
            data = replace(name, tensor.detach())
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    return copy.deepcopy(network, memo)


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of the network's structure on the meta device: shapes without numbers."""
    return copy_with(network, lambda _, tensor: tensor.to("meta")).to("meta")


def zeroed(network: nn.Module) -> nn.Module:
    """A copy of the network on the CPU with zeros for numbers."""
    return copy_with(network, lambda _, tensor: torch.zeros_like(tensor, device="cpu"))


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each under all of its names: layers may share one."""
    tensors: dict[str, Tensor] = dict(network.named_buffers(remove_duplicate=False))
    return {**dict(network.named_parameters(remove_duplicate=False)), **tensors}


def _all_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from named_tensors(network).items()
    for path, module in network.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{path}.{name}" if path else name, value


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each in the mode that it had (a user may have frozen some)."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
