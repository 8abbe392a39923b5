"""The interface of a task: its losses, the scores of samples, its metrics, and how they are named and written."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from autoslim.data.prepared import DataInfo, PreparedData
from autoslim.data.structure import in_words, not_finite
from autoslim.errors import UserError
from autoslim.tasks.measure import Measure


@dataclass(frozen=True)
class Score:
    """The mean error and the mean loss of a network over ``images`` samples; see ``Task.sample_scores``."""

    error: float
    loss: float
    images: int = 0


class Metric(Protocol):
    """A metric that collects batches. Those of torchmetrics are of this form."""

    def update(self, *values: Any) -> object: ...

    def compute(self) -> Any: ...


class Task(ABC):
    """What networks are trained for: the losses of training, the scores of the search, and the metrics of the report.

    Derive a class from this one, or from a built-in task, to train for something else. Its constructor has no
    arguments. Outputs and targets have any structure; the targets are those of the data set, collated to a batch.

    Attributes:
        name: name of the task, in files and messages.
        score: what the mean of the samples' errors is called. If higher is better, 1 - error is written, and otherwise
            the error.
        loss_name: what the mean of the samples' losses is called in files.
        smooths_labels: whether ``label_smoothing`` has a meaning for the targets.
    """

    name: ClassVar[str]
    score: ClassVar[Measure]
    loss_name: ClassVar[str] = "loss"
    smooths_labels: ClassVar[bool] = False

    @abstractmethod
    def loss(self, output: Any, target: Any) -> Tensor:
        """Returns the loss of a batch that training minimises: a scalar, the mean over the batch."""

    @abstractmethod
    def sample_scores(self, output: Any, target: Any) -> Tensor:
        """Returns the error and the loss of each sample of a batch, (2, N). Lower is better.

        The search ranks networks by the means of one of them (``search.score``), and the other one breaks ties. They
        must be numbers of single samples, because the race of the search compares networks sample by sample.
        """

    def smoothed_loss(self, output: Any, target: Any, label_smoothing: float) -> Tensor:
        """Returns the loss of training with label smoothing. Tasks with ``smooths_labels`` override it."""
        assert not label_smoothing
        return self.loss(output, target)

    def distillation(self, output: Any, teacher: Any) -> Tensor:
        """Returns the loss of an output compared with a teacher's detached output of the same batch: a scalar.

        Raises:
            UserError: the task has none, which is the default.
        """
        raise UserError(
            f"task {self.name} has no distillation loss; define its method distillation, or train without distillation"
        )

    def summed_scores(self, output: Any, target: Any) -> Tensor:
        """Returns the sums of ``sample_scores`` over the batch, (2,)."""
        return self.sample_scores(output, target).sum(1)

    def predictions(self, output: Any) -> Any:
        """Returns what an output predicts, in the form that the metrics take. By default, it is the output."""
        return output

    def metrics(self, info: DataInfo) -> Mapping[Measure, Metric]:
        """Returns new metrics for the report, of which the first is the main one. By default, there are none.

        Each is updated with (predictions, targets) of every batch (see ``metric_arguments``). ``score`` is reported
        too. It is the main measure if there are no metrics.
        """
        return {}

    def metric_arguments(self, output: Any, target: Any) -> tuple[Any, ...]:
        """Returns the arguments with which the metrics are updated."""
        return self.predictions(output), target

    def outputs(self, info: DataInfo) -> int | None:
        """Returns the number of outputs of a network for these data, which it gets as ``num_classes``, or None."""
        return info.outputs

    def misfit(self, info: DataInfo, output: Any) -> str:
        """Returns why an output does not fit the data, and the remedy; "" if it fits.

        The text continues the sentence "the network ...", such as "returns 5 outputs for 4 classes; set ...".

        Args:
            info: the description of the data.
            output: the network's output for two samples. Its tensors may be on the meta device, without values.
        """
        return ""

    @staticmethod
    def wrong_values(target: Any, classes: int) -> str:
        """Returns what is wrong with the values of a target; "" if nothing, or if it is not known.

        The text continues the sentence "the target of sample 3 ...", such as "has nan". This is the check that belongs
        to ``loss``: it is not used by a derived class that defines another loss (see ``value_check``).

        Args:
            target: the target of one sample, as a batch of one.
            classes: the number of classes that the data set names; 0 if it names none.
        """
        return ""

    def value_check(self) -> Callable[[Any, int], str]:
        """Returns ``wrong_values`` of the class that defines ``loss``: another loss may need other targets."""
        defines = next(kind for kind in type(self).__mro__ if "loss" in vars(kind) and issubclass(kind, Task))
        return defines.wrong_values if "wrong_values" in vars(defines) else Task.wrong_values

    def chance(self, data: PreparedData) -> float | None:
        """Returns the ``score`` of a constant guess on the search split; None, the default, if it is not known.

        Networks that are not significantly better are reported. The test assumes that errors are 0 or 1.
        """
        return None

    def value(self, error: float) -> float:
        """Returns the value of ``score`` for a mean error."""
        return self.score.of_error(error)

    def measures(self, info: DataInfo) -> list[Measure]:
        """Returns the measures of the report, the main one first."""
        metrics = list(self.metrics(info))
        return metrics if self.score in metrics else [*metrics, self.score]


def wrong_targets(task: Task, info: DataInfo, needs: str) -> str:
    """Returns the text of a misfit whose reason are the targets."""
    return (
        f"cannot be trained, because a target of the data is {in_words(info.targets)} and task {task.name} needs "
        f"{needs}; correct the data set, or set task to the task of these data"
    )


def bounds(values: Tensor) -> str:
    """Returns a description of the range of values, or that they are not finite, for ``wrong_values``."""
    if found := not_finite(values):
        return found
    return f"values from {values.min():g} to {values.max():g}" if values.numel() > 1 else f"the value {values.min():g}"
