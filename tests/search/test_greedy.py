"""Compares greedy slimming with a brute-force reference on tables of scores."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from autoslim.channels import grid as grids
from autoslim.search.greedy import Option, SlimmingStep, exhaustive_rule, greedy_slim, slimming_options
from autoslim.tasks.task import Score

Grid = dict[str, tuple[int, ...]]
GRID: Grid = {"a": (8, 6, 4, 2), "b": (10, 5), "c": (9, 6, 3), "d": (7,), "e": (4, 3, 2, 1)}


def cost(channels: Mapping[str, int]) -> int:
    return (
        channels["a"] * channels["b"]
        + 3 * channels["b"] * channels["c"]
        + channels["c"] * channels["d"]
        + 5 * channels["a"] * channels["e"]
    )


def table(seed: int, levels: int = 1000) -> Callable[[Mapping[str, int]], Score]:
    """Returns a random but constant score for each configuration. Few ``levels`` cause ties."""
    draw = random.Random(seed)
    scores = {
        combination: Score(draw.randrange(levels) / levels, draw.randrange(levels) / levels * 3)
        for combination in itertools.product(*GRID.values())
    }
    return lambda channels: scores[tuple(channels[name] for name in GRID)]


Path = list[tuple[tuple[str, ...], dict[str, int]]]


def reference(
    score: Callable[[Mapping[str, int]], Score], stop: float, by: str, per_cost: bool, step: float = 0.0
) -> Path:
    """Searches by definition: all single steps are scored and sorted; a step takes groups until the cost has fallen."""
    current = {name: levels[0] for name, levels in GRID.items()}
    path: Path = [((), current)]
    while cost(current) > stop:
        increases = {}
        for name, levels in GRID.items():
            if current[name] > levels[-1]:
                slimmer = current | {name: max(level for level in levels if level < current[name])}
                before, after = score(current), score(slimmer)
                increases[name] = (
                    slimmer[name],
                    after.error - before.error,
                    after.loss - before.loss,
                )
        if not increases:
            break
        start, taken, most = cost(current), [], max(1, len(increases) // 2)
        while not taken or (step and len(taken) < most and cost(current) > max(stop, start * (1 - step))):
            keys = []
            for name, (count, error, entropy) in increases.items():
                saving = cost(current) - cost(current | {name: count})
                if per_cost:  # an increase per unit saved; a decrease counts more with a large saving
                    error = error / saving if error > 0 else error * saving
                    entropy = entropy / saving if entropy > 0 else entropy * saving
                keys.append((*((error, entropy) if by == "error" else (entropy, error)), -saving, name))
            *_, name = min(keys, key=lambda key: key[:3])
            current = current | {name: increases.pop(name)[0]}
            taken.append(name)
        path.append((tuple(taken), current))
    return path


def search(score: Callable[[Mapping[str, int]], Score], stop: float, **settings: Any) -> list[SlimmingStep]:
    return list(greedy_slim(GRID, cost, exhaustive_rule(score), stop, **settings))


def path_of(steps: Sequence[SlimmingStep]) -> Path:
    return [(step.slimmed, step.channels) for step in steps]


@pytest.mark.parametrize("levels", [1000, 3])
@pytest.mark.parametrize("step", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("per_cost", [False, True])
@pytest.mark.parametrize("by", ["error", "cross_entropy"])
def test_the_path_equals_the_references(by: str, per_cost: bool, step: float, levels: int) -> None:
    for seed in range(20):
        score = table(seed, levels)
        for stop in (0, 120, 200):
            steps = search(score, stop, by=by, per_cost=per_cost, step=step)
            assert path_of(steps) == reference(score, stop, by, per_cost, step)


def test_every_step_records_its_options() -> None:
    score = table(3)
    steps = search(score, 0)
    assert (steps[0].slimmed, steps[0].channels) == ((), {"a": 8, "b": 10, "c": 9, "d": 7, "e": 4})
    assert (steps[-1].options, steps[-1].taken) == ({}, ())
    for step in steps:
        assert (step.cost, step.score) == (cost(step.channels), score(step.channels))
    for step, after in itertools.pairwise(steps):
        assert step.options.keys() == {name for name, levels in GRID.items() if step.channels[name] != levels[-1]}
        for name, option in step.options.items():
            channels = step.channels | {name: option.channels}
            assert option.channels == GRID[name][GRID[name].index(step.channels[name]) + 1]
            assert option == Option(option.channels, cost(channels), step.cost - cost(channels))
            assert step.scores[name] == score(channels)
        assert step.following == after.channels
        (taken,) = step.taken
        assert after.slimmed == step.taken
        assert step.scores[taken].error == min(scored.error for scored in step.scores.values())


def test_ties_go_to_cross_entropy_then_to_the_larger_saving_not_to_position() -> None:
    grid = {"first": (2, 1), "second": (2, 1), "third": (2, 1)}
    weights = {"first": 1, "second": 5, "third": 3}

    def price(channels: Mapping[str, int]) -> int:
        return sum(weights[name] * count for name, count in channels.items())

    def even(channels: Mapping[str, int]) -> Score:
        return Score(0.5, 1.0)

    def third_is_better(channels: Mapping[str, int]) -> Score:
        return Score(0.5, 0.9 if channels["third"] == 1 else 1.0)

    steps = list(greedy_slim(grid, price, exhaustive_rule(even), 0))
    assert [step.slimmed for step in steps] == [(), ("second",), ("third",), ("first",)]
    assert next(greedy_slim(grid, price, exhaustive_rule(third_is_better), 0)).taken == ("third",)


def test_a_step_is_taken_however_much_the_error_increases() -> None:
    """It is not undone even if the error rises to one, and it is also taken if the error falls."""
    grid = {"a": (3, 2, 1)}
    errors = {3: 0.2, 2: 1.0, 1: 0.1}
    steps = greedy_slim(grid, lambda c: c["a"], exhaustive_rule(lambda c: Score(errors[c["a"]], 0)), 0)
    assert [step.score.error for step in steps] == [0.2, 1.0, 0.1]


@pytest.mark.parametrize("step", [0.0, 0.25])
def test_configurations_are_nested_and_costs_fall(step: float) -> None:
    for seed in range(10):
        steps = search(table(seed), 0, step=step)
        for before, after in itertools.pairwise(steps):
            assert {name for name in GRID if after.channels[name] < before.channels[name]} == set(after.slimmed)
            assert all(after.channels[name] <= before.channels[name] for name in GRID)
            assert after.cost < before.cost
        assert steps[-1].channels == {name: levels[-1] for name, levels in GRID.items()}


def test_a_step_of_several_groups_ends_when_the_cost_has_fallen_by_its_share() -> None:
    several = 0
    for seed in range(40):
        for before, after in itertools.pairwise(search(table(seed), 0, step=0.2)):
            several += len(after.slimmed) > 1
            without_last = after.channels | {after.slimmed[-1]: before.channels[after.slimmed[-1]]}
            assert after.cost <= 0.8 * before.cost or len(after.slimmed) == max(1, len(before.options) // 2)
            assert cost(without_last) > 0.8 * before.cost
    assert several > 10


def test_steps_are_twice_as_large_above_a_cost() -> None:
    for seed in range(10):
        small, large = (search(table(seed), 300, step=step) for step in (0.1, 0.2))
        coarse = search(table(seed), 300, step=0.1, coarse_above=300)
        assert path_of(coarse) == path_of(large)
        assert path_of(search(table(seed), 300, step=0.1, coarse_above=10_000)) == path_of(small)
    assert path_of(small) != path_of(large)


@pytest.mark.parametrize("stop", [10_000, 350, 200, 150, 0])
def test_it_stops_at_the_first_configuration_within_the_bound(stop: int) -> None:
    steps = search(table(0), stop)
    assert search(table(0), steps[-1].cost) == steps  # a cost equal to the bound is within it
    assert all(step.cost > stop for step in steps[:-1])
    exhausted = all(steps[-1].channels[name] == levels[-1] for name, levels in GRID.items())
    assert steps[-1].cost <= stop or exhausted


@pytest.mark.parametrize("step", [0.0, 0.25])
def test_a_search_can_continue_from_any_step(step: float) -> None:
    whole = search(table(5), 100, step=step)
    for number in range(1, len(whole) + 1):
        assert search(table(5), 100, step=step, done=whole[:number]) == whole[number:]


def test_each_option_and_each_step_is_scored_once_and_nothing_else() -> None:
    scored: list[tuple[int, ...]] = []
    score = table(2)

    def counting(channels: Mapping[str, int]) -> Score:
        scored.append(tuple(channels.values()))
        return score(channels)

    steps = search(counting, 0)
    assert len(scored) == sum(1 + len(step.options) for step in steps)


def test_steps_are_yielded_as_they_are_found() -> None:
    """A search that is killed has yielded all earlier steps."""
    calls = 0

    def score(channels: Mapping[str, int]) -> Score:
        nonlocal calls
        calls += 1
        return Score(0, 0)

    steps = greedy_slim(GRID, cost, exhaustive_rule(score), 0)
    assert calls == 0
    next(steps)
    assert calls == 1 + 4  # the widest configuration and its options


def test_groups_that_do_not_determine_the_cost_are_not_slimmed() -> None:
    """The cost is a peak, as of memory. Slimming ``low`` improves the score but saves nothing."""
    grid = {"high": (8, 6, 4, 2), "low": (4, 3, 2, 1)}

    def peak(channels: Mapping[str, int]) -> int:
        return max(channels["high"], channels["low"])

    def score(channels: Mapping[str, int]) -> Score:
        return Score(1 - channels["high"] / 10 + channels["low"] / 100, 0)

    for per_cost in (False, True):
        steps = list(greedy_slim(grid, peak, exhaustive_rule(score), 4, per_cost=per_cost))
        assert [step.channels for step in steps] == [{"high": high, "low": 4} for high in (8, 6, 4)]


def test_an_option_is_the_first_number_that_saves() -> None:
    """Latency often falls only every few channels, and it may rise in between."""
    grid = grids.Grid({"a": (5, 4, 3, 2, 1)})
    milliseconds = {5: 3.0, 4: 3.0, 3: 3.1, 2: 2.5, 1: 2.4}
    options = slimming_options(grid, {"a": 5}, lambda channels: milliseconds[channels["a"]])
    assert options == {"a": Option(2, 2.5, 0.5)}


def test_if_no_group_saves_alone_those_that_save_together_are_options() -> None:
    grid = grids.Grid({"a": (4, 2), "b": (4, 1), "c": (2, 1)})

    def peak(channels: Mapping[str, int]) -> int:
        return max(10 * channels["a"], 10 * channels["b"], channels["c"])

    options = slimming_options(grid, grid.widest, peak)
    assert options == {"a": Option(2, 40, 20), "b": Option(1, 40, 20)}
    score = exhaustive_rule(lambda channels: Score(sum(channels.values()) / 10, 0))
    steps = list(greedy_slim(grid, peak, score, 0))
    assert [step.slimmed for step in steps] == [(), ("b",), ("a",)]  # c cannot reduce the peak
    assert [step.cost for step in steps] == [40, 40, 20]


def test_the_search_ends_where_slimming_no_longer_reduces_the_cost() -> None:
    grid = {"a": (4, 2, 1)}
    steps = list(greedy_slim(grid, lambda c: max(c["a"], 2), exhaustive_rule(lambda c: Score(0, 0)), 0))
    assert [step.channels["a"] for step in steps] == [4, 2]
