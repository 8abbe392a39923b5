"""Tests whether a change leaves a network's function unchanged up to rounding, and finds the changes that do not."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.copying import copy_with

FLOAT32_FLOOR = 1e-3
"""Smallest tolerance in float32, relative to the largest output; a different order of summation changes about 1e-6."""
FLOAT64_FLOOR = 1e-9
"""The same in float64, where a different order of summation changes about 1e-14."""


def harmless_changes(
    network: nn.Module, input_shape: Sequence[int], names: Sequence[str], change: Callable[[Sequence[str]], nn.Module]
) -> list[str]:
    """Returns those ``names`` whose changes, made together, leave the function of ``network`` unchanged up to rounding.

    Copies of the networks run in evaluation mode on the CPU, in float64 if their code allows it.

    Args:
        network: The network without changes. It is not modified.
        input_shape: (C, H, W).
        names: The changes to test.
        change: Returns the network with the changes of some of the names.
    """
    reference = _Reference(network, input_shape)

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
    run: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    expected: Sequence[Tensor],
    floor: float,
    generator: torch.Generator,
) -> float:
    """Returns the largest relative difference between two outputs that rounding can explain.

    An untrained network can amplify a change in the last digit without bound. The tolerance is therefore 1000 times the
    difference that noise in the last digits of the input causes, and at least ``floor``.

    Args:
        run: Returns the output tensors of the network for a batch of images.
        images: The batch, (N, C, H, W).
        expected: ``run(images)``.
        floor: The smallest tolerance.
        generator: Draws the noise, on the CPU.
    """
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype) * (4 * torch.finfo(images.dtype).eps)
    return max(floor, 1000 * relative_difference(expected, run(images * (1 + noise.to(images.device)))))


def relative_difference(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """Returns the largest absolute difference of any output, relative to that output's largest absolute value.

    NaN in any output gives NaN.
    """
    differences = [
        (reference - output).abs().max() / (reference.abs().max() if reference.any() else 1.0)
        for reference, output in zip(expected, outputs, strict=True)
    ]
    return float(torch.stack(differences).max())


def output_tensors(output: Any) -> list[Tensor]:
    """Returns all tensors in a network's output, which may be a tensor, a tuple, a list or a dictionary."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


class _Reference:
    """The output of a network for two images of noise, with which the outputs of other networks are compared."""

    def __init__(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(2, *input_shape, generator=generator, dtype=torch.float64)
        floor = FLOAT64_FLOOR
        try:
            self.expected = _outputs(network, self.images)
        except Exception:  # the network's code requires float32
            self.images, floor = self.images.float(), FLOAT32_FLOOR
            self.expected = _outputs(network, self.images)
        self.tolerance = rounding_tolerance(
            lambda images: _outputs(network, images), self.images, self.expected, floor, generator
        )

    def equals(self, network: nn.Module) -> bool:
        return relative_difference(self.expected, _outputs(network, self.images)) <= self.tolerance


@torch.no_grad()
def _outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Runs a copy of the network on the CPU in the dtype of the images."""

    def replace(_: str, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", images.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    return output_tensors(copy_with(network, replace).eval()(images))
