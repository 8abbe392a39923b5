"""Whether running a supernet from the middle gives what whole runs give, tried on the network itself."""

from typing import Any

import torch
from torch import Tensor

from autoslim.networks.supernet import Supernet
from autoslim.networks.tails import Tails
from autoslim.networks.tracing.carrying import leaves
from autoslim.vocabulary.errors import first_line

FLOOR = 1e-3  # of the largest output: rounding in another order makes about 1e-6 in float32


def trusted_tails(supernet: Supernet, images: Tensor) -> tuple[Tails | None, str]:
    """``Tails`` of the supernet, or None and the reason where they do not give what it gives.

    Code that looks at shapes, or at its modules' sizes, cannot be run from a record of its operations. So one search
    step is run both ways, from a configuration below the widest.

    Args:
        supernet: in evaluation mode. It is left at that configuration.
        images: (N, C, H, W), a few.
    """
    current = dict(supernet.widest)
    for name, group in supernet.graph.groups.items():
        current[name] = max(group.unit, current[name] - group.unit)
    slimmer = {name: max(group.unit, current[name] - group.unit) for name, group in supernet.graph.groups.items()}

    def whole(channels: dict[str, int], given: Tensor) -> list[Tensor]:
        supernet.select(channels)
        return _tensors(supernet(given.clone()))

    with torch.no_grad():
        expected = whole(current, images)
        # Networks that are not trained can magnify the last digit beyond any bound.
        digit = 4 * torch.finfo(images.dtype).eps
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        tolerance = max(FLOOR, 1000 * _distance(expected, whole(current, images * (1 + digit * noise))))
        try:
            tails = Tails(supernet)
            runs = [(name, _tensors(output)) for name, output in tails.run(images.clone(), current, slimmer)]
        except Exception as error:  # whatever the user's code raises where sizes are others than it was traced with
            return None, first_line(error)
        for slimmed, outputs in runs:
            channels = current if slimmed is None else {**current, slimmed: slimmer[slimmed]}
            distance = _distance(whole(channels, images), outputs)
            if not distance <= tolerance:
                return None, f"with fewer channels of {slimmed} it gives something else (by {distance:.1g})"
    return tails, ""


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]


def _distance(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference of any output, in units of its largest number."""
    pairs = zip(expected, found, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)) for a, b in pairs)
