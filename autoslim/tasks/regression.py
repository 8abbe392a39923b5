"""Regression: numbers, or maps of numbers."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.data.prepared import DataInfo
from autoslim.data.structure import is_tensor
from autoslim.tasks.measure import Measure
from autoslim.tasks.task import Metric, Task, bounds, wrong_targets


class Regression(Task):
    """Regression: an output of the shape of the targets, (N,) or (N, ...). For a single number it may be (N, 1).

    Normalise the targets in the data set: the losses are not scaled. To name the unit, derive a class with a ``score``
    of its own: ``Measure("mae", "mean absolute error", "years", higher_is_better=False)``.
    """

    name = "regression"
    score = Measure("mae", "mean absolute error", "", higher_is_better=False)
    loss_name = "squared_error"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(*_aligned(output, target))

    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean squared difference from the teacher's output."""
        return F.mse_loss(output, teacher.to(output.dtype))

    def sample_scores(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the mean absolute and the mean squared error of each sample."""
        output, target = _aligned(output.float(), target)
        difference = (output - target).flatten(1) if output.dim() > 1 else (output - target)[:, None]
        return torch.stack([difference.abs().mean(1), difference.square().mean(1)])

    def metrics(self, info: DataInfo) -> Mapping[Measure, Metric]:
        """Returns the mean absolute error, the root of the mean squared error, and the coefficient of determination."""
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

        return {
            self.score: MeanAbsoluteError(),
            Measure("rmse", "RMSE", self.score.unit, higher_is_better=False): MeanSquaredError(squared=False),
            Measure("r2", "R²", ""): R2Score(),
        }

    def metric_arguments(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        output, target = _aligned(output.float(), target)
        return output.flatten(), target.flatten()

    def misfit(self, info: DataInfo, output: object) -> str:
        if not is_tensor(info.targets) or not info.targets["dtype"].startswith(("float", "bfloat")):
            return wrong_targets(self, info, "numbers with a decimal point (a float, or a tensor of them)")
        shape = tuple(info.targets["shape"])
        if not isinstance(output, Tensor):
            return f"returns a {type(output).__name__}; task regression needs one tensor of shape (N, ...)"
        if tuple(output.shape[1:]) not in (shape, shape or (1,)):
            wanted = ", ".join(map(str, ("N", *shape)))
            return (
                f"returns a tensor of shape {tuple(output.shape)} for two samples with targets of shape ({wanted}); "
                f"change its last layer (model.kwargs.num_classes: {info.outputs})"
            )
        return ""

    @staticmethod
    def wrong_values(target: Tensor, classes: int) -> str:
        return "" if bool(target.isfinite().all()) else f"has {bounds(target)}"


def _aligned(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output, without a last dimension of 1 that the targets lack, and the targets in its dtype."""
    if output.dim() == target.dim() + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    return output, target.to(output.dtype)
