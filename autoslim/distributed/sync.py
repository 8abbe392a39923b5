"""What several processes share at each training step: gradients and batch statistics."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoslim.distributed.ranks import World
from autoslim.errors import UserError


class GradientSynchronizer:
    """What data-parallel training adds to a step, between the last backward pass and the optimiser.

    Each process's gradients are of the mean over its own images. They become those of the mean over all images, with
    processes weighted by their numbers of images, so that shares need not be equal.
    """

    def __init__(self, network: nn.Module, world: World) -> None:
        self.world = world
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._reached: dict[str, nn.Parameter] | None = None  # by some process's gradient, at the first step

    def share(self, loss: Tensor, images: int) -> Tensor:
        """Makes the gradients those of all processes' images, in place, and gives the loss (a scalar) of all likewise.

        A parameter that no process has a gradient for keeps none.

        Raises:
            UserError: a parameter's first gradient comes at a later step than others', on this process alone perhaps.
        """
        if self.world.is_single:
            return loss
        if self._reached is None:
            self._reached = self._reached_by_any(loss)
        late = [name for name, p in self._parameters.items() if p.grad is not None and name not in self._reached]
        if late:
            raise UserError(
                f"{late[0]} had no gradient at the first step and has one now; a network that chooses its layers by "
                "the data cannot be trained by several processes: set runtime.processes to 1"
            )
        with torch.no_grad():
            gradients = []
            for parameter in self._reached.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
            tail = torch.stack([loss, torch.ones_like(loss)])
            flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), tail]).mul_(images)
            self.world.add(flat)
            flat.div_(flat[-1].clone())
            pieces = flat[:-2].split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
            return flat[-2].to(loss.dtype)

    def _reached_by_any(self, like: Tensor) -> dict[str, nn.Parameter]:
        own = [float(parameter.grad is not None) for parameter in self._parameters.values()]
        found = self.world.add(torch.tensor(own, device=like.device)).tolist()
        return {name: p for (name, p), count in zip(self._parameters.items(), found, strict=True) if count}


@contextmanager
def synchronised_batch_norm(world: World) -> Iterator[None]:
    """Within it, ``F.batch_norm`` in training mode takes the statistics of all processes' batches together.

    The networks are as they were: whatever calls ``F.batch_norm`` (torch's modules, a supernet's with views before
    their weights, timm's with activations of their own) is served, and what is saved is the plain network. All
    processes must run the same layers in the same order.
    """
    if world.is_single:
        yield
        return
    with _Shared(world):
        yield


class _Shared(TorchFunctionMode):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.batch_norm:
            return _batch_norm(self.world, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _batch_norm(
    world: World,
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
    output, mean, variance, count = _Normalise.apply(input, weight, bias, eps, world)
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
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        precise = torch.promote_types(input.dtype, torch.float32)
        values = input.to(precise)
        over = [d for d in range(input.dim()) if d != 1]
        own = input.numel() // input.shape[1]
        variance, mean = torch.var_mean(values, over, correction=0)
        table = world.gather(torch.stack([mean, variance, torch.full_like(mean, own)]))  # (processes, 3, C)
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
        ctx.own, ctx.over, ctx.shape, ctx.world, ctx.biased = own, over, shape, world, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        input, weight, mean, inverse, count = ctx.saved_tensors
        gradients = gradient.to(mean.dtype)
        centred = input.to(mean.dtype) - mean.view(ctx.shape)
        sums = torch.stack([gradients.sum(ctx.over), (gradients * centred).sum(ctx.over)])  # (2, C), this process's
        means = ctx.world.add(sums * (ctx.own / count)) / ctx.own
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
