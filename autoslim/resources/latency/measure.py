"""Latency measurement of kernels, for latency tables, and of whole networks."""

import dataclasses
import hashlib
import itertools
import os
import platform
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.inputs import Arguments
from autoslim.channels.resize import resize
from autoslim.errors import first_line
from autoslim.files import parse_json, unsealed, write_sealed
from autoslim.resources.latency.backends import prepare_forward
from autoslim.resources.latency.kernels import Kernel, describe_kernel, find_kernels
from autoslim.resources.latency.table import Check, KernelTimes, LatencyTable, Target
from autoslim.training.progress import Progress

KERNEL_SECONDS = 0.02
NETWORK_SECONDS = 0.5
MIN_SAMPLES = 5
FITTED_ON = 12
"""Number of networks to which the line from the sum of the kernels' times to the latency is fitted."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass: median, lower and upper quartile over blocks of runs."""

    median: float
    low: float
    high: float


def measure_latency(
    network: nn.Module, values: Arguments | Sequence[Tensor], target: Target, seconds: float | None = None
) -> Latency:
    """Measures the latency of ``network`` on ``values`` (see ``prepare_forward``), by running it for ``seconds``.

    The number of torch's threads is restored afterwards.
    """
    # Set before the network is compiled, because it is compiled for this number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        forward = prepare_forward(network, values, target)
        return _time(forward, target.threads, NETWORK_SECONDS if seconds is None else seconds)
    finally:
        torch.set_num_threads(before)


def _time(run: Callable[[], object], threads: int, seconds: float) -> Latency:
    from torch.utils.benchmark import Timer  # searches for compilers and CUDA and prints what is missing

    for _ in range(3):
        run()
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    times = timer.blocked_autorange(min_run_time=seconds).times
    while len(times) < MIN_SAMPLES:  # a single run of a slow network may take longer than ``seconds``
        times.append(timer.timeit(1).mean)
    times = [1e3 * time for time in times]
    low, high = np.quantile(times, [0.25, 0.75])
    return Latency(median(times), float(low), float(high))


def measure_table(
    network: nn.Module,
    graph: ChannelGraph,
    grid: Mapping[str, Sequence[int]],
    target: Target,
    *,
    name: str,
    points: int | None,
    check_networks: int,
    cache: Path,
    seed: int = 0,
) -> LatencyTable:
    """Measures each kernel over the grid, then whole networks to fit and to check the predictions.

    Args:
        network: the default network.
        grid: each group's numbers of channels in descending order.
        name: name of the network.
        points: numbers of channels measured along each axis of a kernel, spread over the grid; None measures all. Times
            in between are interpolated.
        check_networks: number of random configurations whose predicted and measured latencies are compared.
        cache: a JSON file of measured kernels. An interrupted measurement continues from it.
        seed: seed of the random configurations.

    Raises:
        UserError: the network cannot be split into kernels, or the runtime cannot run it.
    """
    kernels = find_kernels(network, graph, target.batch)
    plans = [_plan(kernel, grid, points) for kernel in kernels]
    measured = _measured(cache)
    times: dict[str, KernelTimes] = {}
    with Progress("latency of kernels", sum(len(rows) * len(columns) for rows, columns in plans), unit="point") as bar:
        for kernel, (rows, columns) in zip(kernels, plans, strict=True):
            ms = []
            for row, column in itertools.product(rows, columns):
                module, values = kernel.at({**row, **column})
                key = hashlib.sha256(describe_kernel(module, values).encode()).hexdigest()[:16]
                if key not in measured:  # networks repeat their blocks
                    measured[key] = measure_latency(module, values, target, KERNEL_SECONDS).median
                ms.append(measured[key])
                bar.advance()
            write_sealed(cache, measured)
            width = len(columns)
            times[kernel.name] = KernelTimes(
                kernel.inputs,
                kernel.outputs,
                tuple(sum(row.values()) for row in rows),
                tuple(sum(column.values()) for column in columns),
                tuple(tuple(ms[start : start + width]) for start in range(0, len(ms), width)),
                kernel.work,
            )
    table = LatencyTable(name, graph.input_shape, graph.default, target, times)
    return _fitted_and_checked(table, network, graph, grid, check_networks, seed)


def _measured(cache: Path) -> dict[str, float]:
    """Returns the times that an interrupted measurement stored; {} if there are none or the file is damaged."""
    if not cache.exists():
        return {}
    try:
        measured = unsealed(parse_json(cache.read_text()))
        if not all(isinstance(ms, float) for ms in measured.values()):
            raise ValueError("it has other values than times")
    except (ValueError, AttributeError, TypeError, OSError) as error:
        print(f"{cache} cannot be used ({first_line(error)}); measuring again", file=sys.stderr)
        return {}
    return measured


def _plan(
    kernel: Kernel, grid: Mapping[str, Sequence[int]], points: int | None
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Returns the channels of a kernel's inputs and of its outputs at which it is measured, in ascending order."""
    return _levels(kernel.inputs, grid, points), _levels(kernel.outputs, grid, points)


def _levels(groups: Sequence[str], grid: Mapping[str, Sequence[int]], points: int | None) -> list[dict[str, int]]:
    """Returns channels of ``groups`` spread over the grid, in ascending order. All groups increase together."""
    longest = max((len(grid[group]) for group in groups), default=1)
    count = longest if points is None else min(points, longest)
    levels: dict[int, dict[str, int]] = {}
    for index in range(count):
        position = 1 - index / max(1, count - 1)  # in the grid: 0 is the widest, 1 the narrowest
        channels = {group: grid[group][round(position * (len(grid[group]) - 1))] for group in groups}
        levels.setdefault(sum(channels.values()), channels)
    return [levels[total] for total in sorted(levels)]


def random_configurations(grid: Mapping[str, Sequence[int]], count: int, seed: int) -> list[dict[str, int]]:
    """Draws configurations between the narrowest and the widest, in random order.

    Within a configuration, the position of each group in the grid deviates by up to a quarter from a common one.
    """
    generator = random.Random(seed)
    configurations = []
    for index in range(count):
        middle = (index + generator.random()) / count
        configurations.append(
            {
                group: levels[round(min(1.0, max(0.0, middle + generator.uniform(-0.25, 0.25))) * (len(levels) - 1))]
                for group, levels in grid.items()
            }
        )
    generator.shuffle(configurations)
    return configurations


def _fitted_and_checked(
    table: LatencyTable,
    network: nn.Module,
    graph: ChannelGraph,
    grid: Mapping[str, Sequence[int]],
    check_networks: int,
    seed: int,
) -> LatencyTable:
    """Measures random networks, fits the table's line to the first ones and compares predictions for the others."""
    images = graph.inputs.ones(table.target.batch)
    configurations = random_configurations(grid, FITTED_ON, seed) + random_configurations(
        grid, check_networks, seed + 1
    )
    measured = []
    with Progress("latency of networks", len(configurations), unit="network") as bar:
        for channels in configurations:
            plain = resize(network, graph, channels, seed=None)
            measured.append(measure_latency(plain, images, table.target).median)
            bar.advance()
    sums = [table.kernels_ms(channels) for channels in configurations]
    slope, intercept = fit_line(sums[:FITTED_ON], measured[:FITTED_ON])
    predicted = [intercept + slope * total for total in sums[FITTED_ON:]]
    return dataclasses.replace(
        table, slope=slope, intercept=intercept, check=prediction_check(predicted, measured[FITTED_ON:])
    )


def fit_line(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Returns slope and intercept of the line with the least squared relative errors.

    The slope is 0 if the fitted one would be negative. That happens by chance if the latency hardly depends on the
    channels, and more work must not be predicted to be faster.
    """
    weights = 1 / np.asarray(measured)
    slope, intercept = np.polyfit(sums, measured, 1, w=weights)
    if slope <= 0:
        slope, intercept = 0.0, np.average(measured, weights=weights**2)
    return float(slope), float(intercept)


def prediction_check(predicted: Sequence[float], measured: Sequence[float]) -> Check:
    """Returns the errors of predictions and Spearman's rank correlation (0 if one of the two is constant)."""
    from scipy.stats import spearmanr

    errors = np.abs(np.asarray(predicted) / np.asarray(measured) - 1)
    return Check(
        tuple(predicted),
        tuple(measured),
        float(np.median(errors)),
        float(np.quantile(errors, 0.95)),
        float(spearmanr(predicted, measured).statistic) if min(len({*predicted}), len({*measured})) > 1 else 0.0,
    )


def current_target(
    *, device: torch.device, runtime: str, threads: int, batch: int, precision: str, channels_last: bool
) -> Target:
    """Returns the target for these settings on this machine, with the name of its processor or GPU."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    versions = f"torch {torch.__version__}"
    if runtime == "onnxruntime":
        import onnxruntime

        versions += f", onnxruntime {onnxruntime.__version__}"
    return Target(machine, runtime, device.type, threads, batch, precision, channels_last, versions)


def processor() -> str:
    """Returns the name of this machine's processor."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model"))]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
