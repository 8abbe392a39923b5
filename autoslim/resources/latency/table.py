"""Latency tables: times of kernels, from which the latency of whole networks is predicted."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoslim.errors import UserError, first_line

FORMAT = 1
WITHIN = {"within_5_percent": 0.05, "within_10_percent": 0.1}
"""Further values of a check in a table's file -> the error that they count."""

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
        weights: ``weights[i][j]`` is the number of the kernel's parameters there; empty in tables of earlier versions.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_sizes: tuple[int, ...]
    output_sizes: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]
    work: str
    weights: tuple[tuple[int, ...], ...] = ()
    _known: dict[tuple[int, int], tuple[float, float]] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

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
        for name, values in (("times", self.ms), ("weights", self.weights)):
            expected = [len(self.output_sizes)] * len(self.input_sizes)
            if (values or name == "times") and ([len(row) for row in values] != expected or not values[0]):
                raise ValueError(f"the {name} do not match {len(self.input_sizes)} x {len(self.output_sizes)} sizes")
        if not all(0 <= ms < math.inf for row in self.ms for ms in row):
            raise ValueError("a time is negative or not finite")
        if not all(0 <= count < math.inf for row in self.weights for count in row):
            raise ValueError("a number of weights is negative or not finite")

    def predict(self, channels: Mapping[str, int]) -> float:
        """Returns the milliseconds by bilinear interpolation of the measured times, at least 0.

        Beyond the measured sizes, the two nearest ones are extrapolated.
        """
        return self._at(channels)[0]

    def count_weights(self, channels: Mapping[str, int]) -> float:
        """Returns the number of parameters, by the same interpolation; 0 in tables of earlier versions."""
        return self._at(channels)[1]

    def _at(self, channels: Mapping[str, int]) -> tuple[float, float]:
        sizes = (sum(channels[g] for g in self.inputs), sum(channels[g] for g in self.outputs))
        if sizes not in self._known:  # a search needs the same few values thousands of times
            row, across = _between(self.input_sizes, sizes[0])
            column, along = _between(self.output_sizes, sizes[1])
            below, right = min(row + 1, len(self.input_sizes) - 1), min(column + 1, len(self.output_sizes) - 1)

            def between(values: Sequence[Sequence[float]]) -> float:
                first, second = values[row], values[below]
                near = first[column] + along * (first[right] - first[column])
                far = second[column] + along * (second[right] - second[column])
                return max(0.0, near + across * (far - near))

            self._known[sizes] = between(self.ms), between(self.weights) if self.weights else 0.0
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
        runtime: ``eager``, ``compile``, ``onnxruntime``, ``openvino`` or ``tensorrt``.
        device: ``cpu`` or ``cuda``.
        threads: threads of the CPU.
        batch: images of a forward pass.
        precision: ``fp32``, ``bf16`` or ``int8``.
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

    def within(self, error: float) -> float:
        """Returns the share of the networks whose prediction is off by at most ``error`` (0.1: ±10 %)."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return sum(abs(predicted / measured - 1) <= error for predicted, measured in pairs) / len(self.measured)

    @property
    def reliable(self) -> bool:
        return self.rank_correlation >= MIN_CORRELATION


@dataclass(frozen=True)
class LatencyTable:
    """Times of a network's kernels on a target, and how their sum maps to the latency of the whole network.

    The predicted latency is ``intercept`` + ``slope`` * (sum over the kernels) + ``weight_ms`` * (weights of the
    network beyond ``cached_weights``) milliseconds. It differs from the sum because a runtime converts the inputs and
    outputs of a kernel that runs alone, because a network also does work between its kernels, and because a kernel's
    weights stay in the caches when it runs alone, but those of a large network do not.

    Attributes:
        network: name of the network (``model.name``).
        input_shape: (C, H, W), see ``ChannelGraph.input_shape``.
        default: group -> channels of the default network.
        kernels: name -> times.
        weight_ms: milliseconds of a weight beyond ``cached_weights``; 0 if that has no clear effect on the latency.
        check: accuracy of the predictions, if it was measured.
    """

    network: str
    input_shape: tuple[Any, ...]
    default: Mapping[str, int]
    target: Target
    kernels: Mapping[str, KernelTimes]
    slope: float = 1.0
    intercept: float = 0.0
    weight_ms: float = 0.0
    cached_weights: float = 0.0
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
        if not (0 <= self.weight_ms < math.inf and 0 <= self.cached_weights < math.inf):
            raise ValueError(f"weight_ms {self.weight_ms} or cached_weights {self.cached_weights} is invalid")

    @property
    def reliable(self) -> bool:
        """Whether predictions rank networks as measured latencies do. True for a table without a check."""
        return self.check is None or self.check.reliable

    def kernels_ms(self, channels: Mapping[str, int]) -> float:
        """Returns the sum of the kernels' predicted times."""
        return sum(kernel.predict(channels) for kernel in self.kernels.values())

    def predict(self, channels: Mapping[str, int]) -> float:
        """Returns the predicted milliseconds of a forward pass."""
        return self.intercept + self.slope * self.kernels_ms(channels) + self.weights_ms(channels)

    def count_weights(self, channels: Mapping[str, int]) -> float:
        """Returns the number of parameters of all kernels."""
        return sum(kernel.count_weights(channels) for kernel in self.kernels.values())

    def weights_ms(self, channels: Mapping[str, int]) -> float:
        """Returns the milliseconds for the weights that the caches cannot keep."""
        if not self.weight_ms:
            return 0.0
        return self.weight_ms * max(0.0, self.count_weights(channels) - self.cached_weights)

    def summary(self) -> str:
        """Describes the target and the accuracy of the predictions."""
        title = f"latency on {self.target}"
        if self.check is None:
            return title
        return (
            f"{title}: over {len(self.check.measured)} random networks the prediction is off by "
            f"{self.check.median_error:.1%} (median; 95 % are within {self.check.error_95:.1%}), "
            f"{self.check.within(0.05):.0%} are within ±5 % and {self.check.within(0.1):.0%} within ±10 %, "
            f"rank correlation {self.check.rank_correlation:.3f}{'' if self.check.reliable else UNRELIABLE}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as values that JSON can store."""
        values = dataclasses.asdict(self)
        for kernel in values["kernels"].values():
            del kernel["_known"]
        if self.check is not None:
            values["check"] |= {name: self.check.within(error) for name, error in WITHIN.items()}
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
                input_shape=tuple(frozen(size) for size in values["input_shape"]),
                default=dict(values["default"]),
                target=Target(**values["target"]),
                kernels={name: _kernel_times(kernel) for name, kernel in values["kernels"].items()},
                slope=float(values["slope"]),
                intercept=float(values["intercept"]),
                weight_ms=float(values.get("weight_ms", 0.0)),  # tables of earlier versions have none
                cached_weights=float(values.get("cached_weights", 0.0)),
                check=None
                if check is None
                else Check(**{k: frozen(v) for k, v in check.items() if k not in WITHIN}),  # these are computed
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
    return KernelTimes(**{name: frozen(value) for name, value in values.items()})


def frozen(value: Any) -> Any:
    """Returns ``value`` with tuples instead of lists."""
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value
