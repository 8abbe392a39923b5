"""``autoslim latency``: tables of a network's latency, measured here for a search anywhere."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim.cli.terminal import Classes, ParamsFile, described_data, percent, prepared_info, print_facts, print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project_with
from autoslim.resources.budgets import format_amount

if TYPE_CHECKING:
    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.params import Params
    from autoslim.resources.latency.table import LatencyTable


FIGURE_DPI = 150

latency_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure a network's latency on this machine, for a search here or elsewhere.\n\n"
    "`autoslim latency measure --to phone.json` on the machine that is to run the network; `latency.table: phone.json` "
    "in the params.yaml of the search.",
)


class Runtime(StrEnum):
    EAGER = "eager"
    COMPILE = "compile"
    ONNXRUNTIME = "onnxruntime"


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"


@latency_app.command("measure")
@with_clear_errors
def measure_cli(
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The table, as JSON.")],
    file: ParamsFile = Path("params.yaml"),
    classes: Classes = None,
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Images' height and width. Default: data.image_size.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option("--channels", min=1, max=3, help="Images' channels. Default: data.channels.")
    ] = None,
    runtime: Annotated[Runtime | None, typer.Option("--runtime", help="Default: latency.runtime.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: latency.device.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: latency.threads.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Default: latency.batch.")] = None,
    precision: Annotated[Precision | None, typer.Option("--precision", help="Default: latency.precision.")] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last/--no-channels-last", help="Memory layout. Default: latency.channels_last."),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option("--points", min=2, help="Numbers of channels on each axis of a kernel. Default: latency.points."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE where it is there.")] = False,
) -> None:
    """Measure the latency table of the network in params.yaml on this machine, and write it to FILE.

    The network's kernels are timed over the search's channel numbers, then whole networks, to see how far the
    predictions are off. Needs no data where --classes is given, and images' size stands in params.yaml or is given
    too. Measures anew each time; only what was interrupted goes on where it stopped. Leave the machine to it meanwhile.

    A search uses the table by latency.table: FILE, on whatever machine it runs.

    Examples:

    autoslim latency measure --to here.json

    autoslim latency measure presets/imagenet-mobilenet_v2.yaml --to phone.json --classes 1000 --runtime onnxruntime
    """
    target = to.absolute()
    if target.is_dir():
        raise UserError(f"--to {to} is a folder; name a file in it, such as {to / 'latency.json'}")
    if target.exists() and not force:
        raise UserError(f"--to {to} is there; name another file, or replace it with --force")
    if not target.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--to {to}: nothing can be written in {target.parent}; name a file elsewhere")
    root, path = enter_project_with(file)
    from autoslim.pipeline.params import load_params

    options = {
        "runtime": runtime,
        "device": device,
        "threads": threads,
        "batch": batch,
        "precision": precision,
        "channels_last": channels_last,
        "points": points,
    }
    params = with_options(load_params(path), options)
    table = measure(params, _images(params, classes, size, channels), target)
    print(table.summary())
    there = target.relative_to(root) if target.is_relative_to(root) else target
    print(
        f"wrote {to}: {len(table.kernels)} kernels. To search with it: latency.table: {there} in params.yaml, and the "
        "file among the deps of the stage resources in dvc.yaml"
    )


def with_options(params: "Params", options: dict[str, Any]) -> "Params":
    """``params`` with what options say otherwise of the section ``latency``.

    Raises:
        UserError: an option's value cannot be.
    """
    from autoslim.pipeline.params import check_params

    given = {name: str(value) if isinstance(value, StrEnum) else value for name, value in options.items()}
    given = {name: value for name, value in given.items() if value is not None}
    values = params.model_dump()
    values["latency"] |= given
    return check_params(values, f"the options {', '.join(given)}") if given else params


def _images(params: "Params", classes: int | None, size: int | None, channels: int | None) -> "DataInfo":
    """The data as they were prepared, or, where options say something else, as they would be."""
    info, data = prepared_info(params), params.data
    if info is not None and classes is None and size is None and channels is None:
        return info
    if info is not None:
        classes, size, channels = classes or len(info.classes), size or info.image_size, channels or info.channels
    if classes is None:
        raise UserError(
            f"how many classes {data.source} has is not known; run `dvc repro prepare`, or give --classes (for "
            "ImageNet --classes 1000)"
        )
    return described_data(
        params,
        classes=classes,
        size=size or data.image_size,
        channels=channels or data.channels,
        counts={},
        remedy="give --size and --channels, or run `dvc repro prepare`",
    )


def measure(params: "Params", info: "DataInfo", to: Path) -> "LatencyTable":
    """Measures the table of ``params``' network for images like those of ``info``, and writes it to ``to``.

    Raises:
        UserError: it cannot be measured.
    """
    from autoslim.pipeline.assembly import traced_network
    from autoslim.pipeline.checks import check_groups
    from autoslim.pipeline.costs import latency_target, measured_table
    from autoslim.training.checkpoints import write_json

    latency_target(params.latency)  # before the network is built
    network, graph = traced_network(params.model, info)
    check_groups(params.model.name, graph)
    table = measured_table(params, network, graph, anew=True)
    write_json(to, table.to_dict())
    return table


@latency_app.command("show")
@with_clear_errors
def show_cli(
    file: Annotated[Path, typer.Argument(help="A table that `autoslim latency measure` wrote.")],
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE.png", help="Draw predicted against measured latency.")
    ] = None,
) -> None:
    """Show a latency table: what it was measured on, how good its predictions are, and where the time goes.

    Times are of the default network: the kernels' add up, with what is between them, to its prediction.

    Example:

    autoslim latency show phone.json --picture phone.png
    """
    if picture is not None:
        if picture.suffix != ".png":
            raise UserError(f"--picture {picture} ends in {picture.suffix or 'nothing'}; end it in .png")
        if not picture.absolute().parent.is_dir():
            raise UserError(f"--picture {picture}: there is no folder {picture.absolute().parent}; make it first")
    from autoslim.pipeline.costs import read_table

    table = read_table(file)
    if picture is not None and table.check is None:
        raise UserError(f"{file} holds no comparison to draw; make it again with `autoslim latency measure`")
    print_latency(table)
    if picture is not None:
        from autoslim.report.resource_figures import prediction_figure

        prediction_figure(picture, table, dpi=FIGURE_DPI)
        print(f"\nwrote {picture}")


def print_latency(table: "LatencyTable") -> None:
    target, total = table.target, table.predict(table.default)
    facts = [
        ("network", f"{table.network} on {'x'.join(map(str, table.input_shape))} images, {len(table.kernels)} kernels"),
        ("measured on", str(target)),
        ("default", f"{format_amount(total, 'latency')}, predicted"),
    ]
    if (check := table.check) is not None:
        spans = f"{format_amount(min(check.measured), 'latency')} to {format_amount(max(check.measured), 'latency')}"
        facts += [
            ("checked on", f"{len(check.measured)} random networks, {spans}"),
            ("error", f"{check.median_error:.1%} (median); 95 % are within {check.error_95:.1%}"),
            ("rank correlation", f"{check.rank_correlation:.3f}"),
        ]
    print_facts(facts)
    print()
    times = {name: table.slope * kernel.predict(table.default) for name, kernel in table.kernels.items()}
    ordered = sorted(times.items(), key=lambda item: -item[1])
    ordered += [("(a whole network less its kernels)", table.intercept), ("(all)", total)]
    rows = [[name, f"{ms:.4g}", percent(ms / total) if total else ""] for name, ms in ordered]
    print_table(["kernel", "ms", "% of all"], rows, title="Kernels of the default network")
