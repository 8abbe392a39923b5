"""MACs of operations that tracing has no rule for, by watching them run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


def macs_of(run: Callable[[], object]) -> int:
    """The multiply-adds of the convolutions and linear layers that ``run`` calls, biases not counted.

    Products of activations (attention) do not count: they belong to no layer. Works on meta tensors.
    """
    attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the layers inside
    try:
        counter = _Counter()
        with counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
    return counter.macs


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket is _aten.convolution:
            images, weight, transposed = args[0], args[1], args[6]
            positions = (images if transposed else result).shape[2:]
            self.macs += images.shape[0] * math.prod(weight.shape) * math.prod(positions)
        elif func._overloadpacket in (_aten.mm, _aten.addmm):
            left, right = args[-2:]
            self.macs += math.prod(left.shape) * right.shape[1]
        return result
