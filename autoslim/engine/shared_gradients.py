"""The gradients of a step, of all processes' images: one collective operation a step, however many passes it had."""

import torch
from torch import Tensor, nn

from autoslim.engine.processes import Processes
from autoslim.vocabulary.errors import UserError


class SharedGradients:
    """What data-parallel training adds to a step, between the last backward pass and the optimiser.

    Each process's gradients are of the mean over its own images. They become those of the mean over all images, with
    processes weighted by their numbers of images, so that shares need not be equal.
    """

    def __init__(self, network: nn.Module, processes: Processes) -> None:
        self.processes = processes
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._reached: dict[str, nn.Parameter] | None = None  # by some process's gradient, at the first step

    def share(self, loss: Tensor, images: int) -> Tensor:
        """Makes the gradients those of all processes' images, in place, and gives the loss (a scalar) of all likewise.

        A parameter that no process has a gradient for keeps none.

        Raises:
            UserError: a parameter's first gradient comes at a later step than others', on this process alone perhaps.
        """
        if self.processes.alone:
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
            self.processes.add(flat)
            flat.div_(flat[-1].clone())
            pieces = flat[:-2].split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
            return flat[-2].to(loss.dtype)

    def _reached_by_any(self, like: Tensor) -> dict[str, nn.Parameter]:
        own = [float(parameter.grad is not None) for parameter in self._parameters.values()]
        found = self.processes.add(torch.tensor(own, device=like.device)).tolist()
        return {name: p for (name, p), count in zip(self._parameters.items(), found, strict=True) if count}
