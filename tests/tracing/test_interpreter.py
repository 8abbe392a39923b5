"""Runs on the meta device have the shapes, strides and types of runs on the CPU, and fail where these fail."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoslim.tracing.interpreter import for_shapes

LAYOUTS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((5, 6), (0, 1)),
    ((2, 5, 6), (0, 1, 2)),
    ((2, 6, 5), (0, 2, 1)),
    ((2, 4, 6, 4), (0, 1, 3, 2)),
    ((2, 6, 4, 5), (0, 2, 3, 1)),  # channels last
)
"""Shapes and permutations of tensors with 6 channels along the last axis or along axis 1."""

OPERATIONS: dict[str, Callable[[Tensor, torch.device], Tensor]] = {
    "relu": lambda x, _: F.relu(x),
    "gelu": lambda x, _: F.gelu(x, approximate="tanh"),
    "relu6": lambda x, _: F.relu6(x),
    "hardsigmoid": lambda x, _: F.hardsigmoid(x),
    "elu": lambda x, _: F.elu(x, 0.5),
    "in place": lambda x, _: F.silu(x, inplace=True).unsqueeze(0),
    "linear": lambda x, device: F.linear(x, torch.ones(3, x.shape[-1], device=device), torch.ones(3, device=device)),
    "no bias": lambda x, device: F.linear(x, torch.ones(3, x.shape[-1], device=device)),
    "layer norm": lambda x, device: F.layer_norm(x, x.shape[-1:], torch.ones(x.shape[-1], device=device)),
    "same": lambda x, _: x * x,
    "vector": lambda x, device: torch.ones(x.shape[-1], device=device) - x,
    "pixels": lambda x, device: x + torch.ones(x.shape[-2], 1, device=device),
    "number": lambda x, _: 2 / (3 + x) * 0.5,
    "double": lambda x, device: x + torch.ones(x.shape, dtype=torch.float64, device=device),
    "whole": lambda x, device: x / torch.ones(x.shape, dtype=torch.int64, device=device),
    "outer": lambda x, device: x.unsqueeze(-2) * torch.ones(7, 1, device=device),
    "join": lambda x, device: torch.cat([x, torch.ones(x.shape, device=device), x], -1),
    "join rows": lambda x, _: torch.cat((x, x[:, :1]), dim=1),
    "join types": lambda x, device: torch.cat([x, torch.ones(x.shape, dtype=torch.float64, device=device)]),
    "other order": lambda x, device: x + torch.ones(x.shape, device=device),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("shape", "order"), LAYOUTS)
def test_a_meta_run_has_the_shapes_of_a_real_run(name: str, shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    outputs = []
    for device in map(torch.device, ("cpu", "meta")):
        with for_shapes(device):
            outputs.append(OPERATIONS[name](torch.ones(shape, device=device).permute(order), device))
    real, meta = outputs
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + x[:, :5],
        lambda x: torch.cat([x, x[:, :5]]),
        lambda x: F.linear(x, x.new_ones(3, 5)),
        lambda x: F.linear(x, x.new_ones(3, 6), x.new_ones(4)),
        lambda x: F.layer_norm(x, (5,)),
        lambda x: F.layer_norm(x, (6,), x.new_ones(5)),
        lambda x: F.batch_norm(x, x.new_ones(5), x.new_ones(6)),
    ],
)
def test_a_meta_run_fails_where_a_real_run_fails(wrong: Callable[[Tensor], Tensor]) -> None:
    for device in map(torch.device, ("cpu", "meta")):
        with for_shapes(device), pytest.raises((RuntimeError, ValueError)):
            wrong(torch.ones(4, 6))


def test_linear_layers_are_counted_on_the_meta_device() -> None:
    with for_shapes(torch.device("meta")), FlopCounterMode(display=False) as counter:
        F.linear(torch.ones(2, 5, 6), torch.ones(3, 6), torch.ones(3))
    assert counter.get_total_flops() == 2 * (2 * 5 * 6 * 3)
