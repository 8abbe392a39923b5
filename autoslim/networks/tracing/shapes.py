"""Running a network for the shapes of its tensors alone."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def for_shapes(device: torch.device) -> Iterator[None]:
    """New tensors are made on ``device`` and no gradients kept; on the meta device batch norm is not worked out."""
    quick = _BatchNormByShape() if device.type == "meta" else contextlib.nullcontext()
    with torch.no_grad(), device, quick:
        yield


class GraphRunner(fx.Interpreter):
    """Runs a traced network on tensors of the default device."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        # torch.fx keeps constants on the device that they were made on.
        return value.to(torch.get_default_device()) if isinstance(value, Tensor) else value


class _BatchNormByShape(TorchFunctionMode):
    """Most of a meta run of a CNN is its batch norms, which torch takes apart into a dozen operations there."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and tensor.numel() != input.shape[1]:
            raise RuntimeError(f"batch norm for {tensor.numel()} channels is given {input.shape[1]}")
    return torch.empty_like(input)
