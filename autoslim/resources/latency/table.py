"""Latency: a table of kernels' times, and what it predicts for whole networks."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoslim.errors import UserError, first_line

FORMAT = 1
MIN_CORRELATION = 0.8
UNRELIABLE = (
    ": too low to search by. Either other work kept the machine busy meanwhile, or the time of so small a network "
    "hardly depends on its channels (raise latency.batch)"
)


@dataclass(frozen=True)
class KernelTimes:
    """A kernel's milliseconds over the channels it reads and writes.

    ``work`` says what it does, to be compared with the kernel of that name in a network that the table is used for.

    Its coordinates are the sums of the channels of the groups ``inputs`` and of ``outputs``; ``ms[i][j]`` is for
    ``input_sizes[i]`` and ``output_sizes[j]``, both ascending. Where there are no such groups, there is one size: 0.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    work: str
    _known: dict[tuple[int, int], float] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises:
        ValueError: the times are not those of the sizes.
        """
        for groups, sizes in ((self.inputs, self.input_sizes), (self.outputs, self.output_sizes)):
            if any(low >= high for low, high in itertools.pairwise(sizes)):
                raise ValueError(f"sizes {list(sizes)} do not ascend")
            if not groups and len(sizes) != 1:
                raise ValueError(f"sizes {list(sizes)} are of no group")
        if [len(row) for row in self.ms] != [len(self.output_sizes)] * len(self.input_sizes) or not self.ms[0]:
            raise ValueError(f"{len(self.input_sizes)} x {len(self.output_sizes)} sizes have other numbers of times")
        if not all(0 <= ms < math.inf for row in self.ms for ms in row):
            raise ValueError("a kernel's time is no number of milliseconds")

    def predict(self, channels: Mapping[str, int]) -> float:
        """Milliseconds: bilinear between the sizes measured, and beyond them as between the last two; never below 0."""
        at = (sum(channels[g] for g in self.inputs), sum(channels[g] for g in self.outputs))
        if at not in self._known:  # a search asks for the same few thousands of times
            row, across = _between(self.input_sizes, at[0])
            column, along = _between(self.output_sizes, at[1])
            first, second = self.ms[row], self.ms[min(row + 1, len(self.ms) - 1)]
            right = min(column + 1, len(first) - 1)
            near = first[column] + along * (first[right] - first[column])
            far = second[column] + along * (second[right] - second[column])
            self._known[at] = max(0.0, near + across * (far - near))
        return self._known[at]


def _between(sizes: Sequence[int], size: int) -> tuple[int, float]:
    """The place of the size measured below ``size``, and how far it is from there to the next one (1: at the next)."""
    if len(sizes) == 1:
        return 0, 0.0
    place = max((i for i, known in enumerate(sizes[:-1]) if known <= size), default=0)
    return place, (size - sizes[place]) / (sizes[place + 1] - sizes[place])


@dataclass(frozen=True)
class Target:
    """What a latency is measured on. Two equal targets give equal latencies, but for chance."""

    machine: str
    runtime: str
    device: str
    threads: int
    batch: int
    precision: str
    channels_last: bool
    versions: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}, " if self.device == "cpu" else ""
        layout = ", channels-last" if self.channels_last else ""
        return (
            f"{self.machine}, {self.runtime}, {threads}batch {self.batch}, {self.precision}{layout} ({self.versions})"
        )


@dataclass(frozen=True)
class Check:
    """How far predictions are from what was measured, on whole networks that the table was not fitted to.

    ``predicted`` and ``measured`` are milliseconds, network by network; errors are fractions of what was measured.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    median_error: float
    error_95: float
    rank_correlation: float

    def __post_init__(self) -> None:
        """Raises:
        ValueError: these are no such figures.
        """
        figures = (*self.predicted, *self.measured, self.median_error, self.error_95, self.rank_correlation)
        known = all(map(math.isfinite, figures)) and abs(self.rank_correlation) <= 1 + 1e-9
        if len(self.predicted) != len(self.measured) or not self.measured or not known:
            raise ValueError("the check's figures are not those of networks predicted and measured")

    @property
    def trusted(self) -> bool:
        return self.rank_correlation >= MIN_CORRELATION


@dataclass(frozen=True)
class LatencyTable:
    """The kernels' times on a target, and the line from their sum to a whole network's time.

    A network takes ``intercept`` + ``slope`` * (sum over its kernels) milliseconds: kernels alone have warmer caches,
    and a network has work between them.
    """

    network: str
    input_shape: tuple[int, ...]
    default: Mapping[str, int]
    target: Target
    kernels: Mapping[str, KernelTimes]
    slope: float = 1.0
    intercept: float = 0.0
    check: Check | None = None

    def __post_init__(self) -> None:
        """Raises:
        ValueError: there is no such network, or no such line.
        """
        if unknown := {g for times in self.kernels.values() for g in (*times.inputs, *times.outputs)} - {*self.default}:
            raise ValueError(f"kernels have channels of {min(unknown)}, which is no group")
        if not (0 <= self.slope < math.inf and -math.inf < self.intercept < math.inf):
            raise ValueError(f"a network takes {self.intercept} + {self.slope} of its kernels' time")

    @property
    def trusted(self) -> bool:
        """Whether its predictions were seen to rank networks as their measured times do."""
        return self.check is None or self.check.trusted

    def kernels_ms(self, channels: Mapping[str, int]) -> float:
        return sum(kernel.predict(channels) for kernel in self.kernels.values())

    def predict(self, channels: Mapping[str, int]) -> float:
        """Milliseconds of a whole network."""
        return self.intercept + self.slope * self.kernels_ms(channels)

    def summary(self) -> str:
        """What was measured, and how far predictions are off."""
        told = f"latency on {self.target}"
        if self.check is None:
            return told
        return (
            f"{told}: over {len(self.check.measured)} random networks the prediction is off by "
            f"{self.check.median_error:.1%} (median; 95 % are within {self.check.error_95:.1%}), "
            f"rank correlation {self.check.rank_correlation:.3f}{'' if self.check.trusted else UNRELIABLE}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        for kernel in values["kernels"].values():
            del kernel["_known"]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "LatencyTable":
        """What ``to_dict`` gave.

        Raises:
            UserError: it is no such table, or one of another format.
        """
        if values.get("format") != FORMAT:
            raise UserError(
                f"{source} is no latency table of format {FORMAT}; make one with `autoslim latency measure`"
            )
        try:
            check = values["check"]
            table = cls(
                network=values["network"],
                input_shape=tuple(values["input_shape"]),
                default=dict(values["default"]),
                target=Target(**values["target"]),
                kernels={name: _kernel_times(kernel) for name, kernel in values["kernels"].items()},
                slope=float(values["slope"]),
                intercept=float(values["intercept"]),
                check=None if check is None else Check(**{k: _frozen(v) for k, v in check.items()}),
            )
            table.summary()  # which reads the target and the check
            if not 0 < table.predict(table.default) < math.inf:
                raise ValueError("the default network takes no time")
            return table
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{source} is damaged ({first_line(error)}); make it again with `autoslim latency measure`"
            ) from error


def _kernel_times(values: Mapping[str, Any]) -> KernelTimes:
    return KernelTimes(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
