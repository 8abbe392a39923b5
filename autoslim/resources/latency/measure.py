"""Measuring latency: of kernels, for a table, and of whole networks."""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.resize import resize
from autoslim.resources.latency.backends import prepared
from autoslim.resources.latency.kernels import Kernel, described, find_kernels
from autoslim.resources.latency.table import Check, KernelTimes, LatencyTable, Target
from autoslim.training.checkpoints import write_json
from autoslim.training.progress import Progress

KERNEL_SECONDS = 0.02
NETWORK_SECONDS = 0.5
LEAST_SAMPLES = 5
FITTED_ON = 12
"""Networks that the line from the kernels' sum to a network's time is fitted to."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass: the median over blocks of runs, and the quartiles."""

    median: float
    low: float
    high: float


def measure_latency(
    network: nn.Module, values: Sequence[Tensor], target: Target, seconds: float | None = None
) -> Latency:
    """How long ``network`` takes on ``values`` (one tensor for each input), run again and again for ``seconds``."""
    # Before the network is compiled: it is compiled for a number of threads.
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        return _timed(
            prepared(network, values, target), target.threads, NETWORK_SECONDS if seconds is None else seconds
        )
    finally:
        torch.set_num_threads(before)


def _timed(run: Callable[[], object], threads: int, seconds: float) -> Latency:
    from torch.utils.benchmark import Timer  # it looks for compilers and CUDA, and prints what it misses

    for _ in range(3):
        run()
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    times = timer.blocked_autorange(min_run_time=seconds).times
    while len(times) < LEAST_SAMPLES:  # one run of a slow network may be longer than that
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
    checked_on: int,
    kept: Path,
    seed: int = 0,
) -> LatencyTable:
    """Measures each kernel over the channel numbers of ``grid``, then whole networks to fit and to check the sum.

    Args:
        network: the default network.
        grid: each group's numbers of channels, from the widest down.
        points: numbers of channels measured on each axis of a kernel, spread over the grid; between them the time is
            interpolated. None: all.
        checked_on: random configurations whose prediction is compared with their measured time.
        kept: a file that holds the times of kernels measured so far; an interrupted measurement goes on from there.
        seed: of the random configurations.

    Raises:
        UserError: the network cannot be taken apart, or the runtime cannot run it.
    """
    kernels = find_kernels(network, graph, target.batch)
    plans = [_plan(kernel, grid, points) for kernel in kernels]
    known: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    times: dict[str, KernelTimes] = {}
    with Progress("latency of kernels", sum(len(rows) * len(columns) for rows, columns in plans), unit="point") as bar:
        for kernel, (rows, columns) in zip(kernels, plans, strict=True):
            ms = []
            for row, column in itertools.product(rows, columns):
                module, values = kernel.at({**row, **column})
                does = hashlib.sha256(described(module, values).encode()).hexdigest()[:16]
                if does not in known:  # networks repeat their blocks
                    known[does] = measure_latency(module, values, target, KERNEL_SECONDS).median
                ms.append(known[does])
                bar.advance()
            write_json(kept, known)
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
    return _checked(table, network, graph, grid, checked_on, seed)


def _plan(
    kernel: Kernel, grid: Mapping[str, Sequence[int]], points: int | None
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """The channels of a kernel's inputs, and of its outputs, that it is measured at, from the least up."""
    return _levels(kernel.inputs, grid, points), _levels(kernel.outputs, grid, points)


def _levels(groups: Sequence[str], grid: Mapping[str, Sequence[int]], points: int | None) -> list[dict[str, int]]:
    """Several groups go up together."""
    longest = max((len(grid[group]) for group in groups), default=1)
    count = longest if points is None else min(points, longest)
    levels: dict[int, dict[str, int]] = {}
    for number in range(count):
        share = 1 - number / max(1, count - 1)  # of the way down the grid
        at = {group: grid[group][round(share * (len(grid[group]) - 1))] for group in groups}
        levels.setdefault(sum(at.values()), at)
    return [levels[total] for total in sorted(levels)]


def random_configurations(grid: Mapping[str, Sequence[int]], count: int, seed: int) -> list[dict[str, int]]:
    """Configurations from the narrowest to the widest, each group up to a quarter of the grid off the others."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        middle = (number + draw.random()) / count
        found.append(
            {
                group: levels[round(min(1.0, max(0.0, middle + draw.uniform(-0.25, 0.25))) * (len(levels) - 1))]
                for group, levels in grid.items()
            }
        )
    draw.shuffle(found)
    return found


def _checked(
    table: LatencyTable,
    network: nn.Module,
    graph: ChannelGraph,
    grid: Mapping[str, Sequence[int]],
    checked_on: int,
    seed: int,
) -> LatencyTable:
    images = torch.ones(table.target.batch, *graph.input_shape)
    chosen = random_configurations(grid, FITTED_ON, seed) + random_configurations(grid, checked_on, seed + 1)
    measured = []
    with Progress("latency of networks", len(chosen), unit="network") as bar:
        for channels in chosen:
            measured.append(measure_latency(resize(network, graph, channels), [images], table.target).median)
            bar.advance()
    sums = [table.kernels_ms(channels) for channels in chosen]
    slope, intercept = fit_line(sums[:FITTED_ON], measured[:FITTED_ON])
    predicted = [intercept + slope * total for total in sums[FITTED_ON:]]
    return dataclasses.replace(
        table, slope=slope, intercept=intercept, check=prediction_check(predicted, measured[FITTED_ON:])
    )


def fit_line(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the line with the least squared relative errors; level where it would fall.

    It falls where the time hardly depends on the channels and chance decides: more work must not be said to be faster.
    """
    weights = 1 / np.asarray(measured)
    slope, intercept = np.polyfit(sums, measured, 1, w=weights)
    if slope <= 0:
        slope, intercept = 0.0, np.average(measured, weights=weights**2)
    return float(slope), float(intercept)


def prediction_check(predicted: Sequence[float], measured: Sequence[float]) -> Check:
    """The errors of predictions, and Spearman's rank correlation (0 where either are all the same)."""
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
    """The machine at hand, by its processor's or its GPU's name."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    versions = f"torch {torch.__version__}"
    if runtime == "onnxruntime":
        import onnxruntime

        versions += f", onnxruntime {onnxruntime.__version__}"
    return Target(machine, runtime, device.type, threads, batch, precision, channels_last, versions)


def processor() -> str:
    """The name of the machine's processor."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model"))]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
