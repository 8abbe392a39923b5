"""Batch normalisation by the statistics of all processes' images, as one process with the whole batch would have it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoslim.engine.processes import Processes


@contextmanager
def shared_statistics(processes: Processes) -> Iterator[None]:
    """Within it, ``F.batch_norm`` in training mode takes the statistics of all processes' batches together.

    The networks are as they were: whatever calls ``F.batch_norm`` (torch's modules, a supernet's with views before
    their weights, timm's with activations of their own) is served, and what is saved is the plain network. All
    processes must run the same layers in the same order.
    """
    if processes.alone:
        yield
        return
    with _Shared(processes):
        yield


class _Shared(TorchFunctionMode):
    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.batch_norm:
            return _batch_norm(self.processes, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _batch_norm(
    processes: Processes,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, its arguments by their names there."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    output, mean, variance, count = _Normalise.apply(input, weight, bias, eps, processes)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
    result: Tensor = output
    return result


class _Normalise(torch.autograd.Function):
    """(N, C, ...) -> normalised, (C,) mean, (C,) biased variance, and the number of values a channel, of all processes.

    Each process's loss is the mean over its own images, and gradients are averaged over all images afterwards. So in
    the backward pass another process's share counts by its number of images.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: Processes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        precise = torch.promote_types(input.dtype, torch.float32)
        values = input.to(precise)
        over = [d for d in range(input.dim()) if d != 1]
        own = input.numel() // input.shape[1]
        variance, mean = torch.var_mean(values, over, correction=0)
        table = processes.gather(torch.stack([mean, variance, torch.full_like(mean, own)]))  # (processes, 3, C)
        means, variances, counts = table.unbind(1)
        count = counts.sum(0)[0]
        shares = counts / count
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)  # no difference of large squares
        inverse = torch.rsqrt(variance + eps)
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = inverse if weight is None else inverse * weight.to(precise)
        shift = -mean * scale if bias is None else bias.to(precise) - mean * scale
        output = torch.addcmul(shift.view(shape), values, scale.view(shape)).to(input.dtype)
        ctx.save_for_backward(input, weight, mean, inverse, count)
        ctx.own, ctx.over, ctx.shape, ctx.processes, ctx.biased = own, over, shape, processes, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        input, weight, mean, inverse, count = ctx.saved_tensors
        gradients = gradient.to(mean.dtype)
        centred = input.to(mean.dtype) - mean.view(ctx.shape)
        sums = torch.stack([gradients.sum(ctx.over), (gradients * centred).sum(ctx.over)])  # (2, C), this process's
        means = ctx.processes.add(sums * (ctx.own / count)) / ctx.own
        scale = inverse if weight is None else inverse * weight.to(mean.dtype)
        shift, slope = -scale * means[0], -scale * inverse.square() * means[1]
        whole = torch.addcmul(shift.view(ctx.shape), gradients, scale.view(ctx.shape))
        return (
            whole.addcmul_(centred, slope.view(ctx.shape)).to(input.dtype),
            None if weight is None else (sums[1] * inverse).to(weight.dtype),
            sums[0].to(gradient.dtype if weight is None else weight.dtype) if ctx.biased else None,
            None,
            None,
        )
