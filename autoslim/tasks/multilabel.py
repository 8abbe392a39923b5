"""Multi-label classification: any number of labels for each sample."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.data.prepared import DataInfo
from autoslim.data.structure import is_tensor
from autoslim.tasks.measure import Measure
from autoslim.tasks.task import Metric, Task, bounds, wrong_targets


class Multilabel(Task):
    """Multi-label classification: logits (N, K), and as targets 0 or 1 for each of the K labels, (N, K)."""

    name = "multilabel"
    score = Measure("label_accuracy", "label accuracy")
    loss_name = "binary_cross_entropy"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output, target.to(output.dtype))

    def distillation(self, output: Tensor, teacher: Tensor) -> Tensor:
        """Returns the mean binary cross-entropy with the teacher's probabilities."""
        return F.binary_cross_entropy_with_logits(output, teacher.sigmoid().to(output.dtype))

    def sample_scores(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the fraction of wrong labels, at a probability of 0.5, and the mean binary cross-entropy in nats."""
        output, target = output.float(), target.float()
        wrong = (output > 0) != (target > 0.5)
        losses = F.binary_cross_entropy_with_logits(output, target, reduction="none")
        return torch.stack([wrong.float().mean(1), losses.mean(1)])

    def predictions(self, output: Tensor) -> Tensor:
        """Returns the probability of each label."""
        return output.float().sigmoid()

    def metrics(self, info: DataInfo) -> Mapping[Measure, Metric]:
        """Returns the mean over the labels of the average precision."""
        from torchmetrics.classification import MultilabelAveragePrecision

        return {Measure("map", "mAP"): MultilabelAveragePrecision(info.targets["shape"][0], validate_args=False)}

    def metric_arguments(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictions(output), (target > 0.5).long()

    def misfit(self, info: DataInfo, output: object) -> str:
        if not is_tensor(info.targets) or len(info.targets["shape"]) != 1:
            return wrong_targets(self, info, "0 or 1 for each label, (labels,)")
        labels = info.targets["shape"][0]
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        if shape != (2, labels):
            returned = shape[1] if isinstance(shape, tuple) and len(shape) == 2 else shape
            return f"returns {returned} outputs for {labels} labels of data; set model.kwargs.num_classes: {labels}"
        return ""

    @staticmethod
    def wrong_values(target: Tensor, classes: int) -> str:
        inside = bool(((target >= 0) & (target <= 1)).all())  # False for nan
        return "" if inside else f"has {bounds(target)}, but labels are 0 or 1"
