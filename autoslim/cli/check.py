"""``autoslim check``: everything that a run of the pipeline would check, without running it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from autoslim.cli.terminal import ParamsFile, amounts, prepared_info, print_facts
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project_with
from autoslim.resources.budgets import TITLES, format_amount, format_named_amount

if TYPE_CHECKING:
    from torch import nn

    from autoslim.channels.graph import ChannelGraph
    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.checks import Reach
    from autoslim.pipeline.params import Params
    from autoslim.resources.costs import Costs
    from autoslim.resources.latency.table import LatencyTable, Target


NOT_MEASURED = "latency is not measured yet: `dvc repro resources` does that"


@with_clear_errors
def check_cli(
    file: ParamsFile = Path("params.yaml"),
) -> None:
    """Check params.yaml and say what the budget comes to. Trains nothing, measures nothing, downloads nothing.

    Network and budget depend on the data: they are checked once the data are prepared (`dvc repro prepare`). A budget
    of latency is checked where latency is known: from latency.table, or once `dvc repro resources` has measured it.

    Examples:

    autoslim check

    autoslim check presets/cifar10.yaml
    """
    root, path = enter_project_with(file)
    check(path, root)


def check(path: Path, root: Path) -> None:
    """Checks the parameters in the file at ``path`` for the project in ``root``, and prints what they come to.

    Raises:
        UserError: something is wrong with them.
    """
    from autoslim.pipeline.params import load_params

    params = load_params(path)  # before torch is imported: most mistakes are told at once
    from autoslim.data.prepare import check_source
    from autoslim.pipeline.assembly import run_context
    from autoslim.pipeline.checks import check_model, check_table
    from autoslim.pipeline.costs import latency_target
    from autoslim.pipeline.launch import rank_count

    check_source(params.data.source, relative_to=root)
    check_model(params.model)
    if params.latency.table is not None:
        check_table(params.latency.table)
    target = latency_target(params.latency)
    device = run_context(params.runtime).device
    rank_count(params.runtime)
    facts = [("parameters", f"{path} is complete"), ("data", params.data.source), ("device", str(device))]
    info = prepared_info(params)
    if info is None:
        print_facts([*facts, ("network, budget", "not checked: they need the data; run `dvc repro prepare` first")])
        return
    print_facts([*facts, *_network_facts(params, info, target)])


def _network_facts(params: "Params", info: "DataInfo", target: "Target") -> list[tuple[str, str]]:
    from autoslim.models.pretrained import weights_file
    from autoslim.pipeline.assembly import initial_network, traced_network
    from autoslim.pipeline.checks import check_reach, check_runs, check_smoothing
    from autoslim.resources.costs import Costs
    from autoslim.resources.latency.kernels import find_kernels

    check_smoothing(params, info)
    network, graph = traced_network(params.model, info)
    if weights_file(params.model.weights):  # those with a name would be downloaded
        initial_network(params.model, params.supernet, network, graph)
    check_runs(network, graph, target)
    table = known_table(params, network, graph)
    if table is None and "latency" in params.budgets:
        find_kernels(network, graph, target.batch)
    costs, reaches = Costs(graph, table), check_reach(params, graph, table)
    counts = ", ".join(f"{count} {split}" for split, count in info.counts.items())
    spans = (f"{format_amount(r.narrowest, r.resource)} to {r.amount(r.widest)}" for r in reaches)
    facts = [
        ("images", f"{info.channels}x{info.image_size}x{info.image_size}, {len(info.classes)} classes; {counts}"),
        ("latency", table.summary() if table else f"will be measured on {target}"),
        ("network", f"{params.model.name}, {len(graph.groups)} groups, {amounts(costs.all(graph.default))}"),
        ("supernet", f"from {', '.join(spans)}" if reaches else NOT_MEASURED),
        ("search", _end_of_search(params, costs, reaches)),
    ]
    known = {reach.resource: reach for reach in reaches}
    for resource, budget in params.budgets.items():
        name = f"budget of {TITLES[resource]}" if len(params.budgets) > 1 else "budget"
        told = _comes_to(known[resource]) if resource in known else f"not checked: {NOT_MEASURED}"
        facts.append((name, f"{budget.text}: {told}"))
    return facts


def _end_of_search(params: "Params", costs: "Costs", reaches: "list[Reach]") -> str:
    from autoslim.pipeline.assembly import grid_spec
    from autoslim.pipeline.costs import objective

    if len(reaches) < len(params.budgets):
        return NOT_MEASURED
    lowered = objective(params, costs)
    narrowest = costs.graph.grid(grid_spec(params.supernet)).narrowest
    stop = max(lowered.stop(params.search.stop, costs.graph.default), lowered.cost(narrowest))
    end = lowered.written(stop) if lowered.limits else format_named_amount(stop, params.resource)
    return f"from the widest down to {end}"


def _comes_to(reach: "Reach") -> str:
    share = f"{100 * reach.budget / reach.default:.3g} % of the default network's"
    return f"at most {reach.amount(reach.budget)}, {share}"


def known_table(params: "Params", network: "nn.Module", graph: "ChannelGraph") -> "LatencyTable | None":
    """The latency table of ``graph`` that ``latency.table`` names, or that the stage ``resources`` wrote.

    None where neither is there, and where what the stage wrote is of another network, or measured elsewhere or in
    another way than the parameters ask for: it will run again.

    Raises:
        UserError: ``latency.table`` cannot be read, or is of another network.
    """
    from autoslim.pipeline.assembly import grid_spec
    from autoslim.pipeline.checks import check_kernels
    from autoslim.pipeline.costs import latency_target, load_costs, read_table
    from autoslim.pipeline.project import RESOURCES

    asked, grid = params.latency, graph.grid(grid_spec(params.supernet))
    if asked.table is not None:
        table = read_table(Path(asked.table))
        check_kernels(table, network, graph, grid)
        return table
    if not (RESOURCES / "latency.json").is_file():
        return None
    try:
        made = load_costs(graph).table
        if made is None:
            return None
        check_kernels(made, network, graph, grid)
    except UserError:
        return None
    target = latency_target(asked)
    return made if dataclasses.replace(made.target, versions=target.versions) == target else None
