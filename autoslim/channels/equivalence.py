"""Tests whether a change leaves a network's function unchanged up to rounding, and finds the changes that do not."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.channels.copying import copy_with
from autoslim.channels.inputs import Arguments, Inputs
from autoslim.channels.outputs import output_leaves

FLOAT32_FLOOR = 1e-3
"""Smallest tolerance in float32, relative to the largest output; a different order of summation changes about 1e-6."""
FLOAT64_FLOOR = 1e-9
"""The same in float64, where a different order of summation changes about 1e-14."""


def harmless_changes(
    network: nn.Module, inputs: Inputs, names: Sequence[str], change: Callable[[Sequence[str]], nn.Module]
) -> list[str]:
    """Returns those ``names`` whose changes, made together, leave the function of ``network`` unchanged up to rounding.

    Copies of the networks run in evaluation mode on the CPU, in float64 if their code allows it.

    Args:
        network: The network without changes. It is not modified.
        inputs: The network's inputs.
        names: The changes to test.
        change: Returns the network with the changes of some of the names.
    """
    reference = _Reference(network, inputs)

    def failure(tested: Sequence[str]) -> str | None:
        return None if reference.equals(change(tested)) else "the output changes"

    harmless = list(names)
    while harmful := find_failing(harmless, failure):
        harmless = [name for name in harmless if name not in harmful]
    return harmless


def find_failing(names: Sequence[str], failure: Callable[[Sequence[str]], str | None]) -> dict[str, str]:
    """Finds by bisection the names that fail a test.

    Args:
        names: The names to test.
        failure: Tests some of the names together, and returns why they fail, or None if they pass.

    Returns:
        For each failing name, the reason; empty if all names pass together. If names fail only in combination, the
        first one stands for the combination, so the remaining names have to be tested again.
    """
    reason = failure(names) if names else None
    if reason is None:
        return {}
    if len(names) == 1:
        return {names[0]: reason}
    middle = len(names) // 2
    return find_failing(names[:middle], failure) | find_failing(names[middle:], failure) or {names[0]: reason}


def rounding_tolerance(
    run: Callable[[Arguments], Sequence[Tensor]],
    images: Arguments,
    expected: Sequence[Tensor],
    floor: float,
    generator: torch.Generator,
) -> float:
    """Returns the largest relative difference between two outputs that rounding can explain.

    An untrained network can amplify a change in the last digit without bound. The tolerance is therefore 1000 times the
    difference that noise in the last digits of the input causes, and at least ``floor``. Integers in the input do not
    change.

    Args:
        run: Returns the output tensors of the network for a batch.
        images: The batch.
        expected: ``run(images)``.
        floor: The smallest tolerance.
        generator: Draws the noise, on the CPU.
    """

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * (4 * torch.finfo(tensor.dtype).eps)
        return tensor * (1 + noise.to(tensor.device))

    return max(floor, 1000 * relative_difference(expected, run(images.map(noisy))))


def relative_difference(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Returns the largest absolute difference of any output, relative to that output's largest absolute value.

    NaN in any output gives NaN, and so do no outputs at all; an output of another shape gives infinity. Integers and
    booleans are compared as numbers.
    """
    differences = [torch.zeros(()) if expected else torch.tensor(math.nan)]
    for reference, output in zip(expected, outputs, strict=True):
        if reference.shape != output.shape:
            return math.inf
        if reference.numel():
            exact, other = (_as_real(tensor) for tensor in (reference, output))
            differences.append((exact - other).abs().max() / (exact.abs().max() if exact.any() else 1.0))
    return float(torch.stack([difference.cpu().double() for difference in differences]).max())


def _as_real(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()


def output_tensors(output: Any) -> list[Tensor]:
    """Returns all tensors in a network's output, which may be nested (see ``output_leaves``)."""
    return [leaf for leaf in output_leaves(output) if isinstance(leaf, Tensor)]


class _Reference:
    """The output of a network for two images of noise, with which the outputs of other networks are compared."""

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images, self.dtype = inputs.noise(2, generator, torch.float64), torch.float64
        floor = FLOAT64_FLOOR
        try:
            self.expected = self._outputs(network, self.images)
        except Exception:  # the network's code requires float32
            self.images, self.dtype, floor = self.images.to(torch.float32), torch.float32, FLOAT32_FLOOR
            self.expected = self._outputs(network, self.images)
        self.tolerance = rounding_tolerance(
            lambda images: self._outputs(network, images), self.images, self.expected, floor, generator
        )

    def equals(self, network: nn.Module) -> bool:
        return relative_difference(self.expected, self._outputs(network, self.images)) <= self.tolerance

    @torch.no_grad()
    def _outputs(self, network: nn.Module, images: Arguments) -> list[Tensor]:
        """Runs a copy of the network on the CPU in ``self.dtype``. The code may overwrite its input."""

        def replace(_: str, tensor: Tensor) -> Tensor:
            return tensor.to("cpu", self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

        return output_tensors(images.clone().run(copy_with(network, replace).eval()))
