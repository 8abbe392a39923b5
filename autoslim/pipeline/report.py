"""Stage ``report``: compares the methods' networks on the test split."""

import rich

from autoslim.channels.resize import resize
from autoslim.data.prepared import PreparedData
from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.assembly import recipe, run_context, traced_network
from autoslim.pipeline.costs import budget_limits, load_costs, report_target
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import CHANNELS, PREPARED, REPORT, RETRAIN, SEARCH, SUPERNET, repository_root
from autoslim.pipeline.tracking import lineage, numbers, tracked
from autoslim.report.figures import channels_figure, curves_figure, last_by_seed, read_curves, trajectory_figure
from autoslim.report.resource_figures import resources_figure
from autoslim.report.table import Result, compare, csv_table, describe_budgets, markdown_table, metrics, terminal_table
from autoslim.resources.budgets import format_budgets
from autoslim.resources.measure import measure_network
from autoslim.search.search import read_trajectory
from autoslim.training.checkpoints import write_json
from autoslim.training.retrain import retrained_top1


def run() -> None:
    """Compares the methods on the test split, which no stage before has looked at."""
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    network, graph = traced_network(params.model, data.info)
    context = run_context(params.runtime)
    trajectory = read_trajectory(SEARCH / "trajectory.json")
    methods = params.methods
    found = {method: Allocation.read(CHANNELS, method).channels for method in methods}
    costs = load_costs(graph)
    target = report_target(params.latency, costs.table)
    retrained = {method: read_curves(RETRAIN / method / "curves.csv") for method in methods}
    results = []
    for method, channels in found.items():
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
        measured = measure_network(resize(network, graph, channels), graph.input_shape, target)
        seen = last_by_seed(retrained[method], "search_top1")
        results.append(Result(method, costs.all(channels), top1, measured, seen))
    limits = budget_limits(params, costs)
    elsewhere = "" if costs.table is None or costs.table.target == target else str(costs.table.target)
    comparison = compare(
        results,
        budgets=params.budgets,
        resource=params.resource,
        limits=limits,
        predicted_on=elsewhere,
        from_supernet=params.retrain.start == "supernet",
    )
    dpi = params.report.figure_dpi
    REPORT.mkdir(parents=True, exist_ok=True)
    shown = params.resource
    told = describe_budgets({shown: params.budgets[shown]}, limits)
    trajectory_figure(REPORT / "trajectory.png", trajectory, results, shown, {told: limits[shown]}, dpi)
    channels_figure(REPORT / "channels.png", graph.default, found, dpi)
    resources_figure(REPORT / "resources.png", results, costs.table, target, dpi)
    curves_figure(REPORT / "curves.png", read_curves(SUPERNET / "curves.csv"), retrained, dpi)
    (REPORT / "comparison.csv").write_text(csv_table(comparison))
    (REPORT / "table.md").write_text(markdown_table(comparison))
    figures = metrics(comparison)
    write_json(REPORT / "metrics.json", figures)
    with tracked(
        "report",
        run_name=f"report {format_budgets(params.budgets)}",
        params={"budget": format_budgets(params.budgets), "resource": params.resource, "methods": params.methods},
        tags={
            "source": params.data.source,
            "budget": format_budgets(params.budgets),
            "resource": params.resource,
            **lineage(SUPERNET / "weights.safetensors"),
        },
        enabled=params.tracking.enabled,
        experiment=params.tracking.experiment,
    ) as tracker:
        tracker.metrics(numbers(figures))
        tracker.artifact(REPORT)
    rich.print(terminal_table(comparison))
    print(f"Pictures: {REPORT}/trajectory.png, channels.png, resources.png, curves.png.")
    print("Runs: mlflow ui (make ui), or dvc exp show.")
    if choice := comparison.choice:
        print("The network ahead on the search split: autoslim export {} --seed {} --to network.pt2".format(*choice))
