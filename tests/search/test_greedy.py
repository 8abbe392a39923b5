"""Compares greedy slimming with a brute-force reference on tables of scores."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from autoslim import greedy_slim
from autoslim.search.greedy import SlimmingStep
from autoslim.tasks.classification import Score

Grid = dict[str, tuple[int, ...]]
GRID: Grid = {"a": (8, 6, 4, 2), "b": (10, 5), "c": (9, 6, 3), "d": (7,)}


def cost(channels: Mapping[str, int]) -> int:
    return channels["a"] * channels["b"] + 3 * channels["b"] * channels["c"] + channels["c"] * channels["d"]


def table(seed: int, levels: int = 1000) -> Callable[[Mapping[str, int]], Score]:
    """Returns a random but constant score for each configuration. Few ``levels`` cause ties."""
    draw = random.Random(seed)
    scores = {
        combination: Score(draw.randrange(levels) / levels, draw.randrange(levels) / levels * 3)
        for combination in itertools.product(*GRID.values())
    }
    return lambda channels: scores[tuple(channels[name] for name in GRID)]


def reference(
    score: Callable[[Mapping[str, int]], Score], stop: float, by: str, per_cost: bool
) -> list[tuple[str | None, dict[str, int]]]:
    """Searches by definition: all single steps are scored and sorted."""
    current = {name: levels[0] for name, levels in GRID.items()}
    path: list[tuple[str | None, dict[str, int]]] = [(None, current)]
    while cost(current) > stop:
        steps = []
        for name, levels in GRID.items():
            if current[name] == levels[-1]:
                continue
            slimmer = dict(current)
            slimmer[name] = max(level for level in levels if level < current[name])
            saving = cost(current) - cost(slimmer)
            error, entropy = score(slimmer).error, score(slimmer).cross_entropy
            if per_cost:  # an increase per unit saved; a decrease counts more with a large saving
                error -= score(current).error
                entropy -= score(current).cross_entropy
                error = error / saving if error > 0 else error * saving
                entropy = entropy / saving if entropy > 0 else entropy * saving
            keys = (error, entropy) if by == "error" else (entropy, error)
            steps.append((*keys, -saving, name, slimmer))
        if not steps:
            break
        *_, name, current = sorted(steps, key=lambda step: step[:3])[0]
        path.append((name, current))
    return path


def path_of(steps: Sequence[SlimmingStep]) -> list[tuple[str | None, dict[str, int]]]:
    return [(step.slimmed, step.channels) for step in steps]


@pytest.mark.parametrize("levels", [1000, 3])
@pytest.mark.parametrize("per_cost", [False, True])
@pytest.mark.parametrize("by", ["error", "cross_entropy"])
def test_the_path_equals_the_references(by: str, per_cost: bool, levels: int) -> None:
    for seed in range(40):
        score = table(seed, levels)
        for stop in (0, 120, 200):
            steps = list(greedy_slim(GRID, cost, score, stop, by=by, per_cost=per_cost))  # type: ignore[arg-type]
            assert path_of(steps) == reference(score, stop, by, per_cost)


def test_every_step_records_its_candidates() -> None:
    score = table(3)
    steps = list(greedy_slim(GRID, cost, score, 0))
    assert steps[0] == SlimmingStep(
        None, {"a": 8, "b": 10, "c": 9, "d": 7}, cost({"a": 8, "b": 10, "c": 9, "d": 7}), score(steps[0].channels)
    )
    for before, step in itertools.pairwise(steps):
        movable = {name for name, levels in GRID.items() if before.channels[name] != levels[-1]}
        assert step.candidates.keys() == movable
        for name, candidate in step.candidates.items():
            channels = before.channels | {name: candidate.channels}
            assert candidate.channels == GRID[name][GRID[name].index(before.channels[name]) + 1]
            assert (candidate.cost, candidate.score) == (cost(channels), score(channels))
        assert step.slimmed is not None
        chosen = step.candidates[step.slimmed]
        assert (step.cost, step.score, step.channels[step.slimmed]) == (chosen.cost, chosen.score, chosen.channels)
        assert chosen.score.error == min(candidate.score.error for candidate in step.candidates.values())


def test_ties_go_to_cross_entropy_then_to_the_larger_saving_not_to_position() -> None:
    grid = {"first": (2, 1), "second": (2, 1), "third": (2, 1)}
    weights = {"first": 1, "second": 5, "third": 3}

    def price(channels: Mapping[str, int]) -> int:
        return sum(weights[name] * count for name, count in channels.items())

    def even(channels: Mapping[str, int]) -> Score:
        return Score(0.5, 1.0)

    def third_is_better(channels: Mapping[str, int]) -> Score:
        return Score(0.5, 0.9 if channels["third"] == 1 else 1.0)

    assert [step.slimmed for step in greedy_slim(grid, price, even, 0)] == [None, "second", "third", "first"]
    assert next(itertools.islice(greedy_slim(grid, price, third_is_better, 0), 1, 2)).slimmed == "third"


def test_a_step_is_taken_however_much_the_error_increases() -> None:
    """It is not undone even if the error rises to one, and it is also taken if the error falls."""
    grid = {"a": (3, 2, 1)}
    errors = {3: 0.2, 2: 1.0, 1: 0.1}
    steps = list(greedy_slim(grid, lambda c: c["a"], lambda c: Score(errors[c["a"]], 0), 0))
    assert [step.score.error for step in steps] == [0.2, 1.0, 0.1]


def test_configurations_are_nested_and_costs_fall() -> None:
    for seed in range(10):
        steps = list(greedy_slim(GRID, cost, table(seed), 0))
        for before, step in itertools.pairwise(steps):
            changed = [name for name in GRID if step.channels[name] != before.channels[name]]
            assert changed == [step.slimmed]
            assert all(step.channels[name] <= before.channels[name] for name in GRID)
            assert step.cost < before.cost
        assert steps[-1].channels == {name: levels[-1] for name, levels in GRID.items()}


@pytest.mark.parametrize("stop", [10_000, 350, 200, 150, 0])
def test_it_stops_at_the_first_configuration_within_the_bound(stop: int) -> None:
    steps = list(greedy_slim(GRID, cost, table(0), stop))
    assert list(greedy_slim(GRID, cost, table(0), steps[-1].cost)) == steps  # a cost equal to the bound is within it
    assert all(step.cost > stop for step in steps[:-1])
    exhausted = all(steps[-1].channels[name] == levels[-1] for name, levels in GRID.items())
    assert steps[-1].cost <= stop or exhausted


def test_a_search_can_continue_from_any_step() -> None:
    whole = list(greedy_slim(GRID, cost, table(5), 100))
    for number in range(1, len(whole) + 1):
        assert list(greedy_slim(GRID, cost, table(5), 100, done=whole[:number])) == whole[number:]


def test_each_candidate_is_scored_once_and_nothing_else() -> None:
    scored: list[tuple[int, ...]] = []
    score = table(2)

    def counting(channels: Mapping[str, int]) -> Score:
        scored.append(tuple(channels.values()))
        return score(channels)

    steps = list(greedy_slim(GRID, cost, counting, 0))
    assert len(scored) == 1 + sum(len(step.candidates) for step in steps)


def test_steps_are_yielded_as_they_are_found() -> None:
    """A search that is killed has yielded all earlier steps."""
    calls = 0

    def score(channels: Mapping[str, int]) -> Score:
        nonlocal calls
        calls += 1
        return Score(0, 0)

    steps = greedy_slim(GRID, cost, score, 0)
    assert calls == 0
    next(steps)
    assert calls == 1
