"""Semantic segmentation: a class for each pixel."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.data.prepared import DataInfo
from autoslim.data.structure import in_words, is_tensor
from autoslim.tasks.classification import soft_cross_entropy
from autoslim.tasks.measure import CROSS_ENTROPY, Measure
from autoslim.tasks.task import Metric, Task, bounds, wrong_targets

IGNORED = 255
"""Pixels with this class are ignored, as in the masks of Pascal VOC and Cityscapes."""


class Segmentation(Task):
    """Semantic segmentation: logits (N, K, H, W), and as targets a class for each pixel, (N, H, W).

    The output may also be a mapping with the logits under ``out``, as torchvision's networks return it. The data set
    names its classes (its attribute ``classes``). Pixels of class 255 are ignored. Any number of spatial dimensions is
    possible.
    """

    name = "segmentation"
    score = Measure("pixel_accuracy", "pixel accuracy")
    loss_name = CROSS_ENTROPY

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Returns the mean cross-entropy over the pixels that are not ignored."""
        total = F.cross_entropy(logits(output), target.long(), ignore_index=IGNORED, reduction="sum")
        return total / (target != IGNORED).sum().clamp(min=1)

    def distillation(self, output: Any, teacher: Any) -> Tensor:
        """Returns the mean cross-entropy with the teacher's softmax, over all pixels."""
        return soft_cross_entropy(logits(output), logits(teacher))

    def sample_scores(self, output: Any, target: Tensor) -> Tensor:
        """Returns the fraction of wrong pixels and the mean cross-entropy in nats, without pixels that are ignored."""
        scores, target = logits(output).float(), target.long()
        counted = (target != IGNORED).flatten(1)  # (N, pixels)
        wrong = (scores.argmax(1) != target).flatten(1) & counted
        losses = F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="none").flatten(1)
        return torch.stack([wrong.sum(1), losses.sum(1)]) / counted.sum(1).clamp(min=1)

    def predictions(self, output: Any) -> Tensor:
        """Returns the class of each pixel, (N, H, W)."""
        return logits(output).argmax(1)

    def metrics(self, info: DataInfo) -> Mapping[Measure, Metric]:
        """Returns the mean intersection over union of the classes, from the pixels of all images together."""
        from torchmetrics.classification import MulticlassJaccardIndex

        iou = MulticlassJaccardIndex(len(info.classes), ignore_index=IGNORED, validate_args=False)
        return {Measure("mean_iou", "mean IoU"): iou}

    def metric_arguments(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictions(output), target.long()

    def outputs(self, info: DataInfo) -> int | None:
        return len(info.classes) or None

    def misfit(self, info: DataInfo, output: Any) -> str:
        masks = is_tensor(info.targets) and len(info.targets["shape"]) > 0
        if not masks or info.targets["dtype"].startswith(("float", "bfloat")):
            return wrong_targets(self, info, "a mask with the class of each pixel (integers, (H, W))")
        classes, size = len(info.classes), tuple(info.targets["shape"])
        if not classes:
            return (
                "cannot be compared with the masks, because the data set does not name its classes; add the attribute "
                "classes, a list of their names, to the training data"
            )
        if isinstance(output, Mapping) and "aux" in output:
            return "has an auxiliary head; switch it off (for torchvision's networks, model.kwargs.aux_loss: false)"
        scores = output.get("out") if isinstance(output, Mapping) else output
        if not isinstance(scores, Tensor) or scores.dim() != 2 + len(size):
            kind = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(output).__name__
            return f"returns {kind} for two samples; task segmentation needs logits (N, classes, H, W)"
        if scores.shape[1] != classes:
            return (
                f"returns {scores.shape[1]} outputs for {classes} classes of data; set model.kwargs.num_classes: "
                f"{classes}"
            )
        if tuple(scores.shape[2:]) != size:
            return (
                f"returns maps of {'x'.join(map(str, scores.shape[2:]))} for masks of {in_words(info.targets)}; resize "
                "its output to the size of the input in forward, or the masks in the data set"
            )
        return ""

    @staticmethod
    def wrong_values(target: Tensor, classes: int) -> str:
        counted = target[target != IGNORED]
        if not classes or not len(counted) or 0 <= int(counted.min()) <= int(counted.max()) < classes:
            return ""
        return f"has {bounds(counted)}, but classes are from 0 to {classes - 1}, or {IGNORED} for pixels to ignore"


def logits(output: Any) -> Tensor:
    """Returns the logits of an output, which may be a mapping that contains them as ``out``."""
    scores: Tensor = output["out"] if isinstance(output, Mapping) else output
    return scores
