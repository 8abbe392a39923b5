"""Predictions for data of the user's own: inputs in ``.npy`` files, and what outputs mean for each built-in task."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoslim.data.arrays import read_array
from autoslim.data.structure import in_words, is_tensor
from autoslim.errors import UserError, first_line
from autoslim.export.predictions import predictions
from autoslim.tasks.building import BUILT_IN
from autoslim.tasks.task import Task

SUFFIX = ".npy"

Values = dict[str, Any]
"""What an output means for one sample, for JSON."""


def task_entry(task: Task) -> dict[str, str]:
    """Returns the entry ``task`` of an exported file's description.

    ``outputs`` is the built-in task whose outputs those of ``task`` are; "" if a class of the user's decides what they
    mean. ``unit`` is that of numbers.
    """
    kinds = (name for name, kind in BUILT_IN.items() if isinstance(task, kind) and _predicts_as(task, kind))
    return {"name": task.name, "outputs": next(kinds, ""), "unit": task.score.unit}


def _predicts_as(task: Task, kind: type[Task]) -> bool:
    return type(task).predictions is kind.predictions


class SamplePredictor:
    """Predictions of a network for data of the user's own with one input tensor.

    Args:
        about: the description of the network: ``input``, ``classes`` and ``task`` (see ``task_entry``).
        run: computes outputs from a batch of inputs.

    Raises:
        UserError: the network has several inputs, or autoslim does not know what its outputs mean.
    """

    def __init__(self, about: Mapping[str, Any], run: Callable[[np.ndarray], np.ndarray]) -> None:
        task = about.get("task")
        if task is None:
            raise UserError("the file does not name its task; write it again with `autoslim export`")
        if not task["outputs"]:
            raise UserError(
                f"the task is {task['name']}, a class of your own, and only your code knows what its outputs mean; run "
                "the exported file with its runtime"
            )
        self._structure = about["input"]["structure"]
        if not is_tensor(self._structure):
            raise UserError(
                f"the network's inputs are {in_words(self._structure)}, and `autoslim predict` needs a single tensor; "
                "call the network in Python"
            )
        self.outputs: str = task["outputs"]
        self.unit: str = task["unit"]
        self._names: Sequence[str] = about["classes"]
        self._run = run

    def inputs(self, file: Path) -> np.ndarray:
        """Returns the samples in a file, (N, ...), as the data set returns inputs; one sample becomes a batch of one.

        Raises:
            UserError: the file is no ``.npy`` file of numbers of the input's shape and kind.
        """
        shape, dtype = tuple(self._structure["shape"]), self._structure["dtype"]
        expected = f"{SUFFIX} files with inputs as your data set returns them, {in_words(self._structure)}"
        remedy = f"save {expected}, or a batch of them, with numpy.save"
        try:
            values = read_array(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is not a readable {SUFFIX} file ({first_line(error)}); {remedy}") from error
        if shape not in (values.shape, values.shape[1:]) or not values.size:
            raise UserError(f"{file} contains {'x'.join(map(str, values.shape)) or 'one number'}; {remedy}")
        kinds = "f" if dtype.startswith(("float", "bfloat")) else "iub"  # numpy's letters; not complex, text or times
        if values.dtype.kind not in kinds:
            raise UserError(f"{file} contains {values.dtype}; {remedy}")
        with np.errstate(over="ignore"):  # becomes infinite, which is an error
            values = (values if values.shape != shape else values[None]).astype(dtype)
        if not np.isfinite(values).all():
            raise UserError(f"{file} contains values that are not finite numbers of {dtype}; correct them")
        return values

    def predict(self, inputs: np.ndarray, top: int) -> list[Values]:
        """Returns what the outputs for (N, ...) mean, for each sample.

        * classification: ``class``, ``probability`` and the ``top`` largest ``probabilities``
        * multilabel: ``labels`` with a probability of at least 0.5, and all ``probabilities``, in descending order
        * segmentation: ``pixels``, the share of the pixels of each class that occurs, in descending order
        * regression: ``values``, the numbers of the output
        """
        output = self._run(inputs)
        if self.outputs == "regression":
            return [{"values": sample.tolist()} for sample in output]
        names = self._names if len(self._names) == output.shape[1] else [str(n) for n in range(output.shape[1])]
        if self.outputs == "classification":
            return [classified(found) for found in predictions(output, names, top)]
        if self.outputs == "multilabel":
            return [_labels(row, names) for row in output]
        return [_pixels(row, names) for row in output.argmax(1)]


def classified(found: Any) -> Values:
    """Returns a ``Prediction`` as values for JSON."""
    return {"class": found.label, "probability": found.probability, "probabilities": found.probabilities}


def _labels(logits: np.ndarray, names: Sequence[str]) -> Values:
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    ordered = {names[index]: float(shares[index]) for index in np.argsort(-shares, kind="stable")}
    return {"labels": [name for name, share in ordered.items() if share >= 0.5], "probabilities": ordered}


def _pixels(classes: np.ndarray, names: Sequence[str]) -> Values:
    counts = np.bincount(classes.ravel(), minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    return {"pixels": {names[index]: float(counts[index] / classes.size) for index in order if counts[index]}}
