"""Stage ``report``: compares the networks of all methods on the test split."""

import math
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import rich
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.markup import escape

from autoslim.channels.resize import resize
from autoslim.data.prepared import DataInfo, PreparedData
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
    STAGES,
    SUPERNET,
    check_trajectory_format,
    repository_root,
)
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.pipeline.times import recorded_time
from autoslim.pipeline.tracking.stage import tracked_stage
from autoslim.pipeline.tracking.tags import lineage, origin
from autoslim.report.figures import (
    Columns,
    band_over_seeds,
    candidate_increases,
    channels_figure,
    curves_figure,
    draw_candidates,
    draw_retrained_curves,
    draw_supernet_curves,
    draw_trajectory,
    last_by_seed,
    method_styles,
    read_curves,
    svg,
    trajectory_figure,
)
from autoslim.report.page import ChannelColumn, ChannelTable, Page, PageFigure, format_seconds, html_page
from autoslim.report.plots import retrained_csv, supernet_csv, trajectory_csv
from autoslim.report.resource_figures import resources_figure
from autoslim.report.table import (
    Comparison,
    Result,
    answer,
    compare,
    csv_table,
    describe_budgets,
    html_table,
    markdown_table,
    metrics,
    terminal_table,
)
from autoslim.resources.budgets import TITLES, format_budgets, format_named_amount
from autoslim.resources.costs import Costs
from autoslim.resources.latency.measure import processor
from autoslim.resources.measure import measure_networks
from autoslim.search.methods import DEFAULT, need_supernet
from autoslim.search.scoring import chosen_by_noise
from autoslim.search.trajectory import read_trajectory, step_from_dict
from autoslim.tasks.building import find_task
from autoslim.tasks.classification import is_chance
from autoslim.tasks.measure import scores_entry
from autoslim.tasks.task import Score, Task
from autoslim.training.retrain import evaluate_retrained

_PANELS = "The panels are not comparable: subnets share the supernet's weights, and retrained networks have their own. "


def run() -> None:
    """Compares the methods on the test split, which no earlier stage has used.

    Raises:
        UserError: a parameter is wrong, or an earlier stage has not run.
    """
    recorded = RecordedInputs("report")
    started = time.monotonic()
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
            origin=allocation.origin(data.digest),
            task=task,
        )
        values = {m.name: {seed: each[m.name] for seed, each in found.items()} for m in measures}
        top1 = values.pop(measures[0].name)
        search_top1 = last_by_seed(curves[method], f"search_{measures[0].name}")
        results.append(Result(method, costs.all(channels), top1, None, search_top1, allocation.start, values))
    plain = [resize(network, graph, allocation.channels, seed=None) for allocation in allocations.values()]
    measured = measure_networks(plain, inputs_of(network, data.info), target)
    results = [replace(result, measured=each) for result, each in zip(results, measured, strict=True)]
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
    marked = {describe_budgets({resource: params.budgets[resource]}, limits): limits[resource]}
    default_score = _default_score(trajectory, supernet, task)
    trajectory_figure(REPORT / "trajectory.png", trajectory, results, resource, marked, dpi, default_score)
    configurations = {method: each.channels for method, each in allocations.items() if method != DEFAULT}
    channels_figure(REPORT / "channels.png", graph.default, configurations, dpi)
    resources_figure(REPORT / "resources.png", results, costs.table, target, dpi)
    curves_figure(REPORT / "curves.png", supernet, curves, dpi, task.score)
    _write_plots(trajectory, supernet, curves, resource, task)
    write_bytes(REPORT / "comparison.csv", csv_table(comparison).encode())
    write_bytes(REPORT / "table.md", markdown_table(comparison).encode())
    figures = metrics(comparison)
    write_json(REPORT / "metrics.json", figures)
    networks = {"default": graph.default, **configurations}
    drawn = _page_figures(trajectory, results, supernet, curves, task, resource, marked, default_score)
    title, question = _question(params, data.info, comparison, trajectory)
    header, rows, caption = html_table(comparison)
    page = Page(
        title=title,
        question=question,
        answer=answer(comparison),
        warning=comparison.warning,
        header=header,
        rows=rows,
        caption=caption,
        figures=drawn,
        channels=_channel_table(networks),
        times=_times(params.methods, time.monotonic() - started),
        command=_command(),
        versions=_versions(),
        parameters=Path("params.yaml").read_text(encoding="utf-8"),
    )
    write_bytes(REPORT / "report.html", html_page(page).encode())
    recorded.check()
    budget = format_budgets(params.budgets)
    with tracked_stage(
        params,
        "report",
        run_name=f"report {budget}",
        details={"budget": budget, "resource": resource, "methods": params.methods},
        tags={"budget": budget, "resource": resource, **lineage(SUPERNET / "weights.safetensors")},
    ) as tracker:
        tracker.summary(figures, markdown_table(comparison))
        tracker.artifact(REPORT)
    if comparison.warning:
        rich.print(f"[bold]Warning:[/bold] {escape(comparison.warning)}\n")
    rich.print(terminal_table(comparison))
    print(f"Report: {REPORT}/report.html, with figures beside it.")
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


def _default_score(trajectory: Mapping[str, Any], supernet: Columns, task: Task) -> float | None:
    """Returns the score of the default configuration in the supernet; None if no supernet has it."""
    if not supernet:
        return None
    default, widest = (trajectory[which]["channels"] for which in ("default", "widest"))
    if any(widest[group] < size for group, size in default.items()):
        return None
    scores = [score for score in supernet[f"default_{task.score.name}"] if not math.isnan(score)]
    return scores[-1] if scores else None


def _write_plots(
    trajectory: Mapping[str, Any],
    supernet: Columns,
    curves: Mapping[str, Columns],
    resource: str,
    task: Task,
) -> None:
    """Writes the curves as data, for ``dvc plots``."""
    means = {}
    for method, columns in curves.items():
        band = band_over_seeds(columns, f"search_{task.score.name}")
        means[method] = dict(zip(band.epochs, band.mean, strict=True))
    texts = {
        "supernet": supernet_csv(supernet, task.score),
        "retrained": retrained_csv(means, task.score),
        "trajectory": trajectory_csv(trajectory, resource),
    }
    for name, text in texts.items():
        write_bytes(REPORT / "plots" / f"{name}.csv", text.encode())


def _question(params: Params, info: DataInfo, comparison: Comparison, trajectory: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the title and the question of the page."""
    model = params.model.name.rpartition(":")[2]
    budget = describe_budgets(comparison.budgets, comparison.limits)
    counts = ", ".join(f"{count:,} to {split}" for split, count in info.counts.items())
    default = format_named_amount(trajectory["default"][params.resource], params.resource)
    return (
        f"{model} on {info.source}, within {budget}",
        f"How many channels should each layer of {params.model.name} have, so that it needs at most {budget}? "
        f"The default network needs {default}. Data: {info.source} ({counts}).",
    )


def _page_figures(
    trajectory: Mapping[str, Any],
    results: Sequence[Result],
    supernet: Columns,
    curves: Mapping[str, Columns],
    task: Task,
    resource: str,
    budgets: Mapping[str, float],
    default_score: float | None,
) -> list[PageFigure]:
    def curve(name: str, draw: Callable[[Axes], None]) -> str:
        def drawn() -> Figure:
            figure = Figure(figsize=(5.2, 3.4), layout="constrained")
            draw(figure.subplots())
            return figure

        return svg(name, drawn)

    title = f"{task.score.title} and {TITLES[resource]}"
    path = svg("trajectory", lambda: draw_trajectory(trajectory, results, resource, budgets, default_score, (5.2, 5.4)))
    shown = [
        PageFigure(
            title[0].upper() + title[1:],
            path,
            _PANELS * bool(trajectory["steps"]) + "Networks with about the same cost are drawn side by side.",
        )
    ]
    if trajectory["steps"] and (values := candidate_increases(trajectory)) is not None:
        text = (
            "Each row is a group of channels, from input to output; dots mark the groups that a step slims. The lower "
            "the value, the less the group matters. Empty: the group could not be slimmed. The colours cover all but "
            "the lowest 2 % and the highest 5 % of the values."
        )
        heat = svg("candidates", lambda: draw_candidates(trajectory, values))
        shown.append(PageFigure("Candidates of the search", heat, text))
    if supernet:
        trained = curve("supernet", lambda axes: draw_supernet_curves(axes, supernet, task.score))
        shown.append(PageFigure("Training of the supernet", trained, "Three subnets, under the batch statistics."))
    retrained = curve("retrained", lambda axes: draw_retrained_curves(axes, curves, task.score))
    return [*shown, PageFigure("Retraining", retrained, "The networks that the table compares.")]


def _channel_table(networks: Mapping[str, Mapping[str, int]]) -> ChannelTable:
    """Returns the channels of ``networks``, of which the default network is the first."""
    styles = method_styles(list(networks))
    colours = {name: "" if name == DEFAULT else colour for name, (colour, _) in styles.items()}
    return ChannelTable([ChannelColumn(name, counts, colours[name]) for name, counts in networks.items()])


def _times(methods: Sequence[str], report: float) -> list[tuple[str, str]]:
    """Returns each stage with the time that it took. The report has taken ``report`` seconds so far."""
    rows = []
    for stage in STAGES[:-1]:
        for name in [f"{stage}@{method}" for method in methods] if stage == "retrain" else [stage]:
            recorded = recorded_time(name)
            text = "not recorded" if recorded is None else format_seconds(recorded[0])
            rows.append((name, f"{text} since it was continued" if recorded and recorded[1] else text))
    return [*rows, ("report", f"{format_seconds(report)} until this page")]


def _command() -> str:
    """Returns the commands that make these results again."""
    known = origin()
    if name := known.get("dvc_experiment"):
        return f"dvc exp apply {shlex.quote(name)}\ndvc repro"
    commit, _, dirty = known.get("commit", "").partition("-")
    lines = [f"git checkout {commit}"] if commit else []
    if dirty:
        lines.append("# then apply the changes that were not committed, such as the parameters below")
    return "\n".join([*lines, "dvc repro"])


def _versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("autoslim", "torch", "torchvision", "numpy", "dvc"))
    return f"{packages}, Python {platform.python_version()}, {platform.system()}, {processor()}"


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
