"""The scores and the metrics of a network over a split."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autoslim.channels.batches import call, device_of, first_tensor
from autoslim.channels.copying import inference_mode
from autoslim.data.prepared import DataInfo
from autoslim.tasks.task import Metric, Score, Task

Chunk = tuple[Any, Any]
"""Inputs, such as images (N, C, H, W), and targets on the device."""


def evaluate(
    task: Task,
    network: nn.Module,
    chunks: Iterable[Chunk],
    autocast: Callable[[], torch.autocast],
    metrics: Iterable[Metric] = (),
) -> Score:
    """Returns the mean error and the mean loss of ``network`` over all samples, in evaluation mode.

    A supernet uses the batch statistics of each chunk, a plain network its running statistics. The host synchronises
    with the device once, at the end, if there are no ``metrics``, which are updated with each chunk. The mode of every
    module is restored.
    """
    metrics = list(metrics)
    sums: list[Tensor] = []
    count = 0
    with inference_mode(network):
        for inputs, targets in chunks:
            with autocast():
                output = call(network, inputs)
            output = tree_map(_in_float32, output)
            sums.append(task.summed_scores(output, targets))
            for metric in metrics:
                metric.update(*task.metric_arguments(output, targets))
            count += len(first_tensor(inputs))
        # The sums are added on the host, because not every device has float64.
        error, loss = torch.stack(sums).cpu().double().sum(0).tolist()
    return Score(error / count, loss / count, count)


@dataclass(frozen=True)
class Evaluation:
    """The score of a network over a split, and the values of the task's measures by name, the main one first."""

    score: Score
    values: dict[str, float]


def evaluate_measures(
    task: Task,
    info: DataInfo,
    network: nn.Module,
    chunks: Iterable[Chunk],
    autocast: Callable[[], torch.autocast],
) -> Evaluation:
    """Returns the score of ``network`` over all samples and the values of all measures (see ``evaluate``)."""
    metrics = dict(task.metrics(info))
    for metric in metrics.values():
        if isinstance(metric, nn.Module):
            metric.to(device_of(network))
        # Only rank 0 evaluates, so that the metrics of torchmetrics must not wait for other processes.
        if hasattr(metric, "distributed_available_fn"):
            metric.distributed_available_fn = _alone
    score = evaluate(task, network, chunks, autocast, metrics.values())
    values = {measure.name: float(metric.compute()) for measure, metric in metrics.items()}
    if task.score not in metrics:
        values[task.score.name] = task.value(score.error)
    return Evaluation(score, values)


def _alone() -> bool:
    return False


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
