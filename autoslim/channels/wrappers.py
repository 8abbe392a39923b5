"""Refuses networks inside a wrapper, whose parameter names are not those of the network."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from autoslim.errors import UserError


def check_plain(network: nn.Module) -> None:
    """Checks that ``network`` is a module of which no part is scripted, compiled, lazy or wrapped for several devices.

    A wrapper shares its weights with the network inside it, so callers can pass that network instead.

    Raises:
        UserError: It is not. The message names the module to pass.
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"the network is of type {type(network).__name__}; pass a torch.nn.Module")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise UserError(f"{name} of {type(network).__name__} has no shape yet; run the network on one batch first")
    for path, module in network.named_modules():
        where = f"module {path!r} of {type(network).__name__}" if path else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{where} is the result of torch.jit.script or torch.jit.trace, whose channels cannot be changed; "
                "use the torch.nn.Module that it was made from, with the same state dict"
            )
        if attribute := _attribute_inside(module):
            use = "replace it with" if path else "pass"
            full = f"{path}.{attribute}" if path else attribute
            raise UserError(
                f"{where} is wrapped in {type(module).__name__}; {use} network.{full}, which shares its weights, and "
                "wrap the result again"
            )


def _attribute_inside(module: nn.Module) -> str:
    """Returns the attribute of a wrapper that contains the wrapped network, or "" if the module is no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "module"
    # The class of torch.compile is imported from torch._dynamo, which takes seconds.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod") else ""
