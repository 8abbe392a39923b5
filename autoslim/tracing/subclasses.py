"""Tests whether a convolution or a linear layer computes only what the layer of torch.nn computes."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import BasePruningMethod

from autoslim.channels.copying import named_tensors, on_meta
from autoslim.tracing.execution import Execution

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def computes_more(module: nn.Module) -> bool:
    """Returns whether a layer computes its tensors at each call, or overrides ``forward`` with another cost.

    The first is the case if its weight or bias is pruned or parametrised by torch, except for the normalisations of
    torch, which are a part of the layer.
    Such a layer adds channels to its input, convolves twice, or has a low-rank update beside its weight, for example.
    The layer runs on the meta device, on a small input. Overridden functions that cost the same and have
    no other weights than scales by output channel (as in weight standardisation) are equivalent for slimming.
    """
    if not isinstance(module, _LAYERS):
        return False
    if _computes_its_tensors(module):
        return True
    if not _is_overridden(type(module)):
        return False
    weight = module._parameters.get("weight")
    if weight is None or _has_other_weights(module):
        return True
    copy = on_meta(module).eval()
    inputs = _input(module).to(weight.dtype)
    try:
        with torch.no_grad(), torch.device("meta"), Execution(copy, [inputs]) as execution:
            output = copy(inputs)
    except Exception:  # the user's code may raise anything on such an input
        return True
    positions = inputs if isinstance(module, nn.modules.conv._ConvTransposeNd) else output
    return execution.macs != len(inputs) * positions[0, 0].numel() * weight.numel()


def _computes_its_tensors(module: nn.Module) -> bool:
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return True
    steps = [step for parameters in getattr(module, "parametrizations", {}).values() for step in parameters]
    return bool(steps) and not any(type(step).__module__ == parametrizations.__name__ for step in steps)


def _is_overridden(kind: type) -> bool:
    """Returns whether ``kind`` overrides the functions of the layer of torch.nn from which it is derived."""
    layer = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules."))
    names = ("forward", "_conv_forward")
    return any(getattr(kind, name, None) is not getattr(layer, name, None) for name in names)


def _has_other_weights(module: nn.Module) -> bool:
    """Returns whether the module has tensors other than weight, bias and scales by output channel."""
    return any(
        name not in ("weight", "bias") and ("." in name or tensor.dim() == 0 or tensor[0].numel() > 1)
        for name, tensor in named_tensors(module).items()
    )


def _input(module: nn.Module) -> Tensor:
    if isinstance(module, nn.Linear):
        return torch.empty(2, module.in_features, device="meta")
    assert isinstance(module, nn.modules.conv._ConvNd)
    sides = [
        2 * dilation * size + stride
        for dilation, size, stride in zip(module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    return torch.empty(2, module.in_channels, *sides, device="meta")
