"""Stage ``allocate``: chooses each method's channels within the budget, and writes the weights to retrain from."""

import sys
from collections.abc import Mapping
from typing import Any

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.channels.limits import GroupRange, group_ranges
from autoslim.channels.resize import resize
from autoslim.data.prepared import PreparedData
from autoslim.files import write_json
from autoslim.pipeline.artifacts import Allocation, RequestedBudget, Start, write_initial_weights
from autoslim.pipeline.assembly import checkpoints, group_limits, inputs, run_context, traced_network
from autoslim.pipeline.checks import check_measured_here, check_reach, check_score, check_trajectory
from autoslim.pipeline.costs import budget_limits, load_costs
from autoslim.pipeline.params import Params, load_params
from autoslim.pipeline.project import CHANNELS, PREPARED, RESOURCES, SEARCH, SUPERNET, TRAINED, repository_root
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.resources.budgets import format_amount, format_budgets, parse_budget
from autoslim.resources.costs import Costs
from autoslim.search.methods import DEFAULT, allocate, is_within_budget
from autoslim.search.refinement import refine_within
from autoslim.search.search import SearchSettings
from autoslim.search.trajectory import read_trajectory
from autoslim.supernet.extract import SupernetFile, load_supernet, subnet_extractor
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.building import find_task
from autoslim.tasks.task import Task
from autoslim.training.checkpoints import Checkpoints, has_weights, load_weights
from autoslim.training.device import to_device


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
    configurations, narrowest = [], None
    if any(is_within_budget(method) for method in params.methods):  # the others need no search
        trajectory = read_trajectory(SEARCH / "trajectory.json")
        check_trajectory(trajectory, SEARCH / "trajectory.json", params, graph)
        configurations = [step["channels"] for step in trajectory["steps"]]
        narrowest = trajectory["narrowest"]["channels"]
    limits = budget_limits(params, costs)
    ranges = group_ranges(graph.groups, group_limits(params.supernet.grid))
    chosen = {
        method: allocate(method, costs, configurations, limits, params.supernet.grid.divisor, narrowest, ranges)
        for method in params.methods
    }
    refines = params.allocate.refine and "autoslim" in chosen
    if refines or params.retrain.start == "supernet":
        supernet, file = load_supernet(SUPERNET, network, graph)
    if refines:
        state = _checkpoints(params, limits)
        refinement = _refined(params, task, supernet, file, data, costs, chosen["autoslim"], limits, ranges, state)
        write_json(CHANNELS / "refinement.json", refinement)
        chosen["autoslim"] = refinement["after"]["channels"]
    else:
        (CHANNELS / "refinement.json").unlink(missing_ok=True)
    starts: dict[str, Start] = dict.fromkeys(chosen, "scratch")
    if params.retrain.start == "supernet":
        extract = subnet_extractor(supernet, data, run_context(params.runtime), seed=params.data.seed)
        starts = dict.fromkeys(chosen, "supernet")
        if DEFAULT in chosen:
            starts[DEFAULT] = _default_start(graph, file)
    requested = {}
    for method, channels in chosen.items():
        # The budget of the default network and of a released list is its own cost.
        own = {"macs": parse_budget(format_amount(graph.macs(channels)))}
        budgets = params.budgets if is_within_budget(method) else own
        # Latency is left out: measuring a table again must not cause the same channels to be retrained.
        Allocation(method, channels, Costs(graph).all(channels), starts[method]).write(CHANNELS)
        initial = extract(channels) if starts[method] == "supernet" else None
        if starts[method] == "trained":
            initial = resize(network, graph, channels, seed=None)
            load_weights(initial, SUPERNET / TRAINED)
        write_initial_weights(CHANNELS, method, initial)
        requested[method] = RequestedBudget(format_budgets(budgets), ", ".join(budgets))
    RequestedBudget.write(CHANNELS, requested)
    recorded.check()
    if refines:
        state.clear()


def _default_start(graph: ChannelGraph, file: SupernetFile) -> Start:
    """Returns what the default network starts from if the others start from the supernet."""
    if has_weights(SUPERNET / TRAINED):
        return "trained"
    covered = all(file.grid.widest[name] >= count for name, count in graph.default.items())
    return "supernet" if covered else "scratch"


def _checkpoints(params: Params, limits: Mapping[str, float]) -> Checkpoints:
    return checkpoints(
        "allocate",
        *inputs(params.model, PREPARED, params.task),
        SUPERNET / "weights.safetensors",
        SUPERNET / "supernet.json",
        SEARCH / "trajectory.json",
        RESOURCES / "latency.json",
        task=params.task,
        search=params.search.model_dump(),
        limits=dict(limits),
        grid=params.supernet.grid.model_dump(),
    )


def _refined(
    params: Params,
    task: Task,
    supernet: Supernet,
    file: SupernetFile,
    data: PreparedData,
    costs: Costs,
    channels: Channels,
    limits: Mapping[str, float],
    ranges: Mapping[str, GroupRange],
    state: Checkpoints,
) -> dict[str, Any]:
    """Refines ``channels``, and prints the costs and the score before and after."""
    context = run_context(params.runtime)
    with state.lock():
        to_device(supernet, context.device, channels_last=True)
        refinement = refine_within(
            supernet,
            file.grid,
            data,
            context,
            channels=channels,
            costs=costs,
            limits=limits,
            divisor=params.supernet.grid.divisor,
            settings=SearchSettings(**params.search.model_dump()),
            seed=params.data.seed,
            checkpoints=state,
            ranges=ranges,
            task=task,
        )
    before, after = refinement["before"], refinement["after"]
    costs_of = [[format_amount(end[resource], resource) for resource in limits] for end in (before, after)]
    amounts = ", ".join(f"{old} -> {new}" for old, new in zip(*costs_of, strict=True))
    scores = " -> ".join(task.score.short(task.value(end["error"])) for end in (before, after))
    changes = len(refinement["changes"])
    print(
        f"allocate: autoslim: {changes} changes ({amounts}), {task.score.title} on search images {scores}",
        file=sys.stderr,
    )
    return refinement
