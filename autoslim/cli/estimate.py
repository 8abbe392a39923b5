"""``autoslim estimate``: estimates the time, multiply-adds and memory of a run of the pipeline on this machine."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim.cli.terminal import (
    AsJson,
    Classes,
    ParamsFile,
    amounts,
    data_in_words,
    described_data,
    known_table,
    prepared_info,
    print_facts,
    print_json,
    print_table,
    without_output,
)
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project_with
from autoslim.resources.budgets import format_amount, format_budgets, format_named_amount

if TYPE_CHECKING:
    import torch

    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.dry_run import DryRun, PassTiming
    from autoslim.pipeline.estimate import Work
    from autoslim.pipeline.params import Params
    from autoslim.resources.costs import Costs


NOTES = """\
hours: median time of a pass on synthetic images times the number of passes, without loading data or writing files.
search: assumes that all groups are slimmed evenly and each option runs in full; the actual number depends on scores.
refinement: assumes six configurations for each group; it repeats for every budget.
autoslim and the other methods: their networks are not known yet; the uniform network at the budget is measured instead.
petaMACs: forward passes only, in closed form; with the backward pass, training takes about three times as many.
memory: peak of allocated CUDA memory; ">": lower bound (weights, gradients, momentum and saved activations)."""


@with_clear_errors
def estimate_cli(
    file: ParamsFile = Path("params.yaml"),
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, help="Number of training images. Default: as prepared."),
    ] = None,
    classes: Classes = None,
    test_images: Annotated[
        int | None,
        typer.Option("--test-images", min=1, help="Number of test images. Default: as prepared."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=2, help="Measure with at most this batch size, and scale linearly."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="Approximate measuring time for each kind of pass.")
    ] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Estimate the time, multiply-adds and memory of each stage on this machine.

    The command builds the networks as the stages do, and times a few passes of each kind on synthetic images. It needs
    no data.

    Examples:

    autoslim estimate

    autoslim estimate presets/imagenet-resnet50.yaml --images 1281167 --classes 1000 --test-images 50000 --batch 64
    """
    root, path = enter_project_with(file)
    from autoslim.pipeline.params import load_params

    params = load_params(path)
    prepared = prepared_info(params)
    info = _described(params, prepared, images, classes, test_images)
    with without_output(as_json):
        facts, values = estimate(params, info, root if info is prepared else None, batch, seconds)
    if as_json:
        print_json(values)
    else:
        print_estimate(facts, values)


def _described(
    params: "Params", info: "DataInfo | None", images: int | None, classes: int | None, test_images: int | None
) -> "DataInfo":
    """Returns the description of the prepared data, modified by the options.

    Raises:
        UserError: The number of images or classes is not known, or no training image is left.
    """
    data = params.data
    if images is None and classes is None and test_images is None and info is not None:
        return info
    size: tuple[int, int] | None = data.size
    channels: int | None = data.channels
    if info is not None:
        images = images or info.counts["train"] + info.counts["search"]
        classes, test_images = classes or len(info.classes), test_images or info.counts.get("test")
        size, channels = info.image_size, info.channels
    if images is None or classes is None:
        raise UserError(
            f"the number of images and classes of {data.source} is not known; run `dvc repro prepare`, or set --images "
            "and --classes (for ImageNet --images 1281167 --classes 1000 --test-images 50000)"
        )
    search = min(data.search_images, images // 2)  # at most half of each class is held out
    if search < 2:
        raise UserError(f"--images {images} leaves fewer than 2 search images; raise --images")
    left = images - search
    counts = {"train": min(left, data.train_images or left), "search": search}
    if test_images is not None:
        counts["test"] = min(test_images, data.test_images or test_images)
    return described_data(
        params,
        classes=classes,
        size=size,
        channels=channels,
        counts=counts,
        remedy="set both, or run `dvc repro prepare`",
    )


def estimate(
    params: "Params", info: "DataInfo", root: Path | None, batch: int | None, seconds: float
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Estimates the costs of a run with ``params``.

    Args:
        info: Description of the data.
        root: The project's folder if the data are prepared; None if no data are to be loaded.
        batch: Largest batch size to measure with; None if there is no limit.
        seconds: Measuring time for each kind of pass.

    Returns:
        What was measured, as pairs of a title and a text, and all values for ``print_estimate`` or a script: bytes,
        and the hours, seconds (of a pass) and forward petaMACs of each kind of work.

    Raises:
        UserError: The network does not fit the data, the budget cannot be reached, ``model.weights`` cannot be read,
            or the device does not have enough memory for a batch.
    """
    from autoslim.pipeline.assembly import grid_spec, initial_network, run_context, traced_network
    from autoslim.pipeline.checks import check_reach
    from autoslim.pipeline.dry_run import DryRun
    from autoslim.pipeline.estimate import TRAINING, Sizes, plan
    from autoslim.resources.costs import Costs
    from autoslim.search.methods import DEFAULT
    from autoslim.tasks.building import find_task

    network, graph = traced_network(params.model, info, find_task(params.task))
    costs = Costs(graph, known_table(params, network, graph))
    check_reach(params, graph, costs.table)
    grid = graph.grid(grid_spec(params.supernet))
    counts = info.counts
    trained = False
    if DEFAULT in params.methods and params.retrain.start != "scratch":  # otherwise the plan does not depend on it
        initial = initial_network(params.model, params.supernet, network, graph)
        trained = initial.trained is not None and not initial.new
    sizes = Sizes(counts["train"], counts["search"], counts.get("test"))
    works = plan(params, costs, grid, sizes, trained=trained)
    dry_run = DryRun(params, network, graph, grid, info, run_context(params.runtime))
    measured = _measured(dry_run, works, batch, seconds)
    splits = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    facts = [
        ("device", _named(dry_run.context.device)),
        ("network", f"{params.model.name}, {amounts(costs.all(graph.default))}"),
        ("budget", format_budgets(params.budgets) + _latency_note(params, costs)),
        ("images", f"{data_in_words(info)}; {splits}"),
        ("measured", "with full batches" if batch is None else f"with batches of at most {batch}, scaled linearly"),
    ]
    values: dict[str, Any] = {
        "device": str(dry_run.context.device),
        "network": params.model.name,
        "costs": costs.all(graph.default),  # of the default network
        "budgets": {resource: budget.text for resource, budget in params.budgets.items()},
        "images": counts,
        "largest_batch": batch,
        "work": [_values(work, measurement, dry_run) for work, measurement in zip(works, measured, strict=True)],
    }
    values |= {total: sum(work[total] for work in values["work"]) for total in ("hours", "petamacs")}
    training = next((pair for pair in zip(works, measured, strict=True) if pair[0].kind in TRAINING), None)
    if root is not None and info.storage != "arrays" and training is not None:
        text, values["loading"] = _loading(dry_run, root, *training, seconds)
        facts.append(("loading", text))
    return facts, values


def print_estimate(facts: list[tuple[str, str]], values: dict[str, Any]) -> None:
    print_facts(facts)
    print()
    rows = [_row(work) for work in values["work"]]
    rows.append(["(total)", "", "", "", _rounded(values["hours"]), _rounded(values["petamacs"]), ""])
    print_table(["work", "passes", "images each", "seconds each", "hours", "petaMACs", "memory"], rows)
    print(f"\n{NOTES}")


def _latency_note(params: "Params", costs: "Costs") -> str:
    """Returns a note on what replaces a latency budget if there is no latency table; otherwise an empty string."""
    from autoslim.pipeline.estimate import proxy_limits

    if "latency" not in params.budgets or costs.table is not None:
        return ""
    reason = "latency is not known before `dvc repro resources`"
    if len(params.budgets) > 1:
        return f" ({reason}; its limit is ignored here)"
    return f" ({reason}; a budget of {format_named_amount(proxy_limits(params, costs)['macs'])} is assumed instead)"


def _measured(dry_run: "DryRun", works: Sequence["Work"], batch: int | None, seconds: float) -> "list[PassTiming]":
    """Returns one measurement for each of ``works``. Those whose passes are equal share a measurement."""
    from autoslim.training.progress import Progress

    measured: dict[str, PassTiming] = {}
    keys = [f"{work.kind} {work.configurations}" for work in works]
    with Progress("measuring", len(set(keys)), unit="kind") as progress:
        for work, key in zip(works, keys, strict=True):
            if key not in measured:
                progress.write(f"measuring {work.name}")
                measured[key] = dry_run.measure(work, min(work.at_once, batch or work.at_once), seconds)
                progress.advance()
    return [measured[key] for key in keys]


def _values(work: "Work", measured: "PassTiming", dry_run: "DryRun") -> dict[str, Any]:
    from autoslim.pipeline.estimate import TRAINING

    resident_bytes = 4 * work.resident_images * math.prod(dry_run.graph.input_shape)
    memory = {}
    if measured.peak_bytes is not None and measured.images == work.at_once:
        memory = {"memory": measured.peak_bytes + resident_bytes}
    elif work.kind in TRAINING:
        memory = {"least_memory": dry_run.least_bytes(work, work.at_once) + resident_bytes}
    return {
        "work": work.name,
        "passes": work.passes,
        "approximate": work.kind == "search",
        "images": work.images,
        "seconds": measured.seconds * work.images / measured.images,
        "hours": work.hours(measured.seconds, measured.images),
        "petamacs": work.petamacs,
        **memory,
    }


def _row(work: dict[str, Any]) -> list[str]:
    memory = ""
    if "memory" in work:
        memory = format_amount(work["memory"], "memory")
    elif "least_memory" in work:
        memory = f"> {format_amount(work['least_memory'], 'memory')}"
    prefix = "~" if work["approximate"] else ""
    return [
        work["work"],
        f"{prefix}{work['passes']:,}",
        f"{work['images']:,}",
        _rounded(work["seconds"]),
        _rounded(work["hours"]),
        f"{prefix}{_rounded(work['petamacs'])}",
        memory,
    ]


def _rounded(value: float) -> str:
    """Formats ``value`` with three significant digits, or with all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _loading(
    dry_run: "DryRun", root: Path, work: "Work", training: "PassTiming", seconds: float
) -> tuple[str, dict[str, float]]:
    """Returns a comment, and the images per second that are loaded and that training needs."""
    from autoslim.data.prepared import PreparedData
    from autoslim.pipeline.assembly import recipe
    from autoslim.pipeline.dry_run import loading_rate
    from autoslim.pipeline.project import PREPARED

    data = PreparedData.open(PREPARED, relative_to=root)
    params = dry_run.params
    stage, name = (params.supernet, "training the supernet") if work.kind == "supernet" else (params.retrain, work.name)
    rate = loading_rate(data, recipe(stage), dry_run.context, seconds)
    needed = training.images / training.seconds
    comment = (
        "loading is the bottleneck, so the run takes longer than the hours below"
        if rate < needed
        else "loading is fast enough"
    )
    workers = dry_run.context.workers
    text = f"{rate:.3g} images/s with {workers} workers; {name} needs {needed:.3g} images/s; {comment}"
    return text, {"images_per_second": rate, "needed_images_per_second": needed}


def _named(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}, torch threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device)
