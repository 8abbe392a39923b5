"""Stage ``report``: compares the networks of all methods on the test split."""

import rich

from autoslim.channels.resize import resize
from autoslim.data.prepared import PreparedData
from autoslim.files import write_bytes, write_json
from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.assembly import recipe, run_context, traced_network
from autoslim.pipeline.costs import budget_limits, load_costs, report_target
from autoslim.pipeline.params import load_params
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
from autoslim.pipeline.tracking import lineage, numbers, tracked_stage
from autoslim.report.figures import channels_figure, curves_figure, last_by_seed, read_curves, trajectory_figure
from autoslim.report.resource_figures import resources_figure
from autoslim.report.table import Result, compare, csv_table, describe_budgets, markdown_table, metrics, terminal_table
from autoslim.resources.budgets import format_budgets
from autoslim.resources.measure import measure_network
from autoslim.search.trajectory import read_trajectory
from autoslim.training.retrain import retrained_top1


def run() -> None:
    """Compares the methods on the test split, which no earlier stage has used.

    Raises:
        UserError: a parameter is wrong, or an earlier stage has not run.
    """
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    network, graph = traced_network(params.model, data.info)
    context = run_context(params.runtime)
    trajectory = read_trajectory(SEARCH / "trajectory.json")
    check_trajectory_format(trajectory)
    channels_by_method = {method: Allocation.read(CHANNELS, method).channels for method in params.methods}
    costs = load_costs(graph)
    target = report_target(params.latency, costs.table)
    curves = {method: read_curves(RETRAIN / method / "curves.csv") for method in params.methods}
    results = []
    for method, channels in channels_by_method.items():
        top1 = retrained_top1(
            network,
            graph,
            channels,
            data,
            recipe(params.retrain),
            context,
            seeds=params.retrain.seeds,
            folder=RETRAIN / method / "weights",
        )
        measured = measure_network(resize(network, graph, channels, seed=None), graph.inputs, target)
        search_top1 = last_by_seed(curves[method], "search_top1")
        results.append(Result(method, costs.all(channels), top1, measured, search_top1))
    limits = budget_limits(params, costs)
    other_target = "" if costs.table is None or costs.table.target == target else str(costs.table.target)
    comparison = compare(
        results,
        budgets=params.budgets,
        resource=params.resource,
        limits=limits,
        predicted_on=other_target,
        from_supernet=params.retrain.start == "supernet",
    )
    dpi, resource = params.report.figure_dpi, params.resource
    REPORT.mkdir(parents=True, exist_ok=True)
    marked = {describe_budgets({resource: params.budgets[resource]}, limits): limits[resource]}
    trajectory_figure(REPORT / "trajectory.png", trajectory, results, resource, marked, dpi)
    channels_figure(REPORT / "channels.png", graph.default, channels_by_method, dpi)
    resources_figure(REPORT / "resources.png", results, costs.table, target, dpi)
    curves_figure(REPORT / "curves.png", read_curves(SUPERNET / "curves.csv"), curves, dpi)
    write_bytes(REPORT / "comparison.csv", csv_table(comparison).encode())
    write_bytes(REPORT / "table.md", markdown_table(comparison).encode())
    figures = metrics(comparison)
    write_json(REPORT / "metrics.json", figures)
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
    rich.print(terminal_table(comparison))
    print(f"Figures: {REPORT}/trajectory.png, channels.png, resources.png, curves.png.")
    print("Runs: mlflow ui, or dvc exp show.")
    if choice := comparison.choice:
        print("Best network on the search split: autoslim export {} --seed {} --to network.pt2".format(*choice))
