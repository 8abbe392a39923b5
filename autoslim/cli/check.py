"""``autoslim check``: validates the parameters as a run of the pipeline does, without running it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoslim.cli.terminal import (
    AsJson,
    ParamsFile,
    amounts,
    data_in_words,
    known_table,
    prepared_info,
    print_facts,
    print_json,
    without_output,
)
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project_with
from autoslim.resources.budgets import TITLES, format_amount, format_named_amount

if TYPE_CHECKING:
    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.checks import Reach
    from autoslim.pipeline.params import Params
    from autoslim.resources.costs import Costs
    from autoslim.resources.latency.table import Target

NOT_PREPARED = "not checked, because the data are not prepared; run `dvc repro prepare`"
NOT_MEASURED = "latency is not measured yet; run `dvc repro resources`"


@with_clear_errors
def check_cli(
    file: ParamsFile = Path("params.yaml"),
    as_json: AsJson = False,
) -> None:
    """Check params.yaml and show what the budget allows, without training, measuring or downloading anything.

    The network and the budget can only be checked once the data are prepared (`dvc repro prepare`). A latency budget
    can be checked if latency.table is set, or once `dvc repro resources` has measured the latency.

    Examples:

    autoslim check

    autoslim check presets/cifar10.yaml --json
    """
    root, path = enter_project_with(file)
    with without_output(as_json):
        facts, values = check(path, root)
    if as_json:
        print_json(values)
    else:
        print_facts(facts)


def check(path: Path, root: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Checks the parameter file at ``path`` for the project in ``root``.

    Returns:
        A summary as pairs of a title and a text, and its values for a script.

    Raises:
        UserError: A parameter is wrong.
    """
    from autoslim.pipeline.params import load_params

    params = load_params(path)  # before importing torch, so that most errors are reported at once
    from autoslim.pipeline.assembly import run_context
    from autoslim.pipeline.checks import check_data, check_model, check_table, check_task_source, check_teacher_file
    from autoslim.pipeline.code_lock import check_lock
    from autoslim.pipeline.costs import latency_target
    from autoslim.pipeline.launch import rank_count

    check_lock()
    check_data(params.data, relative_to=root)
    check_model(params.model)
    check_task_source(params.task)
    check_teacher_file(params)
    if params.latency.table is not None:
        check_table(params.latency.table)
    target = latency_target(params.latency)
    device = run_context(params.runtime).device
    rank_count(params.runtime)
    facts = [("parameters", f"{path} is complete"), ("data", params.data.source), ("device", str(device))]
    values = {"parameters": str(path), "data": params.data.source, "device": str(device)}
    info = prepared_info(params)
    if info is None:
        return [*facts, ("network, budget", NOT_PREPARED)], {**values, "prepared": False}
    network_facts, network_values = _of_network(params, info, target)
    return [*facts, *network_facts], {**values, "prepared": True, **network_values}


def _of_network(params: "Params", info: "DataInfo", target: "Target") -> tuple[list[tuple[str, str]], dict[str, Any]]:
    from autoslim.models.pretrained import weights_file
    from autoslim.pipeline.assembly import initial_network, traced_network
    from autoslim.pipeline.checks import check_methods, check_reach, check_runs, check_task, check_teacher, size_notes
    from autoslim.resources.costs import Costs
    from autoslim.resources.latency.kernels import find_kernels
    from autoslim.search.methods import need_supernet
    from autoslim.tasks.building import find_task

    task = find_task(params.task)
    check_task(params, info, task)
    network, graph = traced_network(params.model, info, task)
    if weights_file(params.model.weights):  # named weights would be downloaded
        initial = initial_network(params.model, params.supernet, network, graph)
        check_methods(params, network, graph, initial.new)
        check_teacher(params, network, graph)
    check_runs(network, graph, info, target)
    table = known_table(params, network, graph)
    if table is None and "latency" in params.budgets:
        find_kernels(network, graph, target.batch)
    costs, reaches = Costs(graph, table), check_reach(params, graph, table)
    counts = ", ".join(f"{count} {split}" for split, count in info.counts.items())
    unneeded = "" if need_supernet(params.methods) else "not run, because no method needs them"
    spans = (f"{format_amount(r.narrowest, r.resource)} to {r.amount(r.widest)}" for r in reaches)
    notes = list(size_notes(params, info))
    facts = [
        *(("note", note) for note in notes),
        ("images", f"{data_in_words(info)}; {counts}"),
        ("latency", table.summary() if table else f"not measured yet; it will be measured on {target}"),
        ("network", f"{params.model.name}, {len(graph.groups)} groups, {amounts(costs.all(graph.default))}"),
        ("widths" if unneeded else "supernet", f"from {', '.join(spans)}" if reaches else NOT_MEASURED),
        ("supernet, search" if unneeded else "search", unneeded or _search_range(params, costs, reaches)),
    ]
    known = {reach.resource: reach for reach in reaches}
    for resource, budget in params.budgets.items():
        name = f"budget of {TITLES[resource]}" if len(params.budgets) > 1 else "budget"
        comment = _allowed(known[resource]) if resource in known else f"not checked: {NOT_MEASURED}"
        facts.append((name, f"{budget.text}: {comment}"))
    values = {
        "notes": notes,
        "images": info.counts,
        "classes": len(info.classes),
        "network": params.model.name,
        "groups": len(graph.groups),
        "costs": costs.all(graph.default),  # of the default network
        "latency_measured": table is not None,
        "trains_supernet": need_supernet(params.methods),
        "budgets": {
            resource: {"text": budget.text, "checked": resource in known, **_range(known.get(resource))}
            for resource, budget in params.budgets.items()
        },
    }
    return facts, values


def _range(reach: "Reach | None") -> dict[str, float]:
    if reach is None:
        return {}
    return {"amount": reach.budget, "narrowest": reach.narrowest, "widest": reach.widest, "default": reach.default}


def _search_range(params: "Params", costs: "Costs", reaches: "list[Reach]") -> str:
    from autoslim.pipeline.assembly import grid_spec
    from autoslim.pipeline.costs import objective

    if len(reaches) < len(params.budgets):
        return NOT_MEASURED
    lowered = objective(params, costs)
    narrowest = costs.graph.grid(grid_spec(params.supernet)).narrowest
    stop = max(lowered.stop(params.search.stop, costs.graph.default), lowered.cost(narrowest))
    end = lowered.written(stop) if lowered.limits else format_named_amount(stop, params.resource)
    return f"from the widest down to {end}"


def _allowed(reach: "Reach") -> str:
    share = f"{100 * reach.budget / reach.default:.3g} % of the default network's"
    return f"at most {reach.amount(reach.budget)}, {share}"
