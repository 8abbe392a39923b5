"""Compares batch norm statistics over ranks with torch's batch norm of the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.distributed.ranks import SINGLE, World
from autoslim.distributed.sync import synchronised_batch_norm


class OtherRank(World):
    """Rank 0 of two. The batch of the other rank is ``other`` (N, C)."""

    def __init__(self, other: Tensor) -> None:
        super().__init__(0, 2)
        self.other = other

    def gather(self, tensor: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.other, 0, correction=0)
        return torch.stack([tensor, torch.stack([mean, variance, torch.full_like(mean, len(self.other))])])


def running_statistics(channels: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)


@pytest.mark.parametrize("shares", [(1, 1), (3, 2)])
def test_running_statistics_are_those_of_the_whole_batch(shares: tuple[int, int]) -> None:
    """One value per channel on each rank suffices."""
    batch = torch.randn(sum(shares), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch_here, other = batch.split(shares)
    statistics, expected = running_statistics(3), running_statistics(3)
    with synchronised_batch_norm(OtherRank(other)):
        output = F.batch_norm(batch_here, *statistics, training=True)
    torch.testing.assert_close(output, F.batch_norm(batch, *expected, training=True)[: len(batch_here)])
    torch.testing.assert_close(statistics, expected)


@pytest.mark.parametrize("world", [SINGLE, OtherRank(torch.zeros(1, 3))], ids=["one value", "empty share"])
def test_too_few_values_raise_as_in_torch(world: World) -> None:
    batch = torch.zeros(1 if world.is_single else 0, 3)
    with synchronised_batch_norm(world), pytest.raises(ValueError, match="Expected more than 1 value per channel when"):
        F.batch_norm(batch, *running_statistics(3), training=True)
