"""Finds the task that a parameter names, and tries it before training."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from autoslim.data.prepared import DataInfo
from autoslim.data.structure import zeros
from autoslim.errors import UserError, first_line
from autoslim.tasks.classification import Classification
from autoslim.tasks.measure import Measure
from autoslim.tasks.multilabel import Multilabel
from autoslim.tasks.regression import Regression
from autoslim.tasks.segmentation import Segmentation
from autoslim.tasks.task import Metric, Task
from autoslim.user_code import find_callable

BUILT_IN: dict[str, type[Task]] = {task.name: task for task in (Classification, Multilabel, Segmentation, Regression)}

_FORMATS = f"write {', '.join(BUILT_IN)}, or path/to/file.py:Class for a class derived from autoslim.Task"


def find_task(name: str) -> Task:
    """Returns the task that ``name`` refers to: a built-in one, or an object of a class of the user's.

    Raises:
        UserError: there is no such task, or it is not derived from ``Task`` or not complete.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if ":" not in name:
        raise UserError(f"task {name!r} is unknown; {_FORMATS}")
    made = find_callable(name, "task", _FORMATS)
    try:
        task = made()
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"task {name!r} cannot be built: {first_line(error)}; define its methods loss and sample_scores, and a "
            "constructor without arguments"
        ) from error
    if not isinstance(task, Task):
        raise UserError(f"task {name!r} is a {type(task).__name__}; derive its class from autoslim.Task")
    for attribute, kind, example in (
        ("name", str, "'depth'"),
        ("score", Measure, "Measure('mae', 'mean absolute error', 'cm', higher_is_better=False)"),
        ("loss_name", str, "'squared_error'"),
    ):
        if not isinstance(getattr(task, attribute, None), kind):
            raise UserError(
                f"task {name!r} has no attribute {attribute} of type {kind.__name__}; add one to its class, such as "
                f"{attribute} = {example}"
            )
    return task


def task_of(task: Task | str | None) -> Task | None:
    """Returns the task that a name refers to (see ``find_task``). A task and None stay as they are."""
    return find_task(task) if isinstance(task, str) else task


def try_task(task: Task, info: DataInfo, output: Any) -> None:
    """Calls the methods of a user's task with the output of a network for two samples and with targets of zeros.

    Args:
        output: an output, whose tensors may be on the meta device. Zeros take their place.

    Raises:
        UserError: a method fails, or returns something that training, the search or the report cannot use.
    """
    if type(task) in BUILT_IN.values():
        return
    output, target = tree_map(_zeros, output), zeros(info.targets, 2)
    _scalar(_called(task, "loss", output, target), task, "loss")
    if has_distillation(task):
        _scalar(_called(task, "distillation", output, output), task, "distillation")
    scores = _called(task, "sample_scores", output, target)
    if not isinstance(scores, Tensor) or scores.shape != (2, 2):
        raise UserError(
            f"task {task.name}: sample_scores returns {_described(scores)} for two samples; return the error and the "
            "loss of each sample, a tensor of shape (2, N)"
        )
    metrics = _called(task, "metrics", info)
    arguments = _called(task, "metric_arguments", output, target)
    for measure, metric in metrics.items():
        if not isinstance(measure, Measure):
            raise UserError(f"task {task.name}: metrics has the key {measure!r}; its keys are of type Measure")
        _attempt(task, f"the metric {measure.title}", partial(_measured, metric, arguments))


def _measured(metric: Metric, arguments: tuple[Any, ...]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zeros may be a special case of the metric
        metric.update(*arguments)
        return float(metric.compute())


def has_distillation(task: Task) -> bool:
    """Returns whether the task defines a distillation loss."""
    return type(task).distillation is not Task.distillation


def can_smooth_labels(task: Task) -> bool:
    """Returns whether label smoothing belongs to the task's loss, and not to one that a derived class replaced."""
    definer = {
        method: next(number for number, kind in enumerate(type(task).__mro__) if method in vars(kind))
        for method in ("loss", "smoothed_loss")
    }
    return task.smooths_labels and definer["smoothed_loss"] <= definer["loss"]


def _called(task: Task, method: str, *arguments: Any) -> Any:
    return _attempt(task, method, lambda: getattr(task, method)(*arguments))


def _attempt(task: Task, what: str, run: Callable[[], Any]) -> Any:
    try:
        with torch.no_grad():
            return run()
    except UserError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise UserError(
            f"task {task.name}: {what} does not accept the output of the network and the targets of the data: "
            f"{first_line(error)}; correct the task, the network's output or the data set"
        ) from error


def _scalar(value: Any, task: Task, method: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise UserError(f"task {task.name}: {method} returns {_described(value)}; return a scalar, such as a mean")


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _zeros(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
