"""Latency measurement of kernels, for latency tables, and of whole networks."""

import dataclasses
import hashlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.inputs import Arguments
from autoslim.channels.resize import resize
from autoslim.errors import first_line
from autoslim.files import parse_json, unsealed, write_sealed
from autoslim.resources.latency import runner
from autoslim.resources.latency.backends import prepare_forward
from autoslim.resources.latency.kernels import Kernel, describe_kernel, find_kernels
from autoslim.resources.latency.runner import processor as processor
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
    plans = kernel_plans(network, graph, grid, target.batch, points)
    measured = _measured(cache)
    times: dict[str, KernelTimes] = {}
    known = _known_points(plans, measured)
    with Progress("latency of kernels", sum(map(len, plans)), unit="point", done=known) as bar:
        for plan in plans:
            ms, weights = [], []
            for channels in plan:
                module, values = plan.kernel.at(channels)
                key = kernel_key(module, values)
                if key not in measured:  # networks repeat their blocks
                    measured[key] = measure_latency(module, values, target, KERNEL_SECONDS).median
                ms.append(measured[key])
                weights.append(count_parameters(module))
                known -= 1
                if known < 0:
                    bar.advance()
            write_sealed(cache, measured)
            times[plan.kernel.name] = plan.times(ms, weights)
    table = LatencyTable(name, graph.input_shape, graph.default, target, times)
    images = graph.inputs.ones(target.batch)
    configurations = checked_configurations(grid, check_networks, seed)
    latencies = []
    with Progress("latency of networks", len(configurations), unit="network") as bar:
        for channels in configurations:
            plain = resize(network, graph, channels, seed=None)
            latencies.append(measure_latency(plain, images, target).median)
            bar.advance()
    return fitted_and_checked(table, configurations, latencies)


@dataclass(frozen=True)
class KernelPlan:
    """A kernel, and the channels of its inputs and of its outputs at which it is measured, in ascending order."""

    kernel: Kernel
    rows: list[dict[str, int]]
    columns: list[dict[str, int]]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yields the channels of each measured point, row by row."""
        for row, column in itertools.product(self.rows, self.columns):
            yield {**row, **column}

    def times(self, ms: Sequence[float], weights: Sequence[int]) -> KernelTimes:
        """Returns the kernel's times, given the milliseconds and the numbers of parameters of each point in order."""
        return KernelTimes(
            self.kernel.inputs,
            self.kernel.outputs,
            tuple(sum(row.values()) for row in self.rows),
            tuple(sum(column.values()) for column in self.columns),
            in_rows(ms, len(self.columns)),
            self.kernel.work,
            in_rows(weights, len(self.columns)),
        )


T = TypeVar("T")


def in_rows(values: Sequence[T], width: int) -> tuple[tuple[T, ...], ...]:
    """Returns ``values`` in rows of ``width``."""
    return tuple(tuple(values[start : start + width]) for start in range(0, len(values), width))


def count_parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def kernel_plans(
    network: nn.Module, graph: ChannelGraph, grid: Mapping[str, Sequence[int]], batch: int, points: int | None
) -> list[KernelPlan]:
    """Returns what is measured of each kernel. For ``points`` and errors see ``measure_table``."""
    return [
        KernelPlan(kernel, _levels(kernel.inputs, grid, points), _levels(kernel.outputs, grid, points))
        for kernel in find_kernels(network, graph, batch)
    ]


def kernel_key(module: nn.Module, values: Sequence[Tensor]) -> str:
    """Returns a key that is equal for kernels that do the same on the same shapes."""
    return hashlib.sha256(describe_kernel(module, values).encode()).hexdigest()[:16]


def _known_points(plans: Iterable[KernelPlan], measured: Mapping[str, float]) -> int:
    """Returns how many points an interrupted measurement has measured before the first that it has not."""
    points = (plan.kernel.at(channels) for plan in plans for channels in plan)
    return sum(1 for _ in itertools.takewhile(lambda point: kernel_key(*point) in measured, points))


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


def checked_configurations(grid: Mapping[str, Sequence[int]], check_networks: int, seed: int) -> list[dict[str, int]]:
    """Returns the networks that a table is fitted to (the first ``FITTED_ON``), and those that it is checked on."""
    return random_configurations(grid, FITTED_ON, seed) + random_configurations(grid, check_networks, seed + 1)


def fitted_and_checked(
    table: LatencyTable, configurations: Sequence[Mapping[str, int]], measured: Sequence[float]
) -> LatencyTable:
    """Fits the table's coefficients to the first of ``checked_configurations``, and predicts the others.

    Args:
        measured: milliseconds of each configuration.
    """
    fitted, checked = configurations[:FITTED_ON], configurations[FITTED_ON:]
    sums = [table.kernels_ms(channels) for channels in fitted]
    slope, intercept = fit_line(sums, measured[:FITTED_ON])
    table = dataclasses.replace(table, slope=slope, intercept=intercept)
    bent = fit_weights(sums, [table.count_weights(channels) for channels in fitted], measured[:FITTED_ON])
    if bent is not None:
        slope, intercept, weight_ms, cached = bent
        table = dataclasses.replace(table, slope=slope, intercept=intercept, weight_ms=weight_ms, cached_weights=cached)
    predicted = [table.predict(channels) for channels in checked]
    return dataclasses.replace(table, check=prediction_check(predicted, measured[FITTED_ON:]))


def fit_weights(
    sums: Sequence[float], weights: Sequence[float], measured: Sequence[float]
) -> tuple[float, float, float, float] | None:
    """Fits latency = intercept + slope * sum + weight_ms * max(0, weights - cached_weights) to networks.

    The weights of networks larger than the caches are read from memory in each pass, and those of a kernel that is
    measured alone are not. ``cached_weights`` is the number of weights of that network with which the squared relative
    errors are least.

    Args:
        sums: milliseconds of all kernels of each network.
        weights: number of weights of each network.
        measured: milliseconds of each network.

    Returns:
        slope, intercept, weight_ms and cached_weights, of which only the intercept may be negative; None if the squared
        relative errors are more than half of those of ``fit_line``, because then the difference may be noise.
    """
    from scipy.optimize import lsq_linear

    scale = 1 / np.asarray(measured)
    slope, intercept = fit_line(sums, measured)
    best = 0.5 * float(np.sum(((intercept + slope * np.asarray(sums)) * scale - 1) ** 2))
    found = None
    for cached in sorted(set(weights))[1:-2]:  # with two networks or more on each side
        beyond = np.maximum(0, np.asarray(weights) - cached)
        terms = np.stack([np.ones(len(sums)), np.asarray(sums), beyond / max(1.0, beyond.max())], axis=1)
        fit = lsq_linear(terms * scale[:, None], np.ones(len(sums)), ([-np.inf, 0, 0], np.inf))
        if 2 * fit.cost < best:
            best = 2 * fit.cost
            intercept, slope, weight_ms = map(float, fit.x)
            found = slope, intercept, weight_ms / max(1.0, float(beyond.max())), float(cached)
    return found


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
    if runtime in runner.RUNTIMES:
        versions += f", {runner.version(runtime)}"
    return Target(machine, runtime, device.type, threads, batch, precision, channels_last, versions)
