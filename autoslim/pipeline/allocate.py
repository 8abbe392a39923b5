"""Stage ``allocate``: chooses each method's channels within the budget, and writes the weights to retrain from."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels
from autoslim.channels.limits import GroupRange, group_ranges
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.files import write_json
from autoslim.models.pretrained import read_trained
from autoslim.pipeline.artifacts import Allocation, RequestedBudget, Start, write_initial_weights
from autoslim.pipeline.assembly import checkpoints, grid_spec, group_limits, inputs, run_context, traced_network
from autoslim.pipeline.checkpoint_keys import KeyedCheckpoints
from autoslim.pipeline.checks import check_measured_here, check_methods, check_reach, check_score, check_trajectory
from autoslim.pipeline.costs import budget_limits, load_costs
from autoslim.pipeline.params import Params, load_params
from autoslim.pipeline.project import CHANNELS, PREPARED, RESOURCES, SEARCH, SUPERNET, TRAINED, repository_root
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.resources.budgets import format_amount, format_budgets, parse_budget
from autoslim.resources.costs import Costs
from autoslim.search.methods import DEFAULT, ON_SUPERNET, ON_TRAINED, allocate, is_within_budget, need_supernet
from autoslim.search.refinement import fine_numbers, refine_within
from autoslim.search.sampling import sample_within
from autoslim.search.search import SearchSettings, images_evaluated
from autoslim.search.trained import TrainedNetwork
from autoslim.search.trajectory import read_trajectory, step_from_dict
from autoslim.supernet.extract import load_supernet, subnet_extractor
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.building import find_task
from autoslim.tasks.task import Task
from autoslim.training.checkpoints import Checkpoints, check_described
from autoslim.training.device import RunContext, to_device


def run() -> None:
    """Writes each method's channels to a separate file, so that only networks whose channels changed are retrained.

    Raises:
        UserError: a parameter is wrong, an earlier stage has not run, or no network of a method is within the budget.
    """
    recorded = RecordedInputs("allocate")
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    task = find_task(params.task)
    check_score(params, task)
    network, graph = traced_network(params.model, data.info, task)
    costs = load_costs(graph)
    check_measured_here(params, costs.table)
    check_reach(params, graph, costs.table)
    limits, context = budget_limits(params, costs), run_context(params.runtime)
    searched = _searched(params, data, network, graph, context) if need_supernet(params.methods) else None
    uses_weights = params.retrain.start != "scratch" or any(method in ON_TRAINED for method in params.methods)
    trained = read_trained(SUPERNET / TRAINED, network, graph, params.model.weights) if uses_weights else None
    check_methods(params, network, graph, () if trained is None else trained[1])
    stage = _Allocation(params, data, task, network, graph, costs, limits, context, searched, trained)
    state = _checkpoints(params, limits)
    (CHANNELS / "refinement.json").unlink(missing_ok=True)
    with state.lock():
        # Methods that take seconds come first, so that their errors do.
        order = sorted(params.methods, key=lambda method: method in ON_SUPERNET)
        chosen = {method: stage.channels(method, state) for method in order}
        requested = {}
        for method, channels in chosen.items():
            # The budget of the default network and of a released list is its own cost.
            own = {"macs": parse_budget(format_amount(graph.macs(channels)))}
            budgets = params.budgets if is_within_budget(method) else own
            start = stage.start(method)
            initial = write_initial_weights(CHANNELS, method, stage.initial(method, channels, start))
            # Latency is left out: measuring a table again must not cause the same channels to be retrained.
            Allocation(method, channels, Costs(graph).all(channels), start, initial).write(CHANNELS)
            requested[method] = RequestedBudget(format_budgets(budgets), ", ".join(budgets))
        RequestedBudget.write(CHANNELS, requested)
        recorded.check()
        state.finish()


@dataclass(frozen=True)
class _Searched:
    """The supernet on the device, its grid, and the trajectory of the search on it."""

    supernet: Supernet
    grid: Grid
    trajectory: dict[str, Any]


def _searched(
    params: Params, data: PreparedData, network: nn.Module, graph: ChannelGraph, context: RunContext
) -> _Searched:
    path = SEARCH / "trajectory.json"
    trajectory = read_trajectory(path)
    check_trajectory(trajectory, path, params, graph)
    supernet, file = load_supernet(SUPERNET, network, graph, data)
    check_described(SUPERNET / "weights.safetensors", trajectory.get("supernet"), path)
    to_device(supernet, context.device, channels_last=True)
    return _Searched(supernet, file.grid, trajectory)


def _checkpoints(params: Params, limits: Mapping[str, float]) -> KeyedCheckpoints:
    searched = SUPERNET / "weights.safetensors", SUPERNET / "supernet.json", SEARCH / "trajectory.json"
    return checkpoints(
        "allocate",
        *inputs(params.model, PREPARED, params.task),
        *(searched if need_supernet(params.methods) else ()),
        RESOURCES / "latency.json",
        task=params.task,
        search=params.search.model_dump(),
        limits=dict(limits),
        grid=params.supernet.grid.model_dump(),
    )


@dataclass(frozen=True)
class _Allocation:
    """The inputs of the stage, and what its methods make of them.

    Attributes:
        searched: None if no method needs it.
        trained: the default network with ``model.weights``, and its layers with random weights; None without weights.
    """

    params: Params
    data: PreparedData
    task: Task
    network: nn.Module
    graph: ChannelGraph
    costs: Costs
    limits: Mapping[str, float]
    context: RunContext
    searched: _Searched | None
    trained: tuple[nn.Module, list[str]] | None

    def channels(self, method: str, state: Checkpoints) -> Channels:
        """Returns the channels that ``method`` chooses.

        Raises:
            UserError: no network of the method is within the budget.
        """
        if method in ON_TRAINED:
            return self._pruning.channels(method, self._grid, self._numbers, self._fits)
        if method in ("random", "evolution"):
            return self._sampled(method, state)
        steps = [] if self.searched is None else [step["channels"] for step in self.searched.trajectory["steps"]]
        divisor, narrowest = self.params.supernet.grid.divisor, self._grid.narrowest
        configurations = steps if method == "autoslim" else [self._grid.widest]
        channels = allocate(method, self.costs, configurations, self.limits, divisor, narrowest, self._ranges)
        return self._refined(channels, state) if method == "autoslim" and self.params.allocate.refine else channels

    def start(self, method: str) -> Start:
        """Returns what the network of ``method`` starts from (see ``retrain.start``)."""
        start, widest = self.params.retrain.start, None if self.searched is None else self.searched.grid.widest
        if start == "scratch":
            return "scratch"
        if method == DEFAULT:
            if self.trained is not None and not self.trained[1]:
                return "trained"
            covered = widest is not None and all(widest[name] >= size for name, size in self.graph.default.items())
        else:
            covered = widest is not None and method not in ON_TRAINED
        if start == "supernet" and covered:
            return "supernet"
        return "scratch" if self.trained is None else "weights"

    def initial(self, method: str, channels: Channels, start: Start) -> nn.Module | None:
        """Returns the network with the weights that retraining starts from; None if they are random."""
        if start == "scratch":
            return None
        if start == "supernet":
            return self._extract(channels)
        if method == DEFAULT and self.trained is not None:
            return self.trained[0]
        return self._pruning.pruned(method, channels)

    @cached_property
    def _settings(self) -> SearchSettings:
        return SearchSettings(**self.params.search.model_dump())

    @cached_property
    def _grid(self) -> Grid:
        return self.graph.grid(grid_spec(self.params.supernet))

    @cached_property
    def _ranges(self) -> dict[str, GroupRange]:
        return group_ranges(self.graph.groups, group_limits(self.params.supernet.grid))

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """The numbers of channels of each group, in ascending order. A latency table has times for the grid only."""
        divisor = self.params.supernet.grid.divisor
        fine = fine_numbers(self._grid, self.graph.groups, divisor, self._ranges)
        return {name: sorted(self._grid[name]) for name in fine} if "latency" in self.limits else fine

    def _fits(self, channels: Channels) -> bool:
        return self.costs.within(channels, self.limits)

    @cached_property
    def _pruning(self) -> TrainedNetwork:
        if self.trained is None:
            raise UserError(f"{SUPERNET / TRAINED} has no trained network; run `dvc repro supernet`")
        network, data, seed = self.trained[0], self.data, self.params.data.seed
        return TrainedNetwork(network, self.graph, data, self.context, self._settings, seed, self.task)

    @cached_property
    def _extract(self) -> Callable[[Channels], nn.Module]:
        assert self.searched is not None
        return subnet_extractor(self.searched.supernet, self.data, self.context, seed=self.params.data.seed)

    def _sampled(self, method: str, state: Checkpoints) -> Channels:
        """Returns the best of as many networks as the search evaluated, and prints its score."""
        assert self.searched is not None
        trajectory = self.searched.trajectory
        steps = [step_from_dict(step, self.task.loss_name) for step in trajectory["steps"]]
        evaluations = round(images_evaluated(trajectory["images"], steps) / trajectory["images"])
        channels, score = sample_within(
            self.searched.supernet,
            self.data,
            self.context,
            method=method,
            numbers=self._numbers,
            fits=self._fits,
            evaluations=evaluations,
            settings=self._settings,
            seed=self.params.data.seed,
            checkpoints=state,
            task=self.task,
        )
        found = self.task.score.short(self.task.value(score.error))
        print(
            f"allocate: {method}: {evaluations} networks, {self.task.score.title} on search images {found}",
            file=sys.stderr,
        )
        return channels

    def _refined(self, channels: Channels, state: Checkpoints) -> Channels:
        """Refines ``channels``, writes how, and prints the costs and the score before and after."""
        assert self.searched is not None
        refinement = refine_within(
            self.searched.supernet,
            self.searched.grid,
            self.data,
            self.context,
            channels=channels,
            costs=self.costs,
            limits=self.limits,
            divisor=self.params.supernet.grid.divisor,
            settings=self._settings,
            seed=self.params.data.seed,
            checkpoints=state,
            ranges=self._ranges,
            task=self.task,
        )
        write_json(CHANNELS / "refinement.json", refinement)
        before, after = refinement["before"], refinement["after"]
        costs_of = [[format_amount(end[resource], resource) for resource in self.limits] for end in (before, after)]
        amounts = ", ".join(f"{old} -> {new}" for old, new in zip(*costs_of, strict=True))
        scores = " -> ".join(self.task.score.short(self.task.value(end["error"])) for end in (before, after))
        changes = len(refinement["changes"])
        print(
            f"allocate: autoslim: {changes} changes ({amounts}), {self.task.score.title} on search images {scores}",
            file=sys.stderr,
        )
        found: Channels = after["channels"]
        return found
