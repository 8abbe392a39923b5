"""Compares refinement with definitions on tables of losses, and with a real supernet."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import KilledError
from small_data import SPAN, run_context, search_settings
from torch import nn

from autoslim import Supernet, trace
from autoslim.channels.grid import Anchor, Grid, GridSpec
from autoslim.channels.groups import Channels
from autoslim.data.prepared import PreparedData
from autoslim.resources.costs import Costs
from autoslim.search import refinement as refining
from autoslim.search.racing import ChunkRunner
from autoslim.search.refinement import Change, Evaluate, fine_numbers, refine, refine_within
from autoslim.search.scoring import CURRENT, Outcome
from autoslim.training.checkpoints import Checkpoints

IMAGES = 50
GRID = Grid({"a": (8, 6, 4, 2), "b": (8, 6, 4, 2), "c": (8, 6, 4, 2)})
NUMBERS = {name: list(range(2, 9)) for name in GRID}
VALUE = {"a": 3.5, "b": 2.0, "c": 1.0}
NOISE = torch.linspace(-1, 1, IMAGES, dtype=torch.float64)


def evaluator(loss: Callable[[Mapping[str, int]], float], calls: list[Channels] | None = None) -> Evaluate:
    """Returns an evaluation in which the loss of every image is that of the configuration, plus the same noise."""

    def evaluate(channels: Channels, changes: Mapping[str, int]) -> dict[str, Outcome]:
        outcomes = {}
        for name, configuration in {CURRENT: channels, **{n: {**channels, n: k} for n, k in changes.items()}}.items():
            if calls is not None:
                calls.append(configuration)
            losses = loss(configuration) + NOISE
            outcomes[name] = Outcome(losses, losses)
        return outcomes

    return evaluate


def diminishing(channels: Mapping[str, int]) -> float:
    return sum(VALUE[name] / count for name, count in channels.items())


def changes_of(
    channels: Channels, fits: Callable[[Channels], bool], loss: Callable[[Mapping[str, int]], float] = diminishing
) -> list[Change]:
    return list(refine(channels, GRID, NUMBERS, fits, evaluator(loss), "cross_entropy"))


def within(limit: float) -> Callable[[Channels], bool]:
    return lambda channels: sum(channels.values()) <= limit


def test_the_rest_of_the_budget_is_used_by_the_best_groups() -> None:
    """Each change is the best single step that fits, by definition; the last one is as large as fits."""
    channels = {"a": 4, "b": 4, "c": 4}
    changes = changes_of(channels, within(17))
    assert [change.groups for change in changes] == [{"a": 6}, {"b": 6}, {"a": 7}]
    for change in changes:
        assert change.improvement == pytest.approx(diminishing(channels) - diminishing(change.channels))
        channels = change.channels
    assert channels == {"a": 7, "b": 6, "c": 4}


def test_groups_exchange_channels_when_no_group_can_be_widened() -> None:
    """The result is the best configuration of the grid within the limit, as found by trying all of them."""
    changes = changes_of({"a": 2, "b": 2, "c": 8}, within(12))
    assert [change.groups for change in changes] == [{"a": 4, "c": 6}, {"b": 4, "c": 4}, {"a": 6, "c": 2}]
    every = (dict(zip(GRID, counts, strict=True)) for counts in itertools.product(*GRID.values()))
    best = min((channels for channels in every if within(12)(channels)), key=diminishing)
    assert changes[-1].channels == best


def test_a_change_that_does_not_improve_the_score_is_not_made() -> None:
    assert changes_of({"a": 4, "b": 4, "c": 4}, within(100), lambda channels: sum(channels.values())) == []
    assert changes_of({"a": 4, "b": 4, "c": 4}, within(100), lambda channels: 1.0) == []


@pytest.mark.parametrize(("noise", "is_made"), [(0.1, True), (10.0, False)])
def test_an_exchange_must_exceed_the_noise(noise: float, is_made: bool) -> None:
    """Widening a and slimming b improves the mean loss by 0.09; with much noise that is less than a standard error."""

    def outcome(channels: Channels) -> Outcome:
        losses = NOISE + 0.01 * (channels["b"] - channels["a"]) + 0.1 * channels["c"]
        if channels["a"] > 4 and channels["b"] < 4:
            losses = losses + noise * NOISE - 0.05
        return Outcome(losses, losses)

    def evaluate(channels: Channels, changes: Mapping[str, int]) -> dict[str, Outcome]:
        return {CURRENT: outcome(channels), **{n: outcome({**channels, n: count}) for n, count in changes.items()}}

    change = next(refine({"a": 4, "b": 4, "c": 2}, GRID, NUMBERS, within(10), evaluate, "error"), None)
    assert change == (Change({"a": 6, "b": 2}, {"a": 6, "b": 2, "c": 2}, pytest.approx(0.09)) if is_made else None)


def test_no_configuration_is_evaluated_twice_and_all_changes_fit() -> None:
    calls: list[Channels] = []
    fits = within(13)
    changes = list(refine({"a": 2, "b": 2, "c": 8}, GRID, NUMBERS, fits, evaluator(diminishing, calls), "error"))
    assert all(fits(change.channels) for change in changes)
    again = {tuple(channels.values()) for channels in calls if calls.count(channels) > 1}
    assert again <= {(2, 2, 8), *(tuple(change.channels.values()) for change in changes)}  # with those slimmed from it


@pytest.mark.parametrize("anchor", ["widest", "zero"])
@pytest.mark.parametrize("divisor", [1, 2, 4])
def test_fine_numbers_are_valid_and_count_up_from_the_narrowest(anchor: Anchor, divisor: int) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 75, 1), nn.Conv2d(75, 24, 1), nn.Conv2d(24, 12, 1, groups=3), nn.Conv2d(12, 2, 1)
    )
    graph = trace(network, torch.empty(1, 3, 4, 4))
    assert max(group.unit for group in graph.groups.values()) > 1
    grid = graph.grid(GridSpec(1.0, 0.25, 5, divisor, anchor))
    numbers = fine_numbers(grid, graph.groups, divisor)
    for name, levels in grid.items():
        assert set(levels) <= set(numbers[name])
        for count in set(numbers[name]) - set(levels):
            assert (count - levels[-1]) % divisor == 0
            assert levels[-1] < count < levels[0]
            graph.check({**graph.default, name: count})
            if anchor == "zero":
                assert count % divisor == 0


def test_ties_of_the_score_are_broken_by_the_other_score() -> None:
    """The error of all configurations is equal; the cross-entropy falls with the channels of b."""

    def evaluate(channels: Channels, changes: Mapping[str, int]) -> dict[str, Outcome]:
        def outcome(configuration: Channels) -> Outcome:
            return Outcome(torch.zeros(IMAGES), NOISE - configuration["b"])

        return {CURRENT: outcome(channels), **{n: outcome({**channels, n: count}) for n, count in changes.items()}}

    changes = list(refine({"a": 2, "b": 2, "c": 2}, GRID, NUMBERS, within(11), evaluate, "error"))
    assert [change.groups for change in changes] == [{"b": 4}, {"b": 6}, {"b": 7}]


def refined(supernet: Supernet, data: PreparedData, folder: Path, **changes: Any) -> dict[str, Any]:
    grid, costs = supernet.graph.grid(SPAN), changes.pop("costs", Costs(supernet.graph))
    settings = search_settings(score="cross_entropy", per_cost=True, incremental=changes.pop("incremental", True))
    return refine_within(
        supernet,
        grid,
        data,
        run_context(),
        channels=grid.narrowest,
        costs=costs,
        limits=changes.pop("limits", None)
        or {"macs": 1.5 * costs.of(grid.narrowest, "macs"), "params": 0.9 * supernet.graph.params()},
        divisor=1,
        settings=settings,
        seed=0,
        checkpoints=Checkpoints(folder, "allocate", "key"),
    )


def test_a_refined_subnet_has_a_lower_loss_within_all_limits(
    supernet: Supernet, data: PreparedData, tmp_path: Path
) -> None:
    result = refined(supernet, data, tmp_path)
    before, after = result["before"], result["after"]
    assert result["changes"]
    assert before["channels"] == supernet.graph.grid(SPAN).narrowest
    assert after["macs"] <= 1.5 * before["macs"]
    assert after["params"] <= 0.9 * supernet.graph.params()
    improvement = sum(change["improvement"] for change in result["changes"])
    assert after["cross_entropy"] == pytest.approx(before["cross_entropy"] - improvement, abs=1e-5)
    assert after["images"] == 96
    whole = refined(supernet, data, tmp_path / "whole", incremental=False)
    assert [change["groups"] for change in whole["changes"]] == [change["groups"] for change in result["changes"]]


class LinearLatency:
    """Costs whose latency is the total number of channels in milliseconds."""

    def __init__(self, costs: Costs) -> None:
        self.exact = costs

    def of(self, channels: Channels, resource: str) -> float:
        return float(sum(channels.values())) if resource == "latency" else self.exact.of(channels, resource)

    def all(self, channels: Channels) -> dict[str, float]:
        return {**self.exact.all(channels), "latency": self.of(channels, "latency")}

    def within(self, channels: Channels, limits: Mapping[str, float]) -> bool:
        return all(self.of(channels, resource) <= limit for resource, limit in limits.items())


def test_with_a_limit_of_latency_groups_have_the_grids_numbers_only(
    supernet: Supernet, data: PreparedData, tmp_path: Path
) -> None:
    costs, grid = LinearLatency(Costs(supernet.graph)), supernet.graph.grid(SPAN)
    limits = {"latency": costs.of(grid.narrowest, "latency") + 13}
    result = refined(supernet, data, tmp_path, costs=costs, limits=limits)
    assert result["changes"]
    assert result["after"]["latency"] <= limits["latency"]
    assert all(count in grid[name] for name, count in result["after"]["channels"].items())


def test_an_interrupted_refinement_gives_the_identical_result(
    supernet: Supernet, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = refined(supernet, data, tmp_path / "whole")
    runners_of, chunks_run = refining.scoring_runners, 0

    def mortal(*arguments: Any) -> Any:
        def counted(run_chunk: ChunkRunner) -> ChunkRunner:
            def run_chunk_or_die(channels: Channels, changes: Mapping[str, int]) -> Any:
                nonlocal chunks_run
                chunks_run += 1
                if chunks_run in (1, 5, 12, 20):
                    raise KilledError
                return run_chunk(channels, changes)

            return run_chunk_or_die

        runners, images = runners_of(*arguments)
        return [counted(run_chunk) for run_chunk in runners], images

    monkeypatch.setattr(refining, "scoring_runners", mortal)
    kills = 0
    for _ in range(20):
        try:
            again = refined(supernet, data, tmp_path / "torn")
            break
        except KilledError:
            kills += 1
            supernet.select(supernet.widest)
    assert kills == 4
    assert again == whole
