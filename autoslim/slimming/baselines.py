"""Channels that other methods choose within a budget, on the same groups, to compare a search with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Literal, get_args

from torch import Tensor, nn

from autoslim.channels.batches import Batch, call, device_of, on_device
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.channels.sort import channel_importance, taylor_importance
from autoslim.errors import UserError
from autoslim.resources.budgets import Amount
from autoslim.resources.costs import Costs
from autoslim.resources.latency.table import LatencyTable
from autoslim.search.pruning import least_sensitive, most_important, sensitivities
from autoslim.search.sampling import Scored, evolution, random_search
from autoslim.search.scoring import CURRENT, mean_score
from autoslim.slimming.networks import extract_network
from autoslim.slimming.search import (
    Autocast,
    SampleScore,
    budget_limits,
    cross_entropy_by_sample,
    fine_levels,
    score_of_task,
    scoring_runners,
)
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.task import Task

Baseline = Literal["l1", "bn_scale", "taylor", "sensitivity", "random", "evolution"]


def baseline_channels(
    supernet: Supernet,
    grid: Grid,
    batches: Iterable[Batch],
    budget: Amount | Mapping[str, Amount],
    method: Baseline,
    *,
    resource: str = "macs",
    table: LatencyTable | None = None,
    score: SampleScore | None = None,
    task: Task | str | None = None,
    evaluations: int = 200,
    incremental: bool = True,
    autocast: Autocast = nullcontext,
    seed: int = 0,
) -> Channels:
    """Returns the configuration that another method chooses within a budget, with numbers of channels of ``grid``.

    * ``l1`` and ``bn_scale`` keep the channels with the largest weights or batch norm scales, over all groups together
      (see ``most_important``); ``taylor`` those whose first-order importance is largest. They use the weights only;
      ``taylor`` also their gradients on ``batches``.
    * ``sensitivity`` slims single groups, and combines them so that the largest increase of the score is as small as
      possible (see ``least_sensitive``).
    * ``random`` takes the best of ``evaluations`` random configurations, and ``evolution`` lets them evolve.

    The first four need no trained supernet: pass ``Supernet(sort_channels(network, graph, "l1"), graph)`` of a trained
    network.

    Args:
        budget: see ``budget_limits``.
        method: see above.
        evaluations: number of configurations that ``random`` and ``evolution`` score. A greedy search scores the sum of
            ``len(grid)`` over its steps, in part on some of the batches only.
        seed: seed of ``random`` and ``evolution``.

    The other arguments, such as ``task``, are those of ``search_channels``.

    Raises:
        UserError: the method is unknown, the budget is below the narrowest configuration, or a batch or a score is
            invalid.
    """
    if method not in get_args(Baseline):
        raise UserError(f"method {method!r} is unknown; expected one of {', '.join(get_args(Baseline))}")
    score = score_of_task(score, task)
    graph, costs = supernet.graph, Costs(supernet.graph, table)
    limits = budget_limits(costs, budget, resource)
    numbers = fine_levels(grid, limits)

    def fits(channels: Channels) -> bool:
        return costs.within(channels, limits)

    if method in ("l1", "bn_scale", "taylor"):
        if method == "taylor":
            batches = list(batches)
            plain = extract_network(supernet, supernet.widest, batches)
            importance = taylor_importance(plain, graph, on_device(batches, device_of(plain)), _mean_of(score))
        else:
            importance = channel_importance(supernet.extract(supernet.widest), graph, method)
        return most_important(importance, graph.groups, numbers, fits)
    runners, _ = scoring_runners(supernet, batches, score, incremental=incremental, autocast=autocast)
    try:
        if method == "sensitivity":
            return least_sensitive(sensitivities(runners, grid, "error"), fits)

        def mean_of(channels: Channels) -> float:
            return mean_score([run(channels, {})[CURRENT] for run in runners]).error

        search = random_search if method == "random" else evolution
        found: Iterator[Scored] = search(numbers, fits, mean_of, evaluations, seed)
        return min(found, key=lambda each: each.score).channels
    finally:
        supernet.select(supernet.widest)


def _mean_of(score: SampleScore | None) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(network: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return (score or cross_entropy_by_sample)(call(network, inputs), targets).mean()

    return loss
