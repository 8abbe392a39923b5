"""``autoslim estimate``: what a run of the parameters will cost on this machine, before it is started."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoslim.cli.check import known_table
from autoslim.cli.terminal import Classes, ParamsFile, amounts, described_data, prepared_info, print_facts, print_table
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
hours: the median pass on synthetic images times the number of passes; loading data and writing files are not in them.
search: as if all groups were slimmed evenly and each candidate run in full; the real number depends on the scores.
autoslim's network is not known yet: it is measured as the uniform network of the same budget.
petaMACs: forward, in closed form, whatever the machine; training steps take about three times that with the backward.
memory: on CUDA what is allocated at most; with ">" only weights, gradients, momentum and what autograd keeps."""


@with_clear_errors
def estimate_cli(
    file: ParamsFile = Path("params.yaml"),
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Training images there are. Default: as prepared.")
    ] = None,
    classes: Classes = None,
    test_images: Annotated[
        int | None, typer.Option("--test-images", min=1, help="Test images there are. Default: as prepared.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=2, help="Measure with at most so many images at once, and scale linearly."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="Measure each kind of pass for about so long.")
    ] = 10.0,
) -> None:
    """Estimate what a run costs on this machine: hours, multiply-adds and memory of each stage.

    Builds the networks as the stages do and times a few passes of each kind on synthetic images. Needs no data.

    Examples:

    autoslim estimate

    autoslim estimate presets/imagenet-resnet50.yaml --images 1281167 --classes 1000 --test-images 50000 --batch 64
    """
    root, path = enter_project_with(file)
    from autoslim.pipeline.params import load_params

    params = load_params(path)
    prepared = prepared_info(params)
    info = _described(params, prepared, images, classes, test_images)
    estimate(params, info, root if info is prepared else None, batch, seconds)


def _described(
    params: "Params", info: "DataInfo | None", images: int | None, classes: int | None, test_images: int | None
) -> "DataInfo":
    """The data as they were prepared, or, where the options say something else, as they would be.

    Raises:
        UserError: neither says how large they are, or nothing is left to train on.
    """
    data = params.data
    if images is None and classes is None and test_images is None and info is not None:
        return info
    size: int | None = data.image_size
    channels: int | None = data.channels
    if info is not None:
        there = info.counts
        images = images or there["train"] + there["search"]
        classes, test_images = classes or len(info.classes), test_images or there.get("test")
        size, channels = info.image_size, info.channels
    if images is None or classes is None:
        raise UserError(
            f"how many images and classes {data.source} has is not known; run `dvc repro prepare`, or give --images "
            "and --classes (for ImageNet --images 1281167 --classes 1000 --test-images 50000)"
        )
    left = images - data.search_images
    if left < 1:
        raise UserError(
            f"--images {images} leaves nothing to train on beside data.search_images {data.search_images}; "
            "raise --images or lower data.search_images"
        )
    counts = {"train": min(left, data.train_images or left), "search": data.search_images}
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


def estimate(params: "Params", info: "DataInfo", root: Path | None, batch: int | None, seconds: float) -> None:
    """Prints what a run of ``params`` on data like ``info`` costs here. ``root``: where these data start, if any.

    Raises:
        UserError: the network or the budget does not fit, or a batch the machine's memory.
    """
    from autoslim.pipeline.assembly import grid_spec, run_context, traced_network
    from autoslim.pipeline.checks import check_reach
    from autoslim.pipeline.dry_run import DryRun
    from autoslim.pipeline.estimate import Sizes, plan
    from autoslim.resources.costs import Costs

    network, graph = traced_network(params.model, info)
    costs = Costs(graph, known_table(params, network, graph))
    check_reach(params, graph, costs.table)
    grid = graph.grid(grid_spec(params.supernet))
    counts = info.counts
    works = plan(params, costs, grid, Sizes(counts["train"], counts["search"], counts.get("test")))
    rehearsal = DryRun(params, network, graph, grid, len(info.classes), run_context(params.runtime))
    measured = _measured(rehearsal, works, batch, seconds)
    splits = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    facts = [
        ("device", _named(rehearsal.context.device)),
        ("network", f"{params.model.name}, {amounts(costs.all(graph.default))}"),
        ("budget", format_budgets(params.budgets) + _stand_in(params, costs)),
        ("images", f"{'x'.join(map(str, graph.input_shape))}, {len(info.classes)} classes; {splits}"),
        ("measured", "at full size" if batch is None else f"with at most {batch} images at once, and scaled linearly"),
    ]
    if root is not None and info.storage == "files":
        facts.append(("loading", _loading(rehearsal, root, measured[0], seconds)))
    print_facts(facts)
    print()
    rows = [_row(work, seen, rehearsal) for work, seen in zip(works, measured, strict=True)]
    hours = sum(work.hours(seen.seconds, seen.images) for work, seen in zip(works, measured, strict=True))
    rows.append(["(all)", "", "", "", _figure(hours), _figure(sum(work.petamacs for work in works)), ""])
    print_table(["work", "passes", "images each", "seconds each", "hours", "petaMACs", "memory"], rows)
    print(f"\n{NOTES}")


def _stand_in(params: "Params", costs: "Costs") -> str:
    """What is taken in the place of a latency that nobody has measured yet."""
    from autoslim.pipeline.estimate import proxy_limits

    if "latency" not in params.budgets or costs.table is not None:
        return ""
    why = "latency is not known before `dvc repro resources`"
    if len(params.budgets) > 1:
        return f" ({why}: its limit is left out here)"
    return f" ({why}: {format_named_amount(proxy_limits(params, costs)['macs'])} are taken in its place)"


def _measured(rehearsal: "DryRun", works: Sequence["Work"], batch: int | None, seconds: float) -> "list[PassTiming]":
    """One for each of ``works``; those that run the same are measured once."""
    from autoslim.training.progress import Progress

    found: dict[str, PassTiming] = {}
    keys = [f"{work.kind} {work.configurations}" for work in works]
    with Progress("measuring", len(set(keys)), unit="kind") as progress:
        for work, key in zip(works, keys, strict=True):
            if key not in found:
                progress.write(f"measuring {work.name}")
                found[key] = rehearsal.measure(work, min(work.at_once, batch or work.at_once), seconds)
                progress.advance()
    return [found[key] for key in keys]


def _row(work: "Work", seen: "PassTiming", rehearsal: "DryRun") -> list[str]:
    from autoslim.pipeline.estimate import TRAINING

    kept = 4 * work.kept * math.prod(rehearsal.graph.input_shape)
    memory = ""
    if seen.peak_bytes is not None and seen.images == work.at_once:
        memory = format_amount(seen.peak_bytes + kept, "memory")
    elif work.kind in TRAINING:
        memory = f"> {format_amount(rehearsal.least_bytes(work, work.at_once) + kept, 'memory')}"
    about = "~" if work.kind == "search" else ""
    return [
        work.name,
        f"{about}{work.passes:,}",
        f"{work.images:,}",
        _figure(seen.seconds * work.images / seen.images),
        _figure(work.hours(seen.seconds, seen.images)),
        f"{about}{_figure(work.petamacs)}",
        memory,
    ]


def _figure(value: float) -> str:
    """To three digits, thousands whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _loading(rehearsal: "DryRun", root: Path, training: "PassTiming", seconds: float) -> str:
    from autoslim.data.prepared import PreparedData
    from autoslim.pipeline.assembly import recipe
    from autoslim.pipeline.dry_run import loading_rate
    from autoslim.pipeline.project import PREPARED

    data = PreparedData.open(PREPARED, relative_to=root)
    rate = loading_rate(data, recipe(rehearsal.params.supernet), rehearsal.context, seconds)
    needed = training.images / training.seconds
    verdict = "loading sets the pace, and the hours are too few" if rate < needed else "loading keeps up"
    workers = rehearsal.context.workers
    return f"{rate:.3g} images a second by {workers} workers; the supernet trains on {needed:.3g} a second: {verdict}"


def _named(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}, torch threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device)
