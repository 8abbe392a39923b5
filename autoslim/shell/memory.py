"""How much memory there is, and how much a training step cannot do without."""

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoslim.algorithms.sandwich import smoothed_cross_entropy


def kept_bytes(network: nn.Module, precision: Callable[[], torch.autocast], images: Tensor, labels: Tensor) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of this batch, weights not counted."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision():
        loss = smoothed_cross_entropy(network(images), labels, 0.0)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert loss.requires_grad  # it still holds all that was noted, so that no address was given twice
    return sum(size for address, size in kept.items() if address not in own)


def device_bytes(device: torch.device) -> float:
    """Bytes of the device's memory; infinite where nothing tells."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf
