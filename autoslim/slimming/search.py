"""The search on a supernet with data of one's own: the trajectory, and the channels within a budget."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.channels.batches import Batch, device_of, first_tensor, on_device
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.channels.limits import GroupRange
from autoslim.errors import UserError
from autoslim.files import append_line, parse_json, read_lines
from autoslim.resources.budgets import Amount, format_named_amount, parse_budgets
from autoslim.resources.costs import Costs, Objective
from autoslim.resources.latency.table import LatencyTable
from autoslim.search.greedy import SlimmingStep, greedy_slim
from autoslim.search.methods import allocate, from_trajectory
from autoslim.search.racing import ChunkRunner, chunk_runners, racing_rule
from autoslim.search.refinement import refine
from autoslim.search.scoring import CURRENT, Outcome, concatenated
from autoslim.search.search import part_done
from autoslim.search.trajectory import step_from_dict, step_to_dict
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.building import task_of
from autoslim.tasks.classification import check_logits
from autoslim.tasks.task import Task
from autoslim.training.progress import Progress

FORMAT = 1

SampleScore = Callable[[Any, Any], Tensor]
"""(output of the network, targets) -> a number for each sample, (N,). Lower is better."""

Autocast = Callable[[], AbstractContextManager[object]]
"""Returns a context for forward passes."""


@dataclass(frozen=True)
class SearchProgress:
    """The state of a search after a step.

    Attributes:
        step: number of steps so far.
        channels: the current configuration.
        cost: its cost in the unit of the resource; with several limits, its largest ratio to a limit.
        score: its mean score.
        seconds: seconds since this call started.
        seconds_left: estimate of the seconds that the search still takes; None before the first step.
    """

    step: int
    channels: Channels
    cost: float
    score: float
    seconds: float
    seconds_left: float | None


@dataclass(frozen=True)
class TrajectoryPoint:
    """A configuration on a trajectory, its cost (see ``SearchProgress``), and its mean score over ``samples``."""

    channels: Channels
    cost: float
    score: float
    samples: int


@dataclass(frozen=True)
class Trajectory:
    """The configurations that a search found, from the widest down.

    Attributes:
        points: the configurations.
        costs: computes costs of configurations.
        resource: the resource that the search reduced.
    """

    points: tuple[TrajectoryPoint, ...]
    costs: Costs
    resource: str

    def within(self, budget: Amount | Mapping[str, Amount]) -> Channels:
        """Returns the widest configuration within a budget (see ``budget_limits``).

        Raises:
            UserError: the budget is invalid, or no configuration is within it.
        """
        limits = budget_limits(self.costs, budget, self.resource)
        try:
            return from_trajectory([point.channels for point in self.points], lambda c: self.costs.within(c, limits))
        except UserError as error:
            wanted = ", ".join(format_named_amount(limit, resource) for resource, limit in limits.items())
            end = self.points[-1].channels
            reached = ", ".join(format_named_amount(self.costs.of(end, resource), resource) for resource in limits)
            raise UserError(
                f"the search ended at {reached}, above the budget of {wanted}; raise the budget, or search with a "
                "lower stop or a narrower grid"
            ) from error


def budget_limits(costs: Costs, budget: Amount | Mapping[str, Amount], resource: str = "macs") -> dict[str, float]:
    """Returns resource -> upper bound in its own unit (1 MAC, 1 parameter, 1 byte, 1 ms).

    Args:
        costs: the costs of the network's configurations.
        budget: ``305M``, ``20MB``, ``4.5ms`` or ``50%`` (of the traced network's cost) of ``resource``; or a mapping
            with budgets of several resources.
        resource: ``macs``, ``params``, ``memory`` or ``latency``, which requires a latency table.

    Raises:
        UserError: the budget is invalid, or there is no latency table.
    """
    return costs.limits(parse_budgets(budget, resource))


def search_channels(
    supernet: Supernet,
    grid: Grid,
    batches: Iterable[Batch],
    *,
    resource: str = "macs",
    budgets: Mapping[str, Amount] | None = None,
    table: LatencyTable | None = None,
    stop: float = 0.2,
    score: SampleScore | None = None,
    task: Task | str | None = None,
    step: float = 0.05,
    per_cost: bool = True,
    risk: float | None = 0.2,
    incremental: bool = True,
    autocast: Autocast = nullcontext,
    seed: int = 0,
    file: str | Path | None = None,
    progress: Callable[[SearchProgress], object] | None = None,
) -> Trajectory:
    """Slims a trained supernet greedily from its widest configuration down, and returns the trajectory.

    One search serves every budget of its resource. It is the search of the pipeline: it evaluates only the part of the
    network that a slimmed group changes, drops options in a race as soon as they are clearly worse, and slims several
    groups in each step (see ``greedy_slim`` and ``racing_rule`` in ``autoslim.search``). It runs in one process.

    Args:
        supernet: the trained supernet. Its mode is kept; afterwards the widest configuration is selected. On many
            devices, convolutions are faster after ``supernet.to(memory_format=torch.channels_last)``.
        grid: the numbers of channels of each group, from the grid that the supernet was trained on.
        batches: pairs (inputs, targets) for scoring, which should not be training data. All of them are kept on the
            device of the supernet. The samples of a batch share their batch statistics, so batches should be large (256
            samples) and mix all kinds of samples. A last batch that is smaller than the first is left out.
        resource: the resource that is reduced: ``macs``, ``params``, ``memory`` or ``latency``.
        budgets: budgets of several resources, which the search then reduces together until all are met.
        table: the latency table, if latency is limited.
        stop: the search ends at this fraction of the traced network's cost, or at the narrowest configuration.
        score: the score of each sample. By default, it is the cross-entropy, averaged over positions if there are any.
        task: a task, or its name such as ``regression``, whose loss of each sample takes the place of ``score``.
        step: share of the cost that each step removes, and twice as much above the traced network's cost; 0: each step
            slims one group.
        per_cost: rank by the increase of the score per unit of cost saved.
        risk: significance level of each comparison in the race; None: every option is run on all batches.
        incremental: run only the part of the network that an option changes, if the network's code allows it.
        autocast: returns a context for forward passes.
        seed: decides with which batch each race starts.
        file: a file to which each step is appended as a line of JSON. If it exists, the search continues from it; if it
            is complete, it is only read.
        progress: called after each step. By default, a progress bar or, outside a terminal, a line every 30 seconds is
            printed to stderr.

    Raises:
        UserError: a batch or a score is invalid, no group can be slimmed, or ``file`` belongs to another search.
    """
    costs = Costs(supernet.graph, table)
    objective = Objective(costs, resource, budget_limits(costs, budgets, resource) if budgets else {})
    cost, default = objective.cost, supernet.graph.default
    if not grid.steps:
        raise UserError("no group of the grid can be slimmed; see graph.not_prunable, or lower narrowest")
    runners, samples = scoring_runners(
        supernet, batches, score_of_task(score, task), incremental=incremental, autocast=autocast
    )
    end = objective.stop(stop, default)
    steps: list[SlimmingStep] = []
    if file is not None:
        path = Path(file)
        settings = {
            "resource": resource,
            "limits": dict(objective.limits),
            "stop": stop,
            "step": step,
            "per_cost": per_cost,
            "risk": risk,
            "seed": seed,
            "samples": samples,
            "grid": {name: list(numbers) for name, numbers in grid.items()},
            "costs": [cost(channels) for channels in (grid.widest, default, grid.narrowest)],
            "weights": weights_digest(supernet),
        }
        steps = [step_from_dict(line) for line in _recorded(path, settings)]
    first, started = len(steps), time.monotonic()
    bar = Progress("search", max(1, len(steps)), done=max(0, len(steps) - 1)) if progress is None else None
    rule = racing_rule(runners, samples, "error", per_cost, risk, seed)
    above = cost(default)
    try:
        for found in greedy_slim(grid, cost, rule, end, per_cost=per_cost, step=step, coarse_above=above, done=steps):
            steps.append(found)
            if file is not None:
                append_line(path, step_to_dict(found, costs))
            seconds = time.monotonic() - started
            part, before = (_part(steps[0].cost, each.cost, end, step) for each in (found, steps[max(0, first - 1)]))
            left = seconds * (1 - part) / (part - before) if part > before else None
            if progress is not None:
                progress(SearchProgress(len(steps) - 1, found.channels, found.cost, found.score.error, seconds, left))
            if bar is not None and found.slimmed:
                bar.expect(math.ceil((len(steps) - 1) / part) if part else len(steps))
                bar.advance()
                amounts = f"{objective.written(found.cost)}, down to {objective.written(end)}"
                bar.show(score=found.score.error, cost=amounts)
        if bar is not None:
            bar.expect(len(steps) - 1)
    finally:
        supernet.select(supernet.widest)
        if bar is not None:
            bar.__exit__()
    points = (TrajectoryPoint(s.channels, s.cost, s.score.error, s.score.images) for s in steps)
    return Trajectory(tuple(points), costs, resource)


def refine_channels(
    supernet: Supernet,
    grid: Grid,
    batches: Iterable[Batch],
    channels: Channels,
    budget: Amount | Mapping[str, Amount],
    *,
    resource: str = "macs",
    table: LatencyTable | None = None,
    score: SampleScore | None = None,
    task: Task | str | None = None,
    incremental: bool = True,
    autocast: Autocast = nullcontext,
) -> Channels:
    """Returns a configuration that uses what ``channels`` leave of the budget, with channels exchanged between groups.

    Each change improves the mean score on ``batches`` (see ``refine`` in ``autoslim.search.refinement``).

    Args:
        channels: a configuration within the budget, such as ``trajectory.within(budget)``.
        budget: see ``budget_limits``.

    The other arguments are those of ``search_channels``.

    Raises:
        UserError: ``channels`` exceed the budget, or a batch or a score is invalid.
    """
    costs = Costs(supernet.graph, table)
    limits = budget_limits(costs, budget, resource)
    for name, limit in limits.items():
        if (amount := costs.of(channels, name)) > limit:
            raise UserError(
                f"channels have {format_named_amount(amount, name)}, more than the budget of "
                f"{format_named_amount(limit, name)}; pass a configuration within the budget"
            )
    runners, _ = scoring_runners(
        supernet, batches, score_of_task(score, task), incremental=incremental, autocast=autocast
    )
    levels = fine_levels(grid, limits)

    def evaluate(chosen: Channels, changes: Mapping[str, int]) -> dict[str, Outcome]:
        outcomes = [run(chosen, changes) for run in runners]
        return {name: concatenated([outcome[name] for outcome in outcomes]) for name in (*changes, CURRENT)}

    try:
        for change in refine(channels, grid, levels, lambda c: costs.within(c, limits), evaluate, "error"):
            channels = change.channels
    finally:
        supernet.select(supernet.widest)
    return channels


def fine_levels(grid: Grid, limits: Collection[str]) -> dict[str, list[int]]:
    """Returns the numbers of channels of each group between the narrowest and the widest, in ascending order.

    They are those of the grid and, unless latency is limited, the multiples of ``grid.multiples`` between them: a
    latency table has no times there.
    """
    if "latency" in limits:
        return {name: sorted(numbers) for name, numbers in grid.items()}
    return {name: sorted({*n, *range(n[-1], n[0], grid.multiples[name])}) for name, n in grid.items()}


def uniform_channels(
    graph: ChannelGraph,
    grid: Grid,
    budget: Amount | Mapping[str, Amount],
    *,
    resource: str = "macs",
    table: LatencyTable | None = None,
) -> Channels:
    """Returns the configuration of the largest width multiplier within a budget: the baseline of a search.

    Numbers of channels are multiples of ``grid.multiples``, between the narrowest and the widest of the grid.

    Args:
        budget: see ``budget_limits``.

    Raises:
        UserError: the budget is invalid, or no width multiplier is within it.
    """
    costs = Costs(graph, table)
    limits = budget_limits(costs, budget, resource)
    ranges = {
        name: GroupRange(name, numbers[-1], numbers[0], grid.multiples[name] if len(numbers) > 1 else numbers[0])
        for name, numbers in grid.items()
    }
    return allocate("uniform", costs, [grid.widest], limits, 1, grid.narrowest, ranges)


def cross_entropy_by_sample(output: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of each sample in nats: logits (N, classes, ...) and targets (N, ...) -> (N,).

    Raises:
        UserError: the output and the targets have another form.
    """
    check_logits(output, targets, "score")
    losses = F.cross_entropy(output.float(), targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def score_of_task(score: SampleScore | None, task: Task | str | None) -> SampleScore | None:
    """Returns the score of samples: the task's loss, or ``score`` without a task."""
    named = task_of(task)
    if named is None:
        return score
    return lambda output, targets: named.sample_scores(output, targets)[1]


def scoring_runners(
    supernet: Supernet,
    batches: Iterable[Batch],
    score: SampleScore | None,
    *,
    incremental: bool,
    autocast: Autocast,
) -> tuple[list[ChunkRunner], int]:
    """Returns a runner for each batch, and the number of samples.

    Raises:
        UserError: there is no batch, or one is invalid.
    """
    chunks = list(on_device(batches, device_of(supernet)))
    if not chunks:
        raise UserError("scoring needs at least one batch (inputs, targets), but batches is empty")
    sizes = [len(first_tensor(inputs)) for inputs, _ in chunks]
    if len(chunks) > 1 and sizes[-1] < sizes[0]:
        del chunks[-1], sizes[-1]
    if sizes[0] < 2:
        raise UserError("the batches for scoring have one sample each, but samples share batch statistics; use more")

    def scores(output: Any, targets: Any) -> Tensor:
        values = (score or cross_entropy_by_sample)(output, targets)
        if not isinstance(values, Tensor):
            raise UserError(f"score must return a tensor with a number for each sample, not {type(values).__name__}")
        return values.float().expand(2, *values.shape)  # the second score breaks ties

    def check(mean: float, subnet: str) -> None:
        if not math.isfinite(mean):
            raise UserError(f"{subnet} has a score of {mean}; score in fp32, or train with a lower learning rate")

    runners = chunk_runners(
        supernet, chunks, autocast, incremental=incremental, report=_print, scores=scores, check=check
    )
    return runners, sum(sizes)


def _part(first: float, current: float, last: float, step: float) -> float:
    """Returns the part of a search from the cost ``first`` to ``last`` that is done, in [0, 1]."""
    if first <= last:
        return 1.0
    return min(1.0, part_done(first, current, last, shares=step > 0 and last > 0)) if current < first else 0.0


def _print(message: str) -> None:
    print(message, file=sys.stderr)


def weights_digest(supernet: Supernet) -> str:
    digest = hashlib.sha256()
    for tensor in supernet.network.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _recorded(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the steps in the file of a search, and writes its first line if it is new.

    Raises:
        UserError: the file belongs to another search, or is not one of a search.
    """
    if path.exists() and not _is_log(path):
        raise UserError(f"{path} is not the file of a search; give the name of a new file")
    lines = read_lines(path)
    settings = json.loads(json.dumps({"format": FORMAT, **settings}))
    if not lines:
        append_line(path, settings)
        return []
    known = lines[0]
    if different := [name for name, value in settings.items() if known.get(name) != value]:
        raise UserError(
            f"{path} belongs to another search, because these differ: {', '.join(different)}; give the name of a new "
            "file, or remove it"
        )
    return lines[1:]


def _is_log(path: Path) -> bool:
    """Returns whether the file is empty or begins like a log. Others must not be repaired by ``read_lines``."""
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        return first == "" or "format" in parse_json(first)
    except (ValueError, TypeError, OSError):
        return False
