"""Slims a trained network in one call, built on the functions for the single steps."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from autoslim.channels.batches import Batch, device_of, on_device
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid, GridSpec
from autoslim.channels.groups import Channels
from autoslim.channels.resize import resize
from autoslim.channels.sort import Importance, sort_channels
from autoslim.errors import UserError
from autoslim.resources.budgets import Amount, format_named_amount
from autoslim.resources.costs import Costs
from autoslim.resources.latency.table import LatencyTable
from autoslim.slimming.networks import extract_network, save_network
from autoslim.slimming.search import (
    Autocast,
    SampleScore,
    Trajectory,
    budget_limits,
    refine_channels,
    search_channels,
)
from autoslim.supernet.sandwich import Loss, random_subnet, sandwich_step
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.building import task_of
from autoslim.tasks.task import Task
from autoslim.tracing import trace
from autoslim.training.progress import Progress


@dataclass(frozen=True)
class Slimmed:
    """The result of ``slim``.

    Attributes:
        network: a plain network of the same class, with recalibrated batch norms.
        channels: its channels by group.
        costs: its costs by resource, in the resource's own unit.
        default_costs: the costs of the network before slimming.
        graph: the graph of the network before slimming.
        supernet: the trained supernet, from which networks for other budgets can be extracted.
        trajectory: the configurations that the search found.
    """

    network: nn.Module
    channels: Channels
    costs: dict[str, float]
    default_costs: dict[str, float]
    graph: ChannelGraph
    supernet: Supernet
    trajectory: Trajectory

    def save(self, file: str | Path) -> None:
        """Writes the network to a file that ``load_network`` reads."""
        save_network(self.network, self.graph, file)


def slim(
    network: nn.Module,
    example: Any,
    training: Iterable[Batch],
    scoring: Iterable[Batch],
    budget: Amount | Mapping[str, Amount],
    *,
    resource: str = "macs",
    epochs: int = 10,
    optimiser: Callable[[Iterable[nn.Parameter]], optim.Optimizer] | None = None,
    loss: Loss | None = None,
    distillation: Loss | bool = True,
    score: SampleScore | None = None,
    task: Task | str | None = None,
    spec: GridSpec = GridSpec(),  # noqa: B008
    sort: Importance | None = "l1",
    random_subnets: int = 2,
    autocast: Autocast = nullcontext,
    table: LatencyTable | None = None,
    recalibration_batches: int | None = None,
    seed: int = 0,
) -> Slimmed:
    """Slims a trained network to a budget.

    The function traces the network, sorts its channels, trains it as a supernet by the sandwich rule, searches the
    channels for the budget, and returns the network with these channels and the supernet's weights. Train it further
    in your own loop to regain accuracy. ``network`` is not changed.

    Args:
        network: the trained network, on the device that runs everything.
        example: an input of the network, see ``trace``.
        training: pairs (inputs, targets), iterated once in each epoch. See ``sandwich_step`` for their structure.
        scoring: pairs (inputs, targets) for the search, not part of ``training``. See ``search_channels``.
        budget: ``305M``, ``20MB``, ``4.5ms`` or ``50%`` of the network's cost, or a mapping of several resources.
        resource: the resource of the budget: ``macs``, ``params``, ``memory`` or ``latency``.
        epochs: epochs of the supernet's training.
        optimiser: returns the optimiser of the supernet's parameters. By default, SGD with a learning rate of 0.01,
            Nesterov momentum of 0.9 and weight decay of 1e-4. The rate falls to zero by a cosine over the epochs.
        loss: see ``sandwich_step``.
        distillation: see ``sandwich_step``.
        score: see ``search_channels``.
        task: the name of a task (``multilabel``, ``segmentation``, ``regression``) or an object of a class derived from
            ``Task``, in place of ``loss``, ``score`` and functions for ``distillation``.
        spec: the grid of channels, and limits of groups.
        sort: sort the channels by this importance first (see ``sort_channels``); None: keep their order.
        random_subnets: number of random configurations in each training step.
        autocast: returns a context for forward passes.
        table: the latency table, if the budget limits latency.
        recalibration_batches: number of batches of ``training`` for the batch norms; None: all.
        seed: seed of random configurations and of the weights of new channels. The order of the data is up to
            ``training``.

    Raises:
        UserError: the network cannot be traced or slimmed, or an argument is invalid.
    """
    task = task_of(task)
    graph = trace(network, example)
    grid, costs = graph.grid(spec), Costs(graph, table)
    resource = next(iter(budget)) if isinstance(budget, Mapping) and budget else resource
    limits = budget_limits(costs, budget, resource)
    _check_reachable(costs, grid, limits)
    start = network if sort is None else sort_channels(network, graph, sort)
    supernet = Supernet(resize(start, graph, grid.widest, seed=seed), graph).train()
    make = optimiser or (lambda p: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4))
    optimizer = make(supernet.parameters())
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    losses: dict[str, Any] = {"loss": loss, "distillation": distillation, "task": task}
    number = 0
    value = torch.zeros(())
    with Progress("supernet", epochs, "epoch") as progress:
        for _ in range(epochs):
            before = number
            for batch in on_device(training, device_of(supernet)):
                drawn = [random_subnet(grid, seed, number, index) for index in range(random_subnets)]
                subnets = [grid.narrowest, *drawn]
                value = sandwich_step(supernet, batch, subnets, **losses, autocast=autocast)
                optimizer.step()
                optimizer.zero_grad()
                number += 1
            if number == before:
                raise UserError(
                    "training has no batch; it is iterated once in each epoch: pass a data loader, not an iterator"
                )
            schedule.step()
            progress.show(loss=float(value))
            progress.advance()
    scored = list(scoring)
    shared: dict[str, Any] = {"resource": resource, "table": table, "score": score, "task": task, "autocast": autocast}
    stop = min(limit / costs.of(graph.default, name) for name, limit in limits.items()) * (1 - 1e-9)  # for rounding
    several = budget if isinstance(budget, Mapping) and len(budget) > 1 else None
    trajectory = search_channels(supernet, grid, scored, stop=stop, budgets=several, seed=seed, **shared)
    channels = refine_channels(supernet, grid, scored, trajectory.within(budget), budget, **shared)
    slimmed = extract_network(supernet, channels, training, count=recalibration_batches)
    return Slimmed(slimmed, channels, costs.all(channels), costs.all(graph.default), graph, supernet, trajectory)


def _check_reachable(costs: Costs, grid: Grid, limits: Mapping[str, float]) -> None:
    """Raises ``UserError`` if the narrowest configuration exceeds a limit."""
    for name, limit in limits.items():
        if (least := costs.of(grid.narrowest, name)) > limit:
            raise UserError(
                f"the budget of {format_named_amount(limit, name)} is below the narrowest network, which has "
                f"{format_named_amount(least, name)}; raise the budget, or lower spec.narrowest"
            )
