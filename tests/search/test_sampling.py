"""Tests random search and evolution within a budget."""

import math
import random
from collections.abc import Callable
from itertools import islice, product

import pytest

from autoslim.channels.groups import Channels
from autoslim.errors import UserError
from autoslim.search.sampling import Scored, evolution, random_search, random_within

NUMBERS = {"a": [1, 2, 4, 8], "b": [3, 6, 9], "c": [2, 4, 6, 8, 10]}


def cost(channels: Channels) -> int:
    return channels["a"] * channels["b"] + channels["b"] * channels["c"]


@pytest.mark.parametrize("seed", range(20))
def test_a_random_configuration_uses_the_whole_budget(seed: int) -> None:
    draw = random.Random(seed)
    budget = draw.uniform(10, 170)
    channels = random_within(NUMBERS, lambda c: cost(c) <= budget, draw)
    assert cost(channels) <= budget
    for name, levels in NUMBERS.items():
        wider = [number for number in levels if number > channels[name]]
        assert not wider or cost({**channels, name: wider[0]}) > budget


def test_random_configurations_differ_and_follow_the_seed() -> None:
    def found(seed: int) -> list[Scored]:
        return list(random_search(NUMBERS, lambda c: cost(c) <= 60, cost, 30, seed))

    assert found(1) == found(1) != found(2)
    assert len({tuple(each.channels.values()) for each in found(1)}) >= 5


Search = Callable[..., object]


@pytest.mark.parametrize("search", [random_search, evolution])
def test_a_budget_below_the_narrowest_is_refused(search: Search) -> None:
    with pytest.raises(UserError, match="narrowest configuration exceeds the budget"):
        list(search(NUMBERS, lambda c: False, cost, 5, 0))  # type: ignore[call-overload]


def test_evolution_approaches_the_best_configuration() -> None:
    numbers = {str(group): list(range(1, 13)) for group in range(6)}
    wanted = {"0": 12, "1": 3, "2": 7, "3": 1, "4": 10, "5": 5}

    def score(channels: Channels) -> float:
        return sum(math.log(channels[name] / count) ** 2 for name, count in wanted.items())

    def fits(channels: Channels) -> bool:
        return sum(channels.values()) <= sum(wanted.values())

    def best(search: Callable[..., object], seed: int) -> float:
        found = list(search(numbers, fits, score, 200, seed))  # type: ignore[call-overload]
        assert all(fits(each.channels) for each in found)
        assert len(found) == 200
        return min(each.score for each in found)

    pairs = [(best(evolution, seed), best(random_search, seed)) for seed in range(5)]
    assert all(evolved < 0.5 * drawn for evolved, drawn in pairs), pairs


def test_evolution_starts_with_random_configurations_and_scores_none_twice() -> None:
    scored: list[tuple[int, ...]] = []

    def score(channels: Channels) -> float:
        scored.append(tuple(channels.values()))
        return cost(channels)

    def fits(channels: Channels) -> bool:
        return cost(channels) <= 60

    found = list(evolution(NUMBERS, fits, score, 60, 3, population=10))
    assert len(scored) == len(set(scored)) <= len(list(product(*NUMBERS.values())))
    drawn = list(islice(random_search(NUMBERS, fits, cost, 10, 3), 10))
    assert found[:10] == drawn
