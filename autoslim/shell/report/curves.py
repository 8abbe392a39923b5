"""Training curves as stages write them: CSV files with one line an epoch (and seed)."""

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Columns = Mapping[str, Sequence[float]]
"""Column name -> its values, line by line; NaN where a cell is empty."""


@dataclass(frozen=True)
class Band:
    """A quantity over the seeds, epoch by epoch: its mean, and the lowest and the highest seed."""

    epochs: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def read_curves(path: Path) -> dict[str, list[float]]:
    """The columns of a curves file. All of them hold numbers; an empty cell is NaN."""
    columns: dict[str, list[float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                columns.setdefault(name, []).append(float(cell) if cell else math.nan)
    return columns


def last_by_seed(curves: Columns, quantity: str) -> dict[int, float]:
    """Seed -> ``quantity`` at its last epoch."""
    seeds = (int(seed) for seed in curves["seed"])
    return dict(zip(seeds, curves[quantity], strict=True))  # in the order of epochs: the last one stays


def over_seeds(curves: Columns, quantity: str) -> Band:
    """``quantity`` by epoch over the seeds that have it; an epoch in which none has it is left out."""
    by_epoch: dict[float, list[float]] = defaultdict(list)
    for epoch, value in zip(curves["epoch"], curves[quantity], strict=True):
        if not math.isnan(value):
            by_epoch[epoch].append(value)
    epochs = sorted(by_epoch)
    values = [by_epoch[epoch] for epoch in epochs]
    return Band(epochs, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])
