"""Compares pruning by importance and by sensitivity with brute force over all thresholds."""

import random
from itertools import pairwise

import pytest
import torch

from autoslim.channels.groups import ChannelGroup, Channels
from autoslim.errors import UserError
from autoslim.search.pruning import least_sensitive, most_important


def cost(channels: Channels) -> int:
    names = list(channels)
    return sum(channels[a] * channels[b] for a, b in pairwise(names)) + channels[names[0]]


@pytest.mark.parametrize("seed", range(20))
def test_the_lowest_threshold_that_fits_decides(seed: int) -> None:
    draw = random.Random(seed)
    units = {name: draw.randint(3, 9) for name in "abc"}
    groups = {name: ChannelGroup(name, 2 * count, 2, (name,)) for name, count in units.items()}
    importance = {name: 10.0 ** draw.randint(-3, 3) * torch.rand(n, dtype=torch.float64) for name, n in units.items()}
    numbers = {name: list(range(2, 2 * count + 1, 2)) for name, count in units.items()}
    widest = {name: 2 * count for name, count in units.items()}
    budget = draw.uniform(0.2, 1.0) * cost(widest)
    found = most_important(importance, groups, numbers, lambda c: cost(c) <= budget)
    relative = {name: values / values.mean() for name, values in importance.items()}
    possible = []
    for threshold in [-1.0, *torch.cat(list(relative.values())).tolist()]:
        channels = {name: max(2, 2 * int((values > threshold).sum())) for name, values in relative.items()}
        if cost(channels) <= budget:
            possible.append(channels)
    assert cost(found) == max(map(cost, possible))
    assert found in possible


def test_the_scale_of_a_layer_does_not_matter() -> None:
    groups = {name: ChannelGroup(name, 4, 1, (name,)) for name in "ab"}
    numbers = {name: [1, 2, 3, 4] for name in groups}
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    for factor in (1e-6, 1.0, 1e6):
        found = most_important({"a": values, "b": factor * values}, groups, numbers, lambda c: sum(c.values()) <= 4)
        assert found == {"a": 2, "b": 2}


def test_kept_channels_are_rounded_up_to_allowed_numbers_and_groups_without_importance_stay() -> None:
    groups = {name: ChannelGroup(name, 8, 1, (name,)) for name in "ab"}
    numbers = {"a": [4, 8], "b": [2, 8]}
    importance = {"a": torch.arange(1.0, 9.0, dtype=torch.float64)}
    assert most_important(importance, groups, numbers, lambda c: c["a"] < 8) == {"a": 4, "b": 8}


def test_a_budget_below_the_narrowest_is_refused() -> None:
    groups = {"a": ChannelGroup("a", 4, 1, ("a",))}
    with pytest.raises(UserError, match="narrowest configuration exceeds the budget"):
        most_important({"a": torch.ones(4, dtype=torch.float64)}, groups, {"a": [2, 4]}, lambda c: False)
    with pytest.raises(UserError, match="narrowest configuration exceeds the budget"):
        least_sensitive({"a": {4: 0.0, 2: 0.1}}, lambda c: False)


@pytest.mark.parametrize("seed", range(20))
def test_no_lower_tolerance_fits(seed: int) -> None:
    """The largest increase among the groups is the smallest with which any configuration is within the limits."""
    draw = random.Random(seed)
    increases = {name: {n: 0.0 if n == 5 else draw.uniform(-0.1, 1.0) for n in range(1, 6)} for name in "abc"}
    budget = draw.uniform(0.2, 0.9) * cost(dict.fromkeys("abc", 5))
    found = least_sensitive(increases, lambda c: cost(c) <= budget)
    assert cost(found) <= budget
    # a wider group is no worse than a narrower one
    worst = {name: {n: max(0.0, *(by[m] for m in range(n, 6))) for n in by} for name, by in increases.items()}
    needed = min(
        max(worst["a"][a], worst["b"][b], worst["c"][c])
        for a in range(1, 6)
        for b in range(1, 6)
        for c in range(1, 6)
        if cost({"a": a, "b": b, "c": c}) <= budget
    )
    assert max(worst[name][number] for name, number in found.items()) == needed


def test_unused_budget_goes_back_to_the_groups_that_were_slimmed_last() -> None:
    increases = {"a": {10: 0.0, 5: 0.1}, "b": {10: 0.0, 1: 0.2}, "c": {10: 0.0, 9: 0.15}}
    # a, then c, then b are slimmed, which leaves 15; c costs more accuracy than a, and both would be 21
    assert least_sensitive(increases, lambda c: sum(c.values()) <= 20) == {"a": 5, "b": 1, "c": 10}
    assert least_sensitive(increases, lambda c: sum(c.values()) <= 21) == {"a": 10, "b": 1, "c": 10}
