"""Latency packs: models of kernels and networks that a machine without torch measures, and the table of their times."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.inputs import Arguments
from autoslim.channels.resize import resize
from autoslim.errors import UserError, first_line
from autoslim.files import os_error, parse_json, write_bytes
from autoslim.resources.latency import runner
from autoslim.resources.latency.backends import OTHER_RUNTIMES
from autoslim.resources.latency.measure import (
    checked_configurations,
    count_parameters,
    fitted_and_checked,
    in_rows,
    kernel_key,
    kernel_plans,
)
from autoslim.resources.latency.onnx_models import export_reason, write_model
from autoslim.resources.latency.table import KernelTimes, LatencyTable, Target, frozen
from autoslim.training.progress import Progress

SCRIPT = "measure.py"
MODELS = "models"


def write_pack(
    folder: Path,
    network: nn.Module,
    graph: ChannelGraph,
    grid: Mapping[str, Sequence[int]],
    *,
    name: str,
    runtime: str,
    precision: str,
    threads: int,
    batch: int,
    points: int | None,
    check_networks: int,
    seed: int = 0,
) -> None:
    """Writes the kernels and networks of a latency table as models, and a script that measures them.

    Models have random weights, which they share. Models that an interrupted call wrote are kept.

    Args:
        folder: is created if it does not exist.
        network: the default network, on the CPU.
        runtime: see ``OTHER_RUNTIMES``. In fp32, the models also run on the other runtimes.
        threads: number of threads that the script uses if it is not given another.

    For the other arguments, see ``measure_table``.

    Raises:
        UserError: the folder has other contents, or the network cannot be divided into kernels, exported or quantised.
    """
    plans = kernel_plans(network, graph, grid, batch, points)
    configurations = checked_configurations(grid, check_networks, seed)
    suffix = ".xml" if (runtime, precision) == ("openvino", "int8") else ".onnx"
    points_of: dict[str, tuple[int, dict[str, int]]] = {}  # file -> index of its kernel, and channels
    kernels: dict[str, dict[str, Any]] = {}
    for index, plan in enumerate(plans):
        files, weights = [], []
        for channels in plan:
            module, ones = plan.kernel.at(channels)
            files.append(f"{MODELS}/kernel-{kernel_key(module, ones)}{suffix}")
            weights.append(count_parameters(module))
            points_of.setdefault(files[-1], (index, channels))
        values = dataclasses.asdict(plan.times([0.0] * len(files), weights))
        del values["_known"], values["ms"]
        kernels[plan.kernel.name] = {**values, "files": files}
    network_files: list[str] = []
    networks: dict[str, dict[str, int]] = {}  # file -> channels; a small grid has equal configurations
    for number, channels in enumerate(configurations):
        same = [file for file, other in networks.items() if other == channels]
        network_files.append(same[0] if same else f"{MODELS}/network-{number:03}{suffix}")
        networks.setdefault(network_files[-1], channels)
    others = [other for other in OTHER_RUNTIMES if precision == "fp32" and other != runtime]
    contents = {
        "format": runner.FORMAT,
        "runtimes": [runtime, *others],
        "threads": threads,
        "files": {"kernels": [*points_of], "networks": [*networks]},
        "table": {
            "network": name,
            "input_shape": list(graph.input_shape),
            "default": dict(graph.default),
            "batch": batch,
            "precision": precision,
            "kernels": kernels,
            "networks": configurations,
            "network_files": network_files,
        },
    }
    _begin(folder, contents)
    done = sum((folder / file).exists() for file in (*points_of, *networks))  # by an interrupted command
    with Progress("latency pack", len(points_of) + len(networks), unit="model", done=done) as bar:
        for file, (index, channels) in points_of.items():
            if (folder / file).exists():
                continue
            module, ones = plans[index].kernel.at(channels)
            _write(folder / file, module, Arguments.of(tuple(ones)), runtime, precision)
            bar.advance()
        for file, channels in networks.items():
            if (folder / file).exists():
                continue
            plain = resize(network, graph, channels, seed=None).eval()
            _write(folder / file, plain, graph.inputs.ones(batch), runtime, precision)
            bar.advance()
    write_bytes(folder / SCRIPT, Path(runner.__file__).read_bytes())
    write_bytes(folder / "README.md", _readme(contents).encode())


def _begin(folder: Path, contents: Mapping[str, Any]) -> None:
    """Writes the plan, or checks that the folder has the same one."""
    plan, text = folder / runner.PLAN, json.dumps(contents)
    if folder.is_dir() and any(folder.iterdir()) and (not plan.is_file() or plan.read_text(encoding="utf-8") != text):
        raise UserError(f"{folder} has other contents; choose a new folder, or delete it first")
    if (folder / SCRIPT).exists():
        raise UserError(f"{folder} is a complete pack already; choose a new folder, or delete it first")
    (folder / MODELS).mkdir(parents=True, exist_ok=True)
    write_bytes(plan, text.encode())


def _write(file: Path, network: nn.Module, inputs: Arguments, runtime: str, precision: str) -> None:
    try:
        written = write_model(network, inputs, file.with_suffix(""), runtime, precision, share=True)
        assert written == file
    except OSError as error:  # such as a full disk
        raise os_error(error, file) or error from error
    except UserError:
        raise
    except Exception as error:  # the exporter and the quantisers raise exceptions of many classes
        title = OTHER_RUNTIMES[runtime].title
        raise UserError(
            f"a part of the network cannot be exported for {title} in {precision} ({export_reason(error)}); choose "
            "another runtime or precision"
        ) from error


def _readme(contents: Mapping[str, Any]) -> str:
    runtimes, table = contents["runtimes"], contents["table"]
    kernels, networks = (len(contents["files"][kind]) for kind in ("kernels", "networks"))
    others = f" or another of {', '.join(runtimes[1:])} (with --runtime)" if runtimes[1:] else ""
    return f"""# Latency pack

Kernels ({kernels}) and whole networks ({networks}) of {table["network"]} with different numbers of channels, in
{table["precision"]}, batch {table["batch"]}. Their weights are random.

On the machine that will run the network, with Python, numpy and {runtimes[0]}{others}:

    pip install numpy {runtimes[0]}
    python {SCRIPT}                  # {contents["threads"]} thread(s); --threads sets another number

Leave the machine otherwise idle. An interrupted run continues where it stopped. The run writes `{runner.RESULTS}`.
Copy this file to the machine with autoslim:

    autoslim latency read {runner.RESULTS} --to device.json

and set `latency.table: device.json` in params.yaml.
"""


def read_results(path: Path) -> LatencyTable:
    """Returns the latency table of the results that a pack's script wrote.

    Raises:
        UserError: the file does not exist, is damaged or incomplete, or has another format.
    """
    remedy = f"run {SCRIPT} of the pack (again), and copy {runner.RESULTS}"
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); {remedy}") from error
    if not isinstance(values, dict) or "ms" not in values or values.get("format") != runner.FORMAT:
        raise UserError(f"{path} has no results of a latency pack of format {runner.FORMAT}; {remedy}")
    try:
        plan, target = values["plan"], values["target"]
        table = plan["table"]
        names = [name for kind in ("kernels", "networks") for name in plan["files"][kind]]
        missing = [name for name in names if len(values["ms"].get(name, ())) < runner.ROUNDS]
        if missing:
            raise UserError(
                f"{path} is incomplete: {len(missing)} of {len(names)} models are not measured; run {SCRIPT} of the "
                "pack again, which continues"
            )
        ms = {name: float(median(values["ms"][name])) for name in names}
        kernels = {name: _kernel_times(kernel, ms) for name, kernel in table["kernels"].items()}
        device = OTHER_RUNTIMES[target["runtime"]].device
        found = LatencyTable(
            table["network"],
            frozen(table["input_shape"]),
            table["default"],
            Target(device=device, batch=table["batch"], precision=table["precision"], channels_last=False, **target),
            kernels,
        )
        networks = [ms[name] for name in table["network_files"]]
        found = fitted_and_checked(found, table["networks"], networks)
        return LatencyTable.from_dict(json.loads(json.dumps(found.to_dict())), str(path))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); {remedy}") from error


def _kernel_times(values: Mapping[str, Any], ms: Mapping[str, float]) -> KernelTimes:
    rows = in_rows([ms[name] for name in values["files"]], len(values["output_sizes"]))
    return KernelTimes(ms=rows, **{name: frozen(value) for name, value in values.items() if name != "files"})
