"""Synchronises training across ranks: all-reduced gradients and batch norm statistics."""

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
    """Averages the gradients over all ranks, between the last backward pass of a step and the optimiser's step.

    DistributedDataParallel is not used, because a step of the sandwich rule has several backward passes, and one
    all-reduce after the last suffices. Ranks are weighted by their numbers of images, so the shares of a batch need not
    be equal.
    """

    def __init__(self, network: nn.Module, world: World) -> None:
        self.world = world
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._reached: dict[str, nn.Parameter] | None = None  # parameters with a gradient on any rank at the first step

    def share(self, loss: Tensor, images: int) -> Tensor:
        """Averages the gradients over the images of all ranks, in place, and returns the average loss (a scalar).

        ``loss`` and the gradients of this rank are means over its ``images``. A parameter without a gradient on
        any rank keeps none.

        Raises:
            UserError: a parameter without a gradient at the first step has one now, possibly on this rank only.
        """
        if self.world.is_single:
            return loss
        if self._reached is None:
            self._reached = self._reached_on_any_rank(loss)
        late = [name for name, p in self._parameters.items() if p.grad is not None and name not in self._reached]
        if late:
            raise UserError(
                f"{late[0]} had no gradient at the first step and has one now; a network whose layers depend on the "
                "data cannot be trained by several processes: set runtime.processes to 1"
            )
        with torch.no_grad():
            gradients = []
            for parameter in self._reached.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
            loss_and_one = torch.stack([loss, torch.ones_like(loss)])
            flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss_and_one]).mul_(images)
            self.world.add(flat)
            flat.div_(flat[-1].clone())  # the number of images of all ranks
            pieces = flat[:-2].split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
            return flat[-2].to(loss.dtype)

    def _reached_on_any_rank(self, like: Tensor) -> dict[str, nn.Parameter]:
        local = [float(parameter.grad is not None) for parameter in self._parameters.values()]
        counts = self.world.add(torch.tensor(local, device=like.device)).tolist()
        return {name: p for (name, p), count in zip(self._parameters.items(), counts, strict=True) if count}


@contextmanager
def synchronised_batch_norm(world: World) -> Iterator[None]:
    """Makes ``F.batch_norm`` in training mode compute its statistics over the batches of all ranks.

    torch's SyncBatchNorm is not used, because it requires an accelerator and replaces modules. This function also works
    with gloo and applies to every caller of ``F.batch_norm`` (torch's modules, a supernet's views of its weights,
    timm's layers), so the network and its checkpoints do not change. All ranks must run the same layers in the same
    order.
    """
    if world.is_single:
        yield
        return
    with _SynchronisedBatchNorm(world):
        yield


class _SynchronisedBatchNorm(TorchFunctionMode):
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
    """Computes ``F.batch_norm`` with statistics of all ranks. The parameters have the same names.

    Raises:
        ValueError: a channel has only one value, as in torch.
    """
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    # As in SyncBatchNorm, two ranks with one value each suffice. The exact number of values is on the device.
    if input.numel() // input.shape[1] * world.world_size < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    output, mean, variance, count = _Normalise.apply(input, weight, bias, eps, world)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1))
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
    result: Tensor = output
    return result


class _Normalise(torch.autograd.Function):
    """(N, C, ...) -> normalised, (C,) mean, (C,) biased variance, and the number of values per channel, of all ranks.

    The loss of each rank is the mean over its images, and gradients are later averaged over all images. The
    backward pass therefore weights the gradients of other ranks by their numbers of images.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        precise = torch.promote_types(input.dtype, torch.float32)
        values = input.to(precise)
        dims = [d for d in range(input.dim()) if d != 1]
        local = input.numel() // input.shape[1]
        variance, mean = torch.var_mean(values, dims, correction=0)
        table = world.gather(torch.stack([mean, variance, torch.full_like(mean, local)]))  # (ranks, 3, C)
        means, variances, counts = table.unbind(1)
        count = counts.sum(0)[0]
        shares = counts / count
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)  # avoids a difference of large squares
        inverse = torch.rsqrt(variance + eps)
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale = inverse if weight is None else inverse * weight.to(precise)
        shift = -mean * scale if bias is None else bias.to(precise) - mean * scale
        output = torch.addcmul(shift.view(shape), values, scale.view(shape)).to(input.dtype)
        ctx.save_for_backward(input, weight, mean, inverse, count)
        ctx.local, ctx.dims, ctx.shape, ctx.world, ctx.biased = local, dims, shape, world, bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return output, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        input, weight, mean, inverse, count = ctx.saved_tensors
        gradients = gradient.to(mean.dtype)
        centred = input.to(mean.dtype) - mean.view(ctx.shape)
        sums = torch.stack([gradients.sum(ctx.dims), (gradients * centred).sum(ctx.dims)])  # (2, C), of this rank
        means = ctx.world.add(sums * (ctx.local / count)) / ctx.local
        scale = inverse if weight is None else inverse * weight.to(mean.dtype)
        shift, slope = -scale * means[0], -scale * inverse.square() * means[1]
        input_gradient = torch.addcmul(shift.view(ctx.shape), gradients, scale.view(ctx.shape))
        return (
            input_gradient.addcmul_(centred, slope.view(ctx.shape)).to(input.dtype),
            None if weight is None else (sums[1] * inverse).to(weight.dtype),
            sums[0].to(gradient.dtype if weight is None else weight.dtype) if ctx.biased else None,
            None,
            None,
        )
