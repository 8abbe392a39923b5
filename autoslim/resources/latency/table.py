"""Latency tables: times of kernels, from which the latency of whole networks is predicted."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoslim.errors import UserError, first_line

FORMAT = 1
MIN_CORRELATION = 0.8
"""Rank correlation of predicted and measured latencies below which a table is not reliable."""

UNRELIABLE = (
    ", which is too low for a search. Either other processes kept the machine busy during the measurement, or the "
    "network is so small that its latency hardly depends on its channels (raise latency.batch)"
)


@dataclass(frozen=True)
class KernelTimes:
    """Measured times of a kernel over the numbers of channels that it reads and writes.

    Attributes:
        inputs: groups whose channels the kernel reads.
        outputs: groups whose channels it writes.
        input_sizes: ascending sums of the channels of ``inputs``; (0,) without such groups.
        output_sizes: the same for ``outputs``.
        ms: ``ms[i][j]`` are the milliseconds at ``input_sizes[i]`` and ``output_sizes[j]``.
        work: description of the kernel's operations. It is compared with the kernel of the same name in a network that
            the table is used for.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    work: str
    _known: dict[tuple[int, int], float] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: the sizes or times are invalid.
        """
        for groups, sizes in ((self.inputs, self.input_sizes), (self.outputs, self.output_sizes)):
            if any(low >= high for low, high in itertools.pairwise(sizes)):
                raise ValueError(f"sizes {list(sizes)} are not ascending")
            if not groups and len(sizes) != 1:
                raise ValueError(f"sizes {list(sizes)} belong to no group")
        if [len(row) for row in self.ms] != [len(self.output_sizes)] * len(self.input_sizes) or not self.ms[0]:
            raise ValueError(f"the times do not match {len(self.input_sizes)} x {len(self.output_sizes)} sizes")
        if not all(0 <= ms < math.inf for row in self.ms for ms in row):
            raise ValueError("a time is negative or not finite")

    def predict(self, channels: Mapping[str, int]) -> float:
        """Returns the milliseconds by bilinear interpolation of the measured times, at least 0.

        Beyond the measured sizes, the two nearest ones are extrapolated.
        """
        sizes = (sum(channels[g] for g in self.inputs), sum(channels[g] for g in self.outputs))
        if sizes not in self._known:  # a search needs the same few values thousands of times
            row, across = _between(self.input_sizes, sizes[0])
            column, along = _between(self.output_sizes, sizes[1])
            first, second = self.ms[row], self.ms[min(row + 1, len(self.ms) - 1)]
            right = min(column + 1, len(first) - 1)
            near = first[column] + along * (first[right] - first[column])
            far = second[column] + along * (second[right] - second[column])
            self._known[sizes] = max(0.0, near + across * (far - near))
        return self._known[sizes]


def _between(sizes: Sequence[int], size: int) -> tuple[int, float]:
    """Returns the index of the measured size below ``size``, and the fraction of the way from it to the next one."""
    if len(sizes) == 1:
        return 0, 0.0
    index = max((i for i, measured in enumerate(sizes[:-1]) if measured <= size), default=0)
    return index, (size - sizes[index]) / (sizes[index + 1] - sizes[index])


@dataclass(frozen=True)
class Target:
    """Hardware, runtime and settings of a latency measurement.

    Latencies measured on equal targets differ only by noise.

    Attributes:
        machine: name of the processor or GPU.
        runtime: ``eager``, ``compile`` or ``onnxruntime``.
        device: ``cpu`` or ``cuda``.
        threads: threads of the CPU.
        batch: images of a forward pass.
        precision: ``fp32`` or ``bf16``.
        channels_last: whether tensors have the memory format channels-last.
        versions: versions of the libraries that run the network.
    """

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
    """Accuracy of a table's predictions for whole networks that it was not fitted to.

    Attributes:
        predicted: milliseconds of each network.
        measured: milliseconds of each network, in the same order.
        median_error: median of the errors, as fractions of the measured latency.
        error_95: 95 % quantile of the errors.
        rank_correlation: Spearman's rank correlation of predicted and measured latencies.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    median_error: float
    error_95: float
    rank_correlation: float

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: a value is missing, not finite or out of range.
        """
        values = (*self.predicted, *self.measured, self.median_error, self.error_95, self.rank_correlation)
        valid = all(map(math.isfinite, values)) and abs(self.rank_correlation) <= 1 + 1e-9
        if len(self.predicted) != len(self.measured) or not self.measured or not valid:
            raise ValueError("the check has missing or invalid values")

    @property
    def reliable(self) -> bool:
        return self.rank_correlation >= MIN_CORRELATION


@dataclass(frozen=True)
class LatencyTable:
    """Times of a network's kernels on a target, and the line that maps their sum to the latency of the whole network.

    The predicted latency is ``intercept`` + ``slope`` * (sum over the kernels) milliseconds. It differs from the sum
    because caches are warmer when a kernel runs alone, and because a network also does work between its kernels.

    Attributes:
        network: name of the network (``model.name``).
        input_shape: (C, H, W), see ``ChannelGraph.input_shape``.
        default: group -> channels of the default network.
        kernels: name -> times.
        check: accuracy of the predictions, if it was measured.
    """

    network: str
    input_shape: tuple[Any, ...]
    default: Mapping[str, int]
    target: Target
    kernels: Mapping[str, KernelTimes]
    slope: float = 1.0
    intercept: float = 0.0
    check: Check | None = None

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: a kernel refers to an unknown group, or the line is invalid.
        """
        if unknown := {g for times in self.kernels.values() for g in (*times.inputs, *times.outputs)} - {*self.default}:
            raise ValueError(f"kernels refer to {min(unknown)}, which is not a group")
        if not (0 <= self.slope < math.inf and -math.inf < self.intercept < math.inf):
            raise ValueError(f"slope {self.slope} or intercept {self.intercept} is invalid")

    @property
    def reliable(self) -> bool:
        """Whether predictions rank networks as measured latencies do. True for a table without a check."""
        return self.check is None or self.check.reliable

    def kernels_ms(self, channels: Mapping[str, int]) -> float:
        """Returns the sum of the kernels' predicted times."""
        return sum(kernel.predict(channels) for kernel in self.kernels.values())

    def predict(self, channels: Mapping[str, int]) -> float:
        """Returns the predicted milliseconds of a forward pass."""
        return self.intercept + self.slope * self.kernels_ms(channels)

    def summary(self) -> str:
        """Describes the target and the accuracy of the predictions."""
        title = f"latency on {self.target}"
        if self.check is None:
            return title
        return (
            f"{title}: over {len(self.check.measured)} random networks the prediction is off by "
            f"{self.check.median_error:.1%} (median; 95 % are within {self.check.error_95:.1%}), "
            f"rank correlation {self.check.rank_correlation:.3f}{'' if self.check.reliable else UNRELIABLE}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as values that JSON can store."""
        values = dataclasses.asdict(self)
        for kernel in values["kernels"].values():
            del kernel["_known"]
        return {"format": FORMAT, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "LatencyTable":
        """Restores a table from the values that ``to_dict`` returned.

        Args:
            source: the file's name for messages.

        Raises:
            UserError: the values are not a latency table, or have another format.
        """
        if values.get("format") != FORMAT:
            raise UserError(
                f"{source} is not a latency table of format {FORMAT}; make one with `autoslim latency measure`"
            )
        try:
            check = values["check"]
            table = cls(
                network=values["network"],
                input_shape=tuple(_frozen(size) for size in values["input_shape"]),
                default=dict(values["default"]),
                target=Target(**values["target"]),
                kernels={name: _kernel_times(kernel) for name, kernel in values["kernels"].items()},
                slope=float(values["slope"]),
                intercept=float(values["intercept"]),
                check=None if check is None else Check(**{k: _frozen(v) for k, v in check.items()}),
            )
            table.summary()  # raises if the target or the check has values of a wrong type
            if not 0 < table.predict(table.default) < math.inf:
                raise ValueError("the latency of the default network is not positive")
            return table
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"{source} is damaged ({first_line(error)}); measure it again with `autoslim latency measure`"
            ) from error


def _kernel_times(values: Mapping[str, Any]) -> KernelTimes:
    return KernelTimes(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
