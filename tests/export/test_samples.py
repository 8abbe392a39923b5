"""Predictions for data of the user's own: files with inputs, and what outputs mean for each task."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoslim import Measure
from autoslim.data.structure import tensor_structure
from autoslim.errors import UserError
from autoslim.export.samples import SamplePredictor, task_entry
from autoslim.tasks.classification import Classification
from autoslim.tasks.multilabel import Multilabel
from autoslim.tasks.regression import Regression
from autoslim.tasks.segmentation import Segmentation
from autoslim.tasks.task import Task


class Years(Regression):
    name = "age"
    score = Measure("mae", "mean absolute error", "years", higher_is_better=False)


class Rounded(Regression):
    name = "rounded"

    def predictions(self, output: torch.Tensor) -> torch.Tensor:
        return output.round()


def predictor(
    task: Task, output: torch.Tensor, structure: Any = None, classes: tuple[str, ...] = ()
) -> SamplePredictor:
    about = {"input": {"structure": structure or tensor_structure(2)}, "classes": classes, "task": task_entry(task)}
    return SamplePredictor(about, lambda inputs: output.numpy())


def test_outputs_mean_what_the_task_predicts() -> None:
    torch.manual_seed(0)
    names, inputs = ("a", "b", "c"), np.zeros((4, 2), np.float32)
    logits = torch.randn(4, 3)
    for shown, row in zip(predictor(Classification(), logits, classes=names).predict(inputs, 2), logits, strict=True):
        best, second = row.argsort(descending=True)[:2]
        assert shown["class"] == names[best]
        expected = {names[best]: float(row.softmax(0)[best]), names[second]: float(row.softmax(0)[second])}
        assert shown["probabilities"] == pytest.approx(expected)
    for found, row in zip(
        predictor(Multilabel(), logits).predict(inputs, 1), Multilabel().predictions(logits), strict=True
    ):
        assert found["probabilities"] == pytest.approx({str(label): float(share) for label, share in enumerate(row)})
        assert found["labels"] == [label for label, share in found["probabilities"].items() if share >= 0.5]
    maps = torch.randn(4, 3, 5, 6)
    for found, mask in zip(
        predictor(Segmentation(), maps, classes=names).predict(inputs, 1), maps.argmax(1), strict=True
    ):
        assert sum(found["pixels"].values()) == pytest.approx(1)
        assert found["pixels"] == pytest.approx({names[k]: float((mask == k).double().mean()) for k in mask.unique()})
    years = predictor(Years(), logits)
    assert years.unit == "years"
    assert [found["values"] for found in years.predict(inputs, 1)] == logits.tolist()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            np.zeros(3, np.float32),
            "contains 3; save .npy files with inputs as your data set returns them, 2, or a batch",
        ),
        (np.zeros((1, 3, 2), np.float32), "contains 1x3x2; save"),
        (np.zeros(2, np.int64), "contains int64; save"),
        (np.float32(1), "contains one number; save"),
        (b"no array", "is not a readable .npy file ("),
    ],
)
def test_a_file_that_is_no_input(tmp_path: Path, saved: Any, message: str) -> None:
    file = tmp_path / "x.npy"
    file.write_bytes(saved) if isinstance(saved, bytes) else np.save(file, saved)
    with pytest.raises(UserError, match=re.escape(f"{file} {message}")):
        predictor(Multilabel(), torch.zeros(1, 3)).inputs(file)


def test_a_file_has_one_sample_or_a_batch(tmp_path: Path) -> None:
    file, samples = tmp_path / "x.npy", predictor(Multilabel(), torch.zeros(1, 3))
    for saved, expected in ((np.arange(2.0), [[0, 1]]), (np.arange(6.0).reshape(3, 2), [[0, 1], [2, 3], [4, 5]])):
        np.save(file, saved)
        inputs = samples.inputs(file)
        assert inputs.dtype == np.float32
        assert inputs.tolist() == expected


def test_networks_whose_predictions_cannot_be_shown() -> None:
    for task, structure, message in (
        (Rounded(), None, "the task is rounded, a class of your own, and only your code knows what its outputs mean"),
        (Regression(), {"tuple": [tensor_structure(2)] * 2}, "the network's inputs are (2, 2), and `autoslim predict`"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            predictor(task, torch.zeros(1), structure)
    with pytest.raises(UserError, match="does not name its task; write it again with `autoslim export`"):
        SamplePredictor({"input": {"structure": tensor_structure(2)}, "classes": ()}, lambda inputs: inputs)
