"""``autoslim latency``: measures and shows latency tables."""

import dataclasses
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim.cli.terminal import (
    AsJson,
    Classes,
    ParamsFile,
    described_data,
    image_size,
    percent,
    prepared_info,
    print_facts,
    print_json,
    print_table,
)
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
    help="Measure a network's latency on this machine, for a search on any machine.\n\n"
    "Run `autoslim latency measure --to phone.json` on the machine that will run the network. Then set "
    "`latency.table: phone.json` in params.yaml for the search. For a machine without torch, `pack` writes a folder "
    "with a script that measures there, and `read` makes the table from its results.",
)


class Runtime(StrEnum):
    EAGER = "eager"
    COMPILE = "compile"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


Size = Annotated[
    str | None,
    typer.Option("--size", help="Height and width of the images (224 or 128x64). Default: data.image_size."),
]
ImageChannels = Annotated[
    int | None, typer.Option("--channels", min=1, max=3, help="Channels of the images. Default: data.channels.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Default: latency.threads.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Default: latency.batch.")]


@latency_app.command("measure")
@with_clear_errors
def measure_cli(
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="JSON file to write the table to.")],
    file: ParamsFile = Path("params.yaml"),
    classes: Classes = None,
    size: Size = None,
    channels: ImageChannels = None,
    runtime: Annotated[Runtime | None, typer.Option("--runtime", help="Default: latency.runtime.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="Default: latency.device.")] = None,
    threads: Threads = None,
    batch: Batch = None,
    precision: Annotated[Precision | None, typer.Option("--precision", help="Default: latency.precision.")] = None,
    channels_last: Annotated[
        bool | None,
        typer.Option("--channels-last/--no-channels-last", help="Memory layout. Default: latency.channels_last."),
    ] = None,
    points: Annotated[
        int | None,
        typer.Option("--points", min=2, help="Measured numbers of channels on each axis. Default: latency.points."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Measure the latency table of the network in params.yaml on this machine, and write it to FILE.

    The command times the network's kernels at the numbers of channels in the search grid, and then whole networks to
    determine the error of the predictions. It needs no data if --classes is set and the image size is set here or in
    params.yaml. Each run measures again, except that an interrupted run is continued. Do not run anything else on the
    machine at the same time.

    To use the table in a search on any machine, set latency.table: FILE in params.yaml there.

    Examples:

    autoslim latency measure --to here.json

    autoslim latency measure presets/imagenet-mobilenet_v2.yaml --to phone.json --classes 1000 --runtime onnxruntime
    """
    target = _new_file(to, force)
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
    table = measure(params, _images(params, classes, image_size(size) if size else None, channels), target)
    print(table.summary())
    shown = target.relative_to(root) if target.is_relative_to(root) else target
    print(_wrote(table, to, shown))


def _new_file(to: Path, force: bool) -> Path:
    """Returns the absolute path of the table to be written.

    Raises:
        UserError: the file exists and ``force`` is not set, or it cannot be written.
    """
    target = to.absolute()
    if target.is_dir():
        raise UserError(f"--to {to} is a folder; choose a file in it, such as {to / 'latency.json'}")
    if target.exists() and not force:
        raise UserError(f"--to {to} exists; choose another file, or replace it with --force")
    if not target.parent.is_dir():
        raise UserError(f"--to {to}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--to {to}: the folder {target.parent} is not writable; choose another folder")
    return target


def _wrote(table: "LatencyTable", to: Path, shown: Path) -> str:
    return (
        f"wrote {to} ({len(table.kernels)} kernels). To use it in a search, set latency.table: {shown} in params.yaml, "
        "and add the file to the deps of the stage resources in dvc.yaml"
    )


@latency_app.command("pack")
@with_clear_errors
def pack_cli(
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="New folder for the pack.")],
    file: ParamsFile = Path("params.yaml"),
    classes: Classes = None,
    size: Size = None,
    channels: ImageChannels = None,
    runtime: Annotated[
        Runtime | None, typer.Option("--runtime", help="onnxruntime or openvino. Default: latency.runtime.")
    ] = None,
    threads: Threads = None,
    batch: Batch = None,
    precision: Annotated[
        Precision | None, typer.Option("--precision", help="fp32 or int8. Default: latency.precision.")
    ] = None,
    points: Annotated[
        int | None,
        typer.Option("--points", min=2, help="Measured numbers of channels on each axis. Default: latency.points."),
    ] = None,
) -> None:
    """Write a folder that measures the network's latency on a machine without torch and autoslim.

    The folder has the network's kernels and some whole networks as ONNX models (OpenVINO IR for OpenVINO in int8), and
    a script that needs Python, numpy and the runtime. Copy the folder to the machine that will run the network, run
    `python measure.py` in it, copy its results.json back, and make the table with `autoslim latency read`.

    The weights are random. An interrupted command continues.

    Example:

    autoslim latency pack --to pack --runtime onnxruntime --precision int8
    """
    target = to.absolute()
    if target.exists() and not target.is_dir():
        raise UserError(f"--to {to} is a file; choose a new folder")
    if not target.parent.is_dir():
        raise UserError(f"--to {to}: the folder {target.parent} does not exist; create it first")
    _, path = enter_project_with(file)
    from autoslim.pipeline.params import load_params

    options = {
        "runtime": runtime,
        "threads": threads,
        "batch": batch,
        "precision": precision,
        "points": points,
    }
    params = with_options(load_params(path), options)
    pack(params, _images(params, classes, image_size(size) if size else None, channels), target)
    print(
        f"wrote {to}. Copy the folder to the machine that will run the network, run `python measure.py` in it, and "
        "copy its results.json back for `autoslim latency read`"
    )


def pack(params: "Params", info: "DataInfo", to: Path) -> None:
    """Writes a latency pack of the network for images of the size in ``info`` to the folder ``to``.

    Raises:
        UserError: The runtime runs only with torch, or the pack cannot be written.
    """
    from autoslim.pipeline.assembly import grid_spec, traced_network
    from autoslim.pipeline.checks import check_groups
    from autoslim.pipeline.costs import latency_device
    from autoslim.resources.latency.backends import OTHER_RUNTIMES, check_runtime
    from autoslim.resources.latency.pack import write_pack
    from autoslim.tasks.building import find_task

    latency = params.latency
    if latency.runtime not in OTHER_RUNTIMES:
        raise UserError(
            f"latency.runtime is {latency.runtime}, but the runtime of a pack is one of {', '.join(OTHER_RUNTIMES)}; "
            "set latency.runtime or --runtime"
        )
    device = latency_device(latency).partition(":")[0]
    check_runtime(latency.runtime, device, latency.precision, latency.channels_last, packed=True)
    network, graph = traced_network(params.model, info, find_task(params.task))
    check_groups(params.model.name, graph)
    write_pack(
        to,
        network,
        graph,
        graph.grid(grid_spec(params.supernet)),
        name=params.model.name,
        runtime=latency.runtime,
        precision=latency.precision,
        threads=latency.threads,
        batch=latency.batch,
        points=latency.points,
        check_networks=latency.check_networks,
    )


@latency_app.command("read")
@with_clear_errors
def read_cli(
    results: Annotated[
        Path, typer.Argument(help="The file results.json that a pack's script wrote, or the folder with it.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="JSON file to write the table to.")],
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Make the latency table from the results of a pack, and write it to FILE.

    Example:

    autoslim latency read pack/results.json --to phone.json
    """
    target = _new_file(to, force)
    from autoslim.files import write_sealed
    from autoslim.resources.latency.pack import read_results
    from autoslim.resources.latency.runner import RESULTS

    table = read_results(results / RESULTS if results.is_dir() else results)
    write_sealed(target, table.to_dict())
    print(table.summary())
    print(_wrote(table, to, to))


def with_options(params: "Params", options: dict[str, Any]) -> "Params":
    """Returns ``params`` with those ``options`` that are not None set in the section ``latency``.

    Raises:
        UserError: An option has a wrong value.
    """
    from autoslim.pipeline.params import check_params

    changes = {name: str(value) if isinstance(value, StrEnum) else value for name, value in options.items()}
    changes = {name: value for name, value in changes.items() if value is not None}
    values = params.model_dump()
    values["latency"] |= changes
    return check_params(values, f"the options {', '.join(changes)}") if changes else params


def _images(params: "Params", classes: int | None, size: tuple[int, int] | None, channels: int | None) -> "DataInfo":
    """Returns the description of the prepared data, modified by the options."""
    info, data = prepared_info(params), params.data
    if info is not None and classes is None and size is None and channels is None:
        return info
    if info is not None:
        classes, size, channels = classes or len(info.classes), size or info.image_size, channels or info.channels
    if classes is None:
        raise UserError(
            f"the number of classes of {data.source} is not known; run `dvc repro prepare`, or set --classes (for "
            "ImageNet --classes 1000)"
        )
    return described_data(
        params,
        classes=classes,
        size=size or data.size,
        channels=channels or data.channels,
        counts={},
        remedy="set --size and --channels, or run `dvc repro prepare`",
    )


def measure(params: "Params", info: "DataInfo", to: Path) -> "LatencyTable":
    """Measures the latency table of the network for images of the size in ``info``, and writes it to ``to``.

    Raises:
        UserError: The latency cannot be measured.
    """
    from autoslim.files import write_sealed
    from autoslim.pipeline.assembly import traced_network
    from autoslim.pipeline.checks import check_groups
    from autoslim.pipeline.costs import latency_target, measured_table
    from autoslim.tasks.building import find_task

    latency_target(params.latency)  # checks the device before the network is built
    network, graph = traced_network(params.model, info, find_task(params.task))
    check_groups(params.model.name, graph)
    table = measured_table(params, network, graph, anew=True)
    write_sealed(to, table.to_dict())
    return table


@latency_app.command("show")
@with_clear_errors
def show_cli(
    file: Annotated[Path, typer.Argument(help="Table from `autoslim latency measure`.")],
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE.png", help="Plot predicted against measured latency.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a latency table: the device, the error of its predictions, and the time of each kernel.

    The times are those of the default network. The times of the kernels and the time between them add up to its
    predicted latency.

    Example:

    autoslim latency show phone.json --figure phone.png
    """
    if figure is not None:
        if figure.suffix != ".png":
            raise UserError(f"--figure {figure} does not end in .png; rename it")
        if not figure.absolute().parent.is_dir():
            raise UserError(f"--figure {figure}: the folder {figure.absolute().parent} does not exist; create it first")
    from autoslim.pipeline.costs import read_table

    table = read_table(file)
    if figure is not None and table.check is None:
        raise UserError(f"{file} contains no comparison to plot; measure it again with `autoslim latency measure`")
    if as_json:
        print_json(shown_values(table))
    else:
        print_latency(table)
    if figure is not None:
        from autoslim.report.resource_figures import prediction_figure

        prediction_figure(figure, table, dpi=FIGURE_DPI)
        print(f"wrote {figure}", file=sys.stderr)


def shown_values(table: "LatencyTable") -> dict[str, Any]:
    """Returns what ``print_latency`` prints as values: times in milliseconds, errors and shares as fractions."""
    values: dict[str, Any] = {
        "network": table.network,
        "input_shape": list(table.input_shape),
        "target": dataclasses.asdict(table.target),
        "predicted_ms": table.predict(table.default),
        "kernels_ms": kernel_times(table),
        "weights_ms": table.weights_ms(table.default),
        "between_kernels_ms": table.intercept,
        "check": None,
    }
    if (check := table.check) is not None:
        values["check"] = {
            "measured_ms": list(check.measured),
            "predicted_ms": list(check.predicted),
            "median_error": check.median_error,
            "error_95": check.error_95,
            "within_5_percent": check.within(0.05),
            "within_10_percent": check.within(0.1),
            "rank_correlation": check.rank_correlation,
        }
    return values


def kernel_times(table: "LatencyTable") -> dict[str, float]:
    """Returns the time of each kernel of the default network in milliseconds, the slowest first."""
    times = {name: table.slope * kernel.predict(table.default) for name, kernel in table.kernels.items()}
    return dict(sorted(times.items(), key=lambda item: -item[1]))


def print_latency(table: "LatencyTable") -> None:
    target, total = table.target, table.predict(table.default)
    facts = [
        ("network", f"{table.network} on {'x'.join(map(str, table.input_shape))} images, {len(table.kernels)} kernels"),
        ("measured on", str(target)),
        ("default", f"{format_amount(total, 'latency')} predicted"),
    ]
    if (check := table.check) is not None:
        spans = f"{format_amount(min(check.measured), 'latency')} to {format_amount(max(check.measured), 'latency')}"
        facts += [
            ("checked on", f"{len(check.measured)} random networks, {spans}"),
            ("error", f"{check.median_error:.1%} (median); 95 % are within {check.error_95:.1%}"),
            ("within ±5 %, ±10 %", f"{check.within(0.05):.0%}, {check.within(0.1):.0%} of the networks"),
            ("rank correlation", f"{check.rank_correlation:.3f}"),
        ]
    print_facts(facts)
    print()
    ordered = list(kernel_times(table).items())
    if table.weight_ms:
        ordered.append(("(weights beyond the caches)", table.weights_ms(table.default)))
    ordered += [("(between the kernels)", table.intercept), ("(total)", total)]
    rows = [[name, f"{ms:.4g}", percent(ms / total) if total else ""] for name, ms in ordered]
    print_table(["kernel", "ms", "% of total"], rows, title="Kernels of the default network")
