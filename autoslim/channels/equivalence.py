"""Finds which changes leave the function of a network unchanged up to rounding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.copying import copy_with


def harmless_changes(
    network: nn.Module, input_shape: Sequence[int], names: Sequence[str], change: Callable[[Sequence[str]], nn.Module]
) -> list[str]:
    """Those of ``names`` whose changes together leave the function of ``network`` as it is, but for rounding.

    Copies of the networks run in evaluation mode on the CPU, in float64 where their code allows it.

    Args:
        input_shape: (C, H, W).
        change: gives the network with the changes of some names made.
    """
    probe = _Probe(network, input_shape)

    def same(some: Sequence[str]) -> bool:
        return probe.same(change(some))

    kept = list(names)
    while kept and not same(kept):
        culprits = _culprits(kept, same)
        kept = [name for name in kept if name not in culprits]
    return kept


def _culprits(names: Sequence[str], same: Callable[[Sequence[str]], bool]) -> list[str]:
    """Of names that do harm together, those that do so without the others, by bisection; the first if none does."""
    if len(names) == 1:
        return [*names]
    middle = len(names) // 2
    halves = [half for half in (names[:middle], names[middle:]) if not same(half)]
    return [culprit for half in halves for culprit in _culprits(half, same)] or [names[0]]


class _Probe:
    """A network's output for two images of noise, and how far rounding alone may move it."""

    def __init__(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(2, *input_shape, generator=generator, dtype=torch.float64)
        floor = 1e-9  # of the largest output; rounding in another order makes about 1e-14
        try:
            self.expected = self._outputs(network, self.images)
        except Exception:  # its code insists on float32, where rounding makes about 1e-6
            self.images, floor = self.images.float(), 1e-3
            self.expected = self._outputs(network, self.images)
        # Networks that are not trained can magnify the last digit beyond any bound.
        digit = 4 * torch.finfo(self.images.dtype).eps
        last = torch.randn(self.images.shape, generator=generator, dtype=self.images.dtype) * digit
        self.tolerance = max(floor, 1000 * self._distance(self._outputs(network, self.images * (1 + last))))

    def same(self, network: nn.Module) -> bool:
        return self._distance(self._outputs(network, self.images)) <= self.tolerance

    def _distance(self, found: Sequence[Tensor]) -> float:
        """The largest difference from what is expected, of any output, in units of its largest number."""
        pairs = zip(self.expected, found, strict=True)
        return float(torch.stack([(a - b).abs().max() / (a.abs().max() if a.any() else 1.0) for a, b in pairs]).max())

    def _outputs(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        def replace(_: str, tensor: Tensor) -> Tensor:
            return tensor.to("cpu", images.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

        with torch.no_grad():
            output = copy_with(network, replace).eval()(images)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
