"""Tests the files that a search of a real supernet writes, and that a resumed search is identical."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from failures import KilledError
from small_data import SPAN, run_context, search_settings
from specimens import batch_statistics

from autoslim import Supernet
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.resources.costs import Costs, Objective
from autoslim.search import search as searching
from autoslim.search.greedy import SlimmingStep
from autoslim.search.racing import ChunkRunner
from autoslim.search.scoring import chosen_by_noise
from autoslim.search.search import search, unevenly_trained
from autoslim.search.trajectory import read_trajectory
from autoslim.tasks.classification import chance_top1, is_chance
from autoslim.tasks.task import Score
from autoslim.training.checkpoints import Checkpoints


def run(supernet: Supernet, data: PreparedData, folder: Path, key: str = "key", **changes: Any) -> dict[str, Any]:
    objective = Objective(Costs(supernet.graph), changes.pop("resource", "macs"), changes.pop("limits", {}))
    return search(
        supernet,
        supernet.graph.grid(SPAN),
        data,
        run_context(),
        objective=objective,
        settings=search_settings(**changes),
        seed=0,
        folder=folder,
        checkpoints=Checkpoints(folder / "checkpoints", "search", key),
    )


def test_contents_of_the_trajectory(supernet: Supernet, data: PreparedData, tmp_path: Path) -> None:
    """Costs are the graph's. Scores are those of extracted networks with the batch statistics of each chunk."""
    trajectory = run(supernet, data, tmp_path)
    graph, levels = supernet.graph, supernet.graph.grid(SPAN)
    assert trajectory == read_trajectory(tmp_path / "trajectory.json")
    assert [step["step"] for step in trajectory["steps"]] == list(range(len(trajectory["steps"])))
    assert {trajectory[name] for name in ("resource", "score", "images", "chunk")} == {"macs", "error", 96, 32}
    assert trajectory["default"]["channels"] == graph.default
    for which, level in (("widest", 0), ("narrowest", -1)):
        channels = {name: options[level] for name, options in levels.items()}
        assert trajectory[which] == {
            "channels": channels,
            "macs": graph.macs(channels),
            "params": graph.params(channels),
            "memory": graph.memory(channels),
        }
    assert trajectory["steps"][0]["channels"] == trajectory["widest"]["channels"]
    assert trajectory["steps"][-1]["macs"] <= 0.4 * graph.macs() < trajectory["steps"][-2]["macs"]
    chunks = search_chunks(
        data, images=96, chunk=32, seed=0, device=run_context().device, workers=run_context().workers
    )
    for step in trajectory["steps"][:: len(trajectory["steps"]) // 3]:
        cut = batch_statistics(supernet.extract(step["channels"]))
        with torch.no_grad():
            logits = [(cut(images), labels) for images, labels in chunks]
        wrong = sum(int((output.argmax(1) != labels).sum()) for output, labels in logits)
        entropy = sum(float(F.cross_entropy(output, labels, reduction="sum")) for output, labels in logits)
        assert step["error"] == wrong / 96
        assert step["cross_entropy"] == pytest.approx(entropy / 96, rel=1e-6)
        assert step["cost"] == step["macs"] == graph.macs(step["channels"])
        assert step["params"] == graph.params(step["channels"])
        assert sum(parameter.numel() for parameter in cut.parameters()) == step["params"]
        assert all(option["cost"] == step["cost"] - option["saved"] for option in step["options"].values())


def test_metrics_count_what_was_evaluated(supernet: Supernet, data: PreparedData, tmp_path: Path) -> None:
    trajectory = run(supernet, data, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    evaluated = 1 + sum(1 + len(step["options"]) for step in trajectory["steps"])  # the first is the narrowest
    assert metrics["steps"] == len(trajectory["steps"]) - 1
    assert metrics["evaluations"] == evaluated
    assert metrics["images_evaluated"] == 96 * evaluated


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score": "cross_entropy"},
        {"per_cost": True},
        {"score": "cross_entropy", "risk": 0.1},
        {"score": "cross_entropy", "per_cost": True, "step": 0.2, "risk": 0.1},
    ],
)
def test_incremental_evaluation_finds_the_trajectory_of_whole_runs(
    supernet: Supernet, data: PreparedData, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Choices are the same; scores differ only by the rounding of convolutions at other widths."""
    short = run(supernet, data, tmp_path / "short", **changes)
    whole = run(supernet, data, tmp_path / "whole", incremental=False, **changes)
    assert [step["channels"] for step in short["steps"]] == [step["channels"] for step in whole["steps"]]
    for one, other in zip(short["steps"], whole["steps"], strict=True):
        assert one["options"].keys() == other["options"].keys()
        for name, option in one["options"].items():
            assert option["error"] == other["options"][name]["error"]
            assert option["cross_entropy"] == pytest.approx(other["options"][name]["cross_entropy"], rel=1e-5)


def test_a_race_evaluates_fewer_images_and_scores_each_step_on_all(
    supernet: Supernet, data: PreparedData, tmp_path: Path
) -> None:
    trajectory = run(supernet, data, tmp_path, score="cross_entropy", risk=0.1)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert trajectory["risk"] == 0.1
    assert {step["images"] for step in trajectory["steps"]} == {96}
    seen = [option["images"] for step in trajectory["steps"] for option in step["options"].values()]
    assert set(seen) == {32, 64, 96}
    assert metrics["images_evaluated"] == 96 * (1 + len(trajectory["steps"])) + sum(seen)


@pytest.mark.parametrize(
    "changes",
    [{}, {"score": "cross_entropy"}, {"per_cost": True, "risk": 0.1}, {"resource": "memory", "step": 0.02}],
)
def test_a_resumed_search_gives_the_identical_trajectory(
    supernet: Supernet, data: PreparedData, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(supernet, data, tmp_path / "whole", **changes)
    runners_of, chunks_run = searching.chunk_runners, 0

    def mortal(*arguments: Any, **options: Any) -> Any:
        def counted(run_chunk: ChunkRunner) -> ChunkRunner:
            def run_chunk_or_die(*arguments: Any) -> Any:
                nonlocal chunks_run
                chunks_run += 1
                if chunks_run in (1, 9, 17, 30):  # before the first step, then in the middle of choosing one
                    raise KilledError
                return run_chunk(*arguments)

            return run_chunk_or_die

        return [counted(run_chunk) for run_chunk in runners_of(*arguments, **options)]

    monkeypatch.setattr(searching, "chunk_runners", mortal)
    kills = 0
    for _ in range(20):
        try:
            again = run(supernet, data, tmp_path / "torn", **changes)
            break
        except KilledError:
            kills += 1
            assert not (tmp_path / "torn/trajectory.json").exists()
            supernet.select(supernet.widest)
    assert kills == 4
    assert again == whole
    assert (tmp_path / "torn/trajectory.json").read_bytes() == (tmp_path / "whole/trajectory.json").read_bytes()
    assert chunks_run <= 3 * len(whole["steps"]) + 4 * 3  # chunks of earlier steps are not run again


def test_an_incomplete_step_is_searched_again(supernet: Supernet, data: PreparedData, tmp_path: Path) -> None:
    whole = run(supernet, data, tmp_path / "whole")
    written = tmp_path / "whole/checkpoints/search-key/steps.jsonl"
    lines = written.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole["steps"])
    torn = tmp_path / "torn/checkpoints/search-key/steps.jsonl"
    torn.parent.mkdir(parents=True)
    torn.write_text("".join(lines[:3]) + lines[3][:40])
    assert run(supernet, data, tmp_path / "torn") == whole
    again = [json.loads(line) for line in torn.read_text().splitlines()]
    assert [step["channels"] for step in again] == [step["channels"] for step in whole["steps"]]


@pytest.mark.parametrize("line", [0, 3])
def test_a_search_whose_log_lacks_a_line_gives_the_identical_trajectory(
    line: int, supernet: Supernet, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(supernet, data, tmp_path)
    log = tmp_path / "checkpoints/search-key/steps.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:line] + lines[line + 1 :]))
    assert run(supernet, data, tmp_path) == whole
    assert f"{log} is damaged or incomplete at line {line + 1} of {len(lines) - 1}; " in capsys.readouterr().err


def test_another_search_does_not_continue_from_this_one(supernet: Supernet, data: PreparedData, tmp_path: Path) -> None:
    run(supernet, data, tmp_path, key="one", stop=0.9)
    steps = tmp_path / "checkpoints/search-one/steps.jsonl"
    assert steps.exists()
    fresh = run(supernet, data, tmp_path, key="two", score="cross_entropy")
    assert fresh == run(supernet, data, tmp_path / "other", score="cross_entropy")


def test_one_search_covers_every_budget(supernet: Supernet, data: PreparedData, tmp_path: Path) -> None:
    """A search that stops later contains the steps of one that stops earlier."""
    long = run(supernet, data, tmp_path / "long", stop=0.4)["steps"]
    short = run(supernet, data, tmp_path / "short", stop=0.9)["steps"]
    assert long[: len(short) - 1] == short[:-1]
    assert long[len(short) - 1]["channels"] == short[-1]["channels"]
    assert len(long) > len(short)


def test_a_stop_below_the_narrowest_ends_there_with_a_message(
    supernet: Supernet, data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trajectory = run(supernet, data, tmp_path, stop=0.001)
    assert trajectory["steps"][-1]["channels"] == trajectory["narrowest"]["channels"]
    assert "search: the cost of the narrowest subnet is" in capsys.readouterr().err


def test_a_supernet_whose_narrowest_subnet_is_better_than_wider_ones_is_reported() -> None:
    def step(cost: float, error: float) -> SlimmingStep:
        return SlimmingStep((), {}, cost, Score(error, 1.0, 1000))

    steps = [step(100, 0.1), step(50, 0.2), step(20, 0.3), step(5, 0.9)]  # the last one costs less
    assert unevenly_trained(steps, 10, Score(0.28, 1.0, 1000)) == ""  # within two standard errors: 0.041
    assert unevenly_trained(steps, 10, Score(0.25, 1.0, 1000)) == (
        "search: step 2 has a top-1 of 70.0%, but the narrowest subnet, which costs less, has 75.0%; the supernet is "
        "trained unevenly, and networks that are found in it may be worse than uniform ones: train it longer, or set "
        "supernet.random_widths_per to both"
    )
    assert unevenly_trained([], 10, Score(0.25, 1.0, 1000)) == ""


def test_the_narrowest_subnet_is_scored_too(supernet: Supernet, data: PreparedData, tmp_path: Path) -> None:
    trajectory = run(supernet, data, tmp_path, stop=0.001)
    last = trajectory["steps"][-1]
    assert trajectory["narrowest"]["channels"] == last["channels"]
    assert trajectory["narrowest_score"] == {name: last[name] for name in ("error", "cross_entropy", "images")}


def test_fewer_images_than_a_chunk_are_one_chunk(supernet: Supernet, data: PreparedData, tmp_path: Path) -> None:
    whole = run(supernet, data, tmp_path, chunk=96)
    assert run(supernet, data, tmp_path / "larger", chunk=97, images=500) == whole
    with pytest.raises(UserError, match="there is 1 image to score, but batch statistics need at least 2"):
        run(supernet, data, tmp_path / "one", images=1)


def test_a_guess_passes_for_a_better_network_once_in_a_hundred_times() -> None:
    """Compared with the binomial distribution, summed in integers."""
    for images, classes in ((40, 4), (300, 10)):
        ways = [math.comb(images, right) * (classes - 1) ** (images - right) for right in range(images + 1)]
        for right in range(images + 1):
            as_good = sum(ways[right:]) / classes**images
            assert is_chance(Score(1 - right / images, 1.0, images), 1 / classes) == (as_good > 0.01)
    assert chance_top1(np.array([0, 1, 1, 2])) == 0.5


def test_a_search_among_guesses_is_reported() -> None:
    steps = [Score(0.2, 1.0, 100), Score(0.72, 1.0, 100), Score(0.75, 1.0, 100)]
    assert chosen_by_noise(steps, 0.25).startswith(
        "2 of the 3 configurations on the search's path have a top-1 that is not above chance, which is 25.0% (the "
        "best of them has 28.0%)"
    )
    assert chosen_by_noise(steps[:1], 0.25) == ""


def test_several_limits_are_searched_until_all_are_satisfied(
    supernet: Supernet, data: PreparedData, tmp_path: Path
) -> None:
    """The cost is the largest share of a limit, and the search continues until it is at most 1."""
    graph = supernet.graph
    limits = {"macs": 0.8 * graph.macs(), "params": 0.5 * graph.params()}
    trajectory = run(supernet, data, tmp_path, limits=limits, stop=0.9, per_cost=True)
    assert trajectory["limits"] == limits
    steps = trajectory["steps"]
    for step in steps:
        assert step["cost"] == max(step[resource] / limit for resource, limit in limits.items())
        assert step["memory"] == graph.memory(step["channels"])
    assert steps[-1]["cost"] <= 1 < steps[-2]["cost"]
    assert steps[-1]["params"] <= limits["params"]
