"""Stage ``report``: compares the networks of all methods on the test split."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import rich
from rich.markup import escape

from autoslim.channels.resize import resize
from autoslim.data.prepared import PreparedData
from autoslim.files import write_bytes, write_json
from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.assembly import inputs_of, recipe, run_context, traced_network
from autoslim.pipeline.costs import budget_limits, load_costs, report_target
from autoslim.pipeline.params import Params, load_params
from autoslim.pipeline.project import (
    CHANNELS,
    PREPARED,
    REPORT,
    RETRAIN,
    SEARCH,
    SUPERNET,
    check_trajectory_format,
    repository_root,
)
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.pipeline.tracking import lineage, numbers, tracked_stage
from autoslim.report.figures import (
    Columns,
    channels_figure,
    curves_figure,
    last_by_seed,
    read_curves,
    trajectory_figure,
)
from autoslim.report.resource_figures import resources_figure
from autoslim.report.table import Result, compare, csv_table, describe_budgets, markdown_table, metrics, terminal_table
from autoslim.resources.budgets import format_budgets
from autoslim.resources.costs import Costs
from autoslim.resources.measure import measure_network
from autoslim.search.methods import DEFAULT, need_supernet
from autoslim.search.scoring import chosen_by_noise
from autoslim.search.trajectory import read_trajectory, step_from_dict
from autoslim.tasks.building import find_task
from autoslim.tasks.classification import is_chance
from autoslim.tasks.measure import scores_entry
from autoslim.tasks.task import Score, Task
from autoslim.training.retrain import evaluate_retrained


def run() -> None:
    """Compares the methods on the test split, which no earlier stage has used.

    Raises:
        UserError: a parameter is wrong, or an earlier stage has not run.
    """
    recorded = RecordedInputs("report")
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    task = find_task(params.task)
    network, graph = traced_network(params.model, data.info, task)
    context = run_context(params.runtime)
    costs = load_costs(graph)
    trajectory, supernet = _searched(params, costs, task)
    allocations = {method: Allocation.read(CHANNELS, method) for method in params.methods}
    target = report_target(params.latency, costs.table)
    curves = {method: read_curves(RETRAIN / method / "curves.csv") for method in params.methods}
    measures = task.measures(data.info)
    results = []
    network_inputs = inputs_of(network, data.info)
    for method, allocation in allocations.items():
        channels, kept = allocation.channels, allocation.start == "trained"
        found = evaluate_retrained(
            network,
            graph,
            channels,
            data,
            recipe(params.retrain),
            context,
            seeds=params.retrain.seeds[:1] if kept else params.retrain.seeds,
            folder=RETRAIN / method / "weights",
            task=task,
        )
        values = {m.name: {seed: each[m.name] for seed, each in found.items()} for m in measures}
        top1 = values.pop(measures[0].name)
        measured = measure_network(resize(network, graph, channels, seed=None), network_inputs, target)
        search_top1 = last_by_seed(curves[method], f"search_{measures[0].name}")
        results.append(Result(method, costs.all(channels), top1, measured, search_top1, allocation.start, values))
    limits = budget_limits(params, costs)
    other_target = "" if costs.table is None or costs.table.target == target else str(costs.table.target)
    comparison = compare(
        results,
        budgets=params.budgets,
        resource=params.resource,
        limits=limits,
        predicted_on=other_target,
        from_supernet=bool(trajectory["steps"]) and params.retrain.start == "supernet",
        warning=_warning(trajectory, results, curves, data, task),
        measures=tuple(measures),
    )
    dpi, resource = params.report.figure_dpi, params.resource
    REPORT.mkdir(parents=True, exist_ok=True)
    marked = {describe_budgets({resource: params.budgets[resource]}, limits): limits[resource]}
    trajectory_figure(REPORT / "trajectory.png", trajectory, results, resource, marked, dpi)
    configurations = {method: each.channels for method, each in allocations.items() if method != DEFAULT}
    channels_figure(REPORT / "channels.png", graph.default, configurations, dpi)
    resources_figure(REPORT / "resources.png", results, costs.table, target, dpi)
    curves_figure(REPORT / "curves.png", supernet, curves, dpi, task.score)
    write_bytes(REPORT / "comparison.csv", csv_table(comparison).encode())
    write_bytes(REPORT / "table.md", markdown_table(comparison).encode())
    figures = metrics(comparison)
    write_json(REPORT / "metrics.json", figures)
    recorded.check()
    budget = format_budgets(params.budgets)
    with tracked_stage(
        params,
        "report",
        run_name=f"report {budget}",
        details={"budget": budget, "resource": resource, "methods": params.methods},
        tags={"budget": budget, "resource": resource, **lineage(SUPERNET / "weights.safetensors")},
    ) as tracker:
        tracker.metrics(numbers(figures))
        tracker.artifact(REPORT)
    if comparison.warning:
        rich.print(f"[bold]Warning:[/bold] {escape(comparison.warning)}\n")
    rich.print(terminal_table(comparison))
    print(f"Figures: {REPORT}/trajectory.png, channels.png, resources.png, curves.png.")
    print("Runs: mlflow ui, or dvc exp show.")
    if choice := comparison.choice:
        print("Best network on the search split: autoslim export {} --seed {} --to network.pt2".format(*choice))


def _searched(params: Params, costs: Costs, task: Task) -> tuple[dict[str, Any], Columns]:
    """Returns the trajectory and the curves of the supernet. They are empty if no method needs a supernet."""
    if not need_supernet(params.methods):
        default = costs.all(costs.graph.default)
        return {"steps": [], "default": default, **scores_entry(task.score, task.loss_name)}, {}
    trajectory = read_trajectory(SEARCH / "trajectory.json")
    check_trajectory_format(trajectory)
    return trajectory, read_curves(SUPERNET / "curves.csv")


def _warning(
    trajectory: dict[str, Any],
    results: Sequence[Result],
    curves: Mapping[str, Columns],
    data: PreparedData,
    task: Task,
) -> str:
    """Returns a warning if the search, or the user's trained network, is not better than chance; "" if both are."""
    chance = task.chance(data)
    if chance is None:
        return ""
    steps = [step_from_dict(step, task.loss_name) for step in trajectory["steps"]]
    messages = [chosen_by_noise([step.score for step in steps], chance)]
    for result in results:
        if result.start != "trained":
            continue
        found = fmean(last_by_seed(curves[result.method], f"search_{task.score.name}").values())
        error = 1 - found if task.score.higher_is_better else found
        if is_chance(Score(error, 0.0, data.info.counts["search"]), chance):
            messages.append(
                f"the network of model.weights has a {task.score.title} of {found:.1%} on the search split, not above "
                f"chance, which is {chance:.1%}; its classes or its images may differ from the data's in order or scale"
            )
    return "; ".join(filter(None, messages))
