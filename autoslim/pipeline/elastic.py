"""Writes several widths of the supernet to one file, and evaluates each as it is loaded from the file."""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from autoslim.channels.groups import Channels
from autoslim.channels.limits import group_ranges
from autoslim.data.batches import eval_batches
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.export.elastic import load_elastic, save_elastic
from autoslim.export.formats import Agreement, compare, description, other_structure
from autoslim.export.runtimes import network_run
from autoslim.export.samples import task_entry
from autoslim.files import write_json
from autoslim.pipeline.assembly import group_limits, recipe, run_context, traced_network
from autoslim.pipeline.checks import check_trajectory
from autoslim.pipeline.costs import load_costs
from autoslim.pipeline.params import Params
from autoslim.pipeline.project import PREPARED, SEARCH, SUPERNET, repository_root
from autoslim.resources.budgets import parse_budgets
from autoslim.search.methods import allocate
from autoslim.search.trajectory import read_trajectory
from autoslim.supernet.extract import load_supernet, subnet_extractor
from autoslim.tasks.building import find_task
from autoslim.training.checkpoints import check_described
from autoslim.training.device import to_device
from autoslim.training.progress import Progress
from autoslim.training.retrain import evaluate_split


@dataclass(frozen=True)
class Width:
    """A width: its channels, its costs by resource, and the task's measures on the test split by name."""

    channels: Channels
    costs: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)


def export_elastic(
    params: Params, method: str, budgets: Sequence[str], target: Path, compared: int
) -> tuple[dict[str, Width], Agreement]:
    """Writes the networks of a method for ``budgets`` to one file, with the weights that they share in the supernet.

    Args:
        params: the project's parameters.
        method: ``autoslim`` (networks of the trajectory) or ``uniform``.
        budgets: the widths' names, such as ``25%``, each a budget of the project's resource.
        target: the file. A JSON file of the same name describes it.
        compared: number of search images on which the file is compared with the networks.

    Returns:
        The widths, and how the file agrees with the networks that were extracted from the supernet.

    Raises:
        UserError: a budget is wrong or cannot be reached, two have the same network, or an earlier stage has not run.
    """
    if method not in ("autoslim", "uniform"):
        raise UserError(f"the widths of method {method!r} do not share a supernet; use autoslim or uniform")
    limits = {text: parse_budgets(text, params.resource) for text in budgets}
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    task = find_task(params.task)
    network, graph = traced_network(params.model, data.info, task)
    if reason := other_structure(network.eval(), data.info):
        raise UserError(f"the supernet cannot be exported, because {reason}, not a single tensor")
    costs = load_costs(graph)
    trajectory = read_trajectory(SEARCH / "trajectory.json")
    check_trajectory(trajectory, SEARCH / "trajectory.json", params, graph)
    chosen = {
        text: allocate(
            method,
            costs,
            [step["channels"] for step in trajectory["steps"]],
            costs.limits(budget),
            params.supernet.grid.divisor,
            trajectory["narrowest"]["channels"],
            group_ranges(graph.groups, group_limits(params.supernet.grid)),
        )
        for text, budget in limits.items()
    }
    for text, other in itertools.combinations(budgets, 2):
        if chosen[text] == chosen[other]:
            raise UserError(f"the widths {text} and {other} are the same network; choose budgets further apart")
    supernet, _ = load_supernet(SUPERNET, network, graph, data)
    check_described(SUPERNET / "weights.safetensors", trajectory.get("supernet"), SEARCH / "trajectory.json")
    context = run_context(params.runtime)
    extract = subnet_extractor(supernet, data, context, seed=params.data.seed)
    networks = {text: (channels, extract(channels).eval()) for text, channels in chosen.items()}
    widths = {text: Width(channels, costs.all(channels)) for text, channels in chosen.items()}
    about = {"method": method, "resource": params.resource, "task": task_entry(task), **description(data.info)}

    def save(file: Path) -> dict[str, object]:
        described = {**about, "widths": {text: dataclasses.asdict(width) for text, width in widths.items()}}
        save_elastic(file, supernet, networks, described)
        return described

    with TemporaryDirectory() as folder:
        save(Path(folder, target.name))
        loaded = load_elastic(
            lambda: copy.deepcopy(network),
            Path(folder, target.name),
            leaves=params.model.leaves,
            part=params.model.part or "",
        )
    batches = eval_batches(data, "search", batch_size=32, device="cpu", limit=compared, shuffled_by=0)
    images = [batch for batch, _ in batches]
    agreements = []
    for text, (_, plain) in networks.items():
        loaded.select(text)
        agreements.append(compare(plain.cpu(), lambda: network_run(loaded), images))
    worst = max(agreements, key=lambda agreement: agreement.share)
    worst.check(target.name)
    to_device(loaded, context.device, channels_last=False)
    with Progress("evaluate", len(widths), "width", brief=True) as progress:
        for text in widths:
            loaded.select(text)
            found = evaluate_split(loaded, data, "test", recipe(params.retrain), context, task)
            widths[text] = dataclasses.replace(widths[text], test=found.values)
            progress.advance()
    write_json(target.with_suffix(".json"), save(target))
    return widths, worst
