"""Latency of several functions that are measured in turns, so that other processes slow down all of them alike."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, quantiles
from typing import Any

from autoslim.resources.latency.measure import Latency

SLICE_S = 0.02
"""The shortest time that a function runs before it is the turn of the next one."""

MAX_TURNS = 20
MIN_TURNS = 5
_TOTAL_S = 1.0  # for each function: slower functions have fewer turns, but at least MIN_TURNS


def latencies_in_turns(runs: Sequence[Callable[[], Any]], finish: Callable[[], object] = lambda: None) -> list[Latency]:
    """Measures functions alternately.

    Args:
        runs: the functions. Each one is called twice before it is measured.
        finish: waits until the device has done the work that the calls have queued.

    Returns:
        Median and quartiles of each function's milliseconds, over blocks of runs.
    """

    def seconds(run: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        finish()
        return time.perf_counter() - start

    counts, slices = [], []
    for run in runs:
        seconds(run, 1)
        once = seconds(run, 1)
        counts.append(max(1, math.ceil(SLICE_S / once)))
        slices.append(max(SLICE_S, once))
    turns = min(MAX_TURNS, max(MIN_TURNS, round(_TOTAL_S / fmean(slices)))) if runs else 0
    blocks: list[list[float]] = [[] for _ in runs]
    for _ in range(turns):
        for run, count, found in zip(runs, counts, blocks, strict=True):
            found.append(1e3 * seconds(run, count) / count)
    result = []
    for found in blocks:
        low, middle, high = quantiles(found, method="inclusive")
        result.append(Latency(middle, low, high))
    return result
