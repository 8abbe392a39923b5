"""Copies of networks with replaced tensors, and temporary evaluation mode."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.errors import UserError


@contextlib.contextmanager
def inference_mode(network: nn.Module) -> Any:
    """Runs a block in evaluation mode and without gradients, and then restores the mode of each module."""
    with evaluation_mode(network), torch.inference_mode():
        yield


def copy_with(network: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Returns a deep copy of ``network`` with each tensor replaced by ``replace(name, tensor)``.

    This includes parameters, buffers and tensors that are plain attributes of a module; ``replace`` gets them detached.
    A tensor with several names is replaced once, under the first, and remains shared. Parameters remain parameters and
    keep ``requires_grad``.

    Raises:
        UserError: The network stores, in a list or a dictionary, a tensor that a run computed, which torch cannot copy.
    """
    memo: dict[int, Any] = {}
    for name, tensor in _all_tensors(network):
        if id(tensor) not in memo:
            data = replace(name, tensor.detach())
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    try:
        return copy.deepcopy(network, memo)
    except RuntimeError as error:
        if not (stored := _stored_outputs(network)):
            raise
        raise UserError(
            f"{type(network).__name__} cannot be copied, because {stored[0]!r} holds a tensor that a run computed; "
            "delete or detach it before"
        ) from error


def _stored_outputs(network: nn.Module) -> list[str]:
    """Returns the attributes of modules that contain tensors with a history of autograd, in lists or dictionaries."""
    return [
        f"{path}.{name}" if path else name
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
        and any(isinstance(leaf, Tensor) and not leaf.is_leaf for leaf in tree_leaves(value))
    ]


def on_meta(network: nn.Module) -> nn.Module:
    """Returns a copy of the network on the meta device, which has shapes but no values."""
    return copy_with(network, lambda _, tensor: tensor.to("meta")).to("meta")


def zeroed(network: nn.Module) -> nn.Module:
    """Returns a copy of the network on the CPU with all values zero."""
    return copy_with(network, lambda _, tensor: torch.zeros_like(tensor, device="cpu"))


def float_dtype(network: nn.Module) -> torch.dtype:
    """Returns the dtype of the network's first parameter of real numbers, in which its inputs are given; or float32."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers by name; a tensor that layers share appears under each of its names."""
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
    """Runs a block with all modules in evaluation mode, and then restores the mode of each one.

    Restoring them one by one preserves modules that a user has frozen.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
