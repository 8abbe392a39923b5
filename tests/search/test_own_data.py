"""Compares searches on batches of one's own with those of the pipeline, and resumes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import KilledError
from small_data import SPAN, run_context
from torch import Tensor

from autoslim import (
    Grid,
    SearchProgress,
    Supernet,
    Trajectory,
    UserError,
    refine_channels,
    search_channels,
    uniform_channels,
)
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.resources.costs import Costs, Objective
from autoslim.search.search import SearchSettings, search
from autoslim.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def batches(data: PreparedData) -> list[tuple[Tensor, Tensor]]:
    return search_chunks(data, images=96, chunk=32, seed=0, device=torch.device("cpu"), workers=0)


def run(supernet: Supernet, batches: Any, **changes: Any) -> Trajectory:
    settings: dict[str, Any] = {"stop": 0.4, "progress": lambda _: None, **changes}
    return search_channels(supernet, supernet.graph.grid(SPAN), batches, **settings)


@pytest.mark.parametrize("per_cost", [False, True])
def test_the_trajectory_is_that_of_the_pipeline(
    supernet: Supernet, data: PreparedData, batches: list[Any], tmp_path: Path, per_cost: bool
) -> None:
    settings = SearchSettings(0.4, 96, 32, "cross_entropy", per_cost, 0.05, True, 0.2, "fp32")
    expected = search(
        supernet,
        supernet.graph.grid(SPAN),
        data,
        run_context(),
        objective=Objective(Costs(supernet.graph), "macs"),
        settings=settings,
        seed=0,
        folder=tmp_path,
        checkpoints=Checkpoints(tmp_path / "checkpoints", "search", "key"),
    )["steps"]
    found = run(supernet, batches, per_cost=per_cost)
    assert [point.channels for point in found.points] == [step["channels"] for step in expected]
    assert [point.cost for point in found.points] == [step["macs"] for step in expected]
    assert [point.score for point in found.points] == pytest.approx([step["cross_entropy"] for step in expected])
    assert supernet.selected == supernet.widest
    assert supernet.training
    graph = supernet.graph
    half = found.within("50%")
    assert graph.macs(half) <= 0.5 * graph.macs()
    assert half == next(point.channels for point in found.points if graph.macs(point.channels) <= 0.5 * graph.macs())
    with pytest.raises(UserError, match=r"the search ended at .* MACs, above the budget of 100 MACs; raise the budget"):
        found.within(100)


def test_a_killed_search_continues_from_its_file(supernet: Supernet, batches: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "new" / "search.jsonl"
    whole: list[SearchProgress] = []
    expected = run(supernet, batches, progress=whole.append)
    assert [each.step for each in whole] == list(range(len(expected.points)))
    assert whole[0].seconds_left is None
    assert whole[-1].seconds_left == 0
    assert all(each.seconds_left is not None and each.seconds_left >= 0 for each in whole[1:])

    def kill(progress: SearchProgress) -> None:
        if progress.step == 3:
            raise KilledError

    with pytest.raises(KilledError):
        run(supernet, batches, file=file, progress=kill)
    with file.open("a") as opened:
        opened.write('{"slimmed": [')  # a truncated line
    assert supernet.selected == supernet.widest
    later: list[SearchProgress] = []
    assert run(supernet, batches, file=file, progress=later.append) == expected
    assert [each.step for each in later] == list(range(4, len(expected.points)))
    later.clear()
    assert run(supernet, batches, file=str(file), progress=later.append) == expected
    assert not later
    with pytest.raises(UserError, match=r"belongs to another search, because these differ: stop, risk; give the name"):
        run(supernet, batches, file=file, stop=0.5, risk=None)
    other = tmp_path / "other"
    other.write_text("text\n")
    with pytest.raises(UserError, match="other is not the file of a search; give the name of a new file"):
        run(supernet, batches, file=other)


def test_a_score_of_ones_own_decides(supernet: Supernet, batches: list[Any]) -> None:
    """If wide is good, the score of the narrowest options is the highest; each batch is a pair of any structure."""

    def error(logits: Tensor, labels: dict[str, Tensor]) -> Tensor:
        return (logits.argmax(1) != labels["y"]).float()

    pairs = [[{"x": images}, {"y": labels}] for images, labels in batches]
    found = run(supernet, pairs, score=error, incremental=False, risk=None)
    again = run(supernet, batches, score=lambda logits, labels: (logits.argmax(1) != labels).float(), risk=None)
    assert [point.channels for point in found.points] == [point.channels for point in again.points]
    supernet.select(found.points[2].channels)
    with torch.no_grad():
        wrong = sum(int((supernet.eval()(images).argmax(1) != labels).sum()) for images, labels in batches)
    supernet.train().select(supernet.widest)
    assert found.points[2].score == pytest.approx(wrong / 96)
    assert found.points[2].samples == 96


def test_wrong_batches_and_scores(supernet: Supernet, batches: list[Any]) -> None:
    def once() -> Iterator[Any]:
        yield from ()

    for wrong, message in (
        (once(), "at least one batch"),
        ([batches[0][0]], r"must be a pair \(inputs, targets\), but this one is a Tensor"),
        ([(images[:1], labels[:1]) for images, labels in batches], "one sample each"),
    ):
        with pytest.raises(UserError, match=message):
            run(supernet, wrong)
    for score, message in (
        (lambda logits, _: logits.mean(), r"one number for each of the 32 samples .* shape \(\); do not average"),
        (lambda logits, _: logits, r"shape \(32, 10\)"),
        (lambda logits, _: 0.5, "must return a tensor with a number for each sample, not float"),
        (lambda logits, _: logits[:, 0] * torch.nan, "has a score of nan; score in fp32"),
    ):
        with pytest.raises(UserError, match=message):
            run(supernet, batches, score=score)
    frozen = Grid({name: (count,) for name, count in supernet.widest.items()})
    with pytest.raises(UserError, match="no group of the grid can be slimmed"):
        search_channels(supernet, frozen, batches)


def test_refined_and_uniform_channels(supernet: Supernet, batches: list[Any]) -> None:
    graph = supernet.graph
    grid = graph.grid(SPAN)
    start = grid.narrowest
    budget = {"macs": "60%", "params": "70%"}
    refined = refine_channels(supernet, grid, batches, start, budget)
    uniform = uniform_channels(graph, grid, budget)
    for channels in (refined, uniform):
        assert graph.macs(channels) <= 0.6 * graph.macs()
        assert graph.params(channels) <= 0.7 * graph.params()
        assert all(grid[name][-1] <= count <= grid[name][0] for name, count in channels.items())
    assert graph.macs(refined) > graph.macs(start)
    with pytest.raises(UserError, match=r"channels have .* MACs, more than the budget of .* MACs"):
        refine_channels(supernet, grid, batches, grid.widest, "60%")
