"""What tracing writes down on its way through a network."""

from dataclasses import dataclass, field

from autoslim.networks.axes import Operation
from autoslim.networks.tracing.flow import Flow
from autoslim.networks.tracing.labels import Labels, Vector

IS_OUTPUT = "it is the network's output"
"""Why the classes must stay."""


@dataclass
class Call:
    """One convolution, linear layer or average pooling that ran, for the cost model (see ``graph.Layer``)."""

    name: str
    kind: str
    factor: int
    inputs: Vector | None  # labels of the input axis, for layers dense in it
    outputs: Vector
    positions: int
    weight: str | None


@dataclass
class Record:
    """Labels, the labels of every parameter's axes, and the calls that cost something.

    A parameter that a network has under several names is written down under the first.
    """

    first_name: dict[str, str]  # a parameter's or buffer's name -> the first name of the same tensor
    labels: Labels = field(default_factory=Labels)
    tensors: dict[str, dict[int, Vector]] = field(default_factory=dict)  # tensor -> axis -> labels
    modules: dict[str, tuple[Vector, Vector | None]] = field(default_factory=dict)  # path -> labels out, labels in
    calls: list[Call] = field(default_factory=list)
    depthwise: set[str] = field(default_factory=set)
    feeds: dict[str, Vector] = field(default_factory=dict)  # dense 1x1 convolution -> labels of its input
    fixed: dict[str, str] = field(default_factory=dict)  # layers without a rule, and why
    flows: dict[str, Flow] = field(default_factory=dict)  # operation -> where its output's channels lie
    operations: tuple[Operation, ...] = ()  # in evaluation mode, without their axes
    outputs: dict[str, Flow] = field(default_factory=dict)  # the flows of their outputs, and of the parts of these

    def index(self, tensor: str, axis: int, vector: Vector) -> None:
        """``tensor``'s ``axis`` is indexed by these channels; a tensor used twice serves the same channels twice."""
        tensor = self.first_name.get(tensor, tensor)
        axes = self.tensors.setdefault(tensor, {})
        if axis in axes:
            self.labels.unite(axes[axis], vector, f"{tensor} is used for channels that must stay")
        else:
            axes[axis] = vector
