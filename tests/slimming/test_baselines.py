"""Channels by other methods, compared with runs of whole subnets, and on a network with known useless channels."""

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from small_data import SPAN, small_network
from specimens import shuffle_weights
from torch import Tensor, nn

from autoslim import Costs, Grid, GridSpec, Supernet, UserError, baseline_channels, resize, sort_channels, trace
from autoslim.search.pruning import sensitivities
from autoslim.slimming.baselines import Baseline
from autoslim.slimming.search import scoring_runners

METHODS = get_args(Baseline)


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    network, graph = small_network()
    wide = resize(network, graph, graph.grid(SPAN).widest)
    shuffle_weights(wide, seed=3)
    return Supernet(wide, graph)


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 10) for _ in range(2)]


def score_of(supernet: Supernet, channels: dict[str, int], batches: Any) -> float:
    """Returns the mean cross-entropy of a subnet with the statistics of each batch, by a run of the whole network."""
    supernet.eval().select(channels)
    with torch.no_grad():
        scores = [F.cross_entropy(supernet(images), labels) for images, labels in batches]
    supernet.select(supernet.widest)
    return float(torch.stack(scores).mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("resource", ["macs", "memory"])
def test_a_baseline_is_within_the_budget_and_on_the_grid(
    supernet: Supernet, batches: Any, method: Baseline, resource: str
) -> None:
    grid, costs = supernet.graph.grid(SPAN), Costs(supernet.graph)
    channels = baseline_channels(supernet, grid, batches, "60%", method, resource=resource, evaluations=8)
    limit = 0.6 * costs.of(supernet.graph.default, resource)
    assert costs.of(channels, resource) <= limit
    for name, levels in grid.items():
        assert levels[-1] <= channels[name] <= levels[0]
        assert (channels[name] - levels[-1]) % grid.multiples[name] == 0
    assert supernet.selected == supernet.widest
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_sensitivities_are_those_of_whole_runs(supernet: Supernet, batches: Any) -> None:
    grid = supernet.graph.grid(SPAN)
    runners, _ = scoring_runners(
        supernet, batches, None, incremental=True, autocast=lambda: torch.autocast("cpu", enabled=False)
    )
    found = sensitivities(runners, grid)
    current = score_of(supernet, grid.widest, batches)
    assert {name: set(by) for name, by in found.items()} == {name: set(levels) for name, levels in grid.items()}
    for name, by_number in found.items():
        for number, increase in by_number.items():
            expected = score_of(supernet, {**grid.widest, name: number}, batches) - current
            assert increase == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["random", "evolution"])
def test_more_evaluations_are_never_worse(supernet: Supernet, batches: Any, method: Baseline) -> None:
    """The configurations of a shorter run are the first of those of a longer one."""
    grid = supernet.graph.grid(SPAN)
    scores = []
    for evaluations in (1, 10, 40):
        channels = baseline_channels(supernet, grid, batches, "50%", method, evaluations=evaluations)
        scores.append(score_of(supernet, channels, batches))
    assert scores[0] >= scores[1] >= scores[2]
    assert scores[0] > scores[2]


@pytest.mark.parametrize("method", ["l1", "bn_scale", "taylor", "sensitivity"])
def test_useless_channels_are_removed_first(method: Baseline) -> None:
    """Half of the first group's channels are constant and not used; the network needs all others."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Tanh()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        for module in (network[0], network[1]):
            module.weight[::2] = 1e-4 * module.weight[::2]
        network[2].weight[:, ::2] = 0
    graph = trace(network, torch.empty(1, 3, 2, 2))
    supernet = Supernet(sort_channels(network, graph, "l1"), graph)
    batches = [(torch.randn(64, 3, 2, 2), torch.arange(64) % 4)]
    grid: Grid = graph.grid(GridSpec(divisor=1, steps=8))
    budget = f"{Costs(graph).of({'0': 4, '2': 8}, 'params'):.0f}"
    channels = baseline_channels(supernet, grid, batches, budget, method, resource="params")
    assert channels == {"0": 4, "2": 8}


def test_bad_arguments_are_refused(supernet: Supernet, batches: Any) -> None:
    grid = supernet.graph.grid(SPAN)
    with pytest.raises(UserError, match="method 'l2' is unknown; expected one of l1, bn_scale"):
        baseline_channels(supernet, grid, batches, "50%", "l2")  # type: ignore[arg-type]
    for method in METHODS:
        with pytest.raises(UserError, match="narrowest configuration exceeds the budget"):
            baseline_channels(supernet, grid, batches, "0.1%", method, evaluations=4)

    def wrong(output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) != targets).float()

    with pytest.raises(UserError, match="needs a loss with a gradient"):
        baseline_channels(supernet, grid, batches, "50%", "taylor", score=wrong)
