"""Values that no network can be trained on, broken ``.npy`` files, and code of the user's that ends a process."""

import io
import itertools
import os
import pickle
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failures import message_of
from small_data import prepared_digits, run_context, search_settings, small_network
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autoslim.channels.resize import resize
from autoslim.data.arrays import read_array
from autoslim.data.own import loader
from autoslim.data.prepare import prepare
from autoslim.data.prepared import PreparedData
from autoslim.export.samples import SamplePredictor
from autoslim.pipeline.entry import with_clear_errors
from autoslim.search.search import scoring_runners
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.building import find_task
from autoslim.tasks.classification import Classification
from autoslim.tasks.regression import Regression
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.loop import Plan, train

DATA = """
import math, os, torch
from torch.utils.data import Dataset

class Numbers(Dataset):
    classes = {classes}
    def __init__(self, count, seed):
        self.count, self.seed = count, seed
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        image, wrong = torch.randn(3, 4, 4, generator=generator), index == 5 and self.seed == {seed}
        {sample}

def build():
    return {{"train": Numbers(40, 0), "test": Numbers(20, 1000){more}}}
"""


def prepared(
    folder: Path, task: str, sample: str, *, classes: list[str] | None = None, seed: int = 0, more: str = ""
) -> None:
    code = DATA.format(sample=sample, classes=classes, seed=seed, more=more)
    (folder / "own.py").write_text(code)
    found = find_task(task)
    prepare(
        "own.py:build",
        folder / "prepared",
        image_size=None,
        channels=None,
        search_images=10,
        seed=0,
        relative_to=folder,
        class_targets=isinstance(found, Classification),
        wrong_values=found.value_check(),
    )


WRONG: dict[str, tuple[str, str, list[str] | None, str]] = {
    "nan pixel": ("regression", "return image * (math.nan if wrong else 1), 0.5", None, "input|nan; correct the data"),
    "infinite pixel": ("regression", "return image / (0 if wrong else 1), 0.5", None, "input|infinite values; correct"),
    "nan in a tuple": ("regression", "return (image, image * (math.nan if wrong else 1)), 0.5", None, "input|nan; "),
    "nan number": ("regression", "return image, math.nan if wrong else 0.5", None, "target|nan; correct the data set"),
    "infinite number": ("regression", "return image, math.inf if wrong else 0.5", None, "target|infinite values; "),
    "nan label": (
        "multilabel",
        "return image, torch.tensor([0.0, math.nan if wrong else 1.0])",
        None,
        "target|nan, but labels are 0 or 1",
    ),
    "label of 2": (
        "multilabel",
        "return image, torch.tensor([0.0, 2.0 if wrong else 1.0])",
        None,
        "target|values from 0 to 2, but labels are 0 or 1",
    ),
    "class of a pixel": (
        "segmentation",
        "return image, torch.full((4, 4), 7 if wrong else index % 2)",
        ["a", "b"],
        "target|values from 7 to 7, but classes are from 0 to 1, or 255 for pixels to ignore",
    ),
    "negative class of a pixel": (
        "segmentation",
        "return image, torch.full((4, 4), -1 if wrong else index % 2)",
        ["a", "b"],
        "target|values from -1 to -1, but classes are from 0 to 1",
    ),
    "nan probability": (
        "classification",
        "return image, torch.tensor([0.5, math.nan if wrong else 0.5])",
        None,
        "target|nan, but probabilities are from 0 to 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("seed", [0, 1000])
def test_wrong_values_of_own_data_are_named_when_they_are_prepared(name: str, seed: int, tmp_path: Path) -> None:
    task, sample, classes, expected = WRONG[name]
    side, reason = expected.split("|")
    message = message_of(lambda: prepared(tmp_path, task, sample, classes=classes, seed=seed))
    part = "train" if seed == 0 else "test"
    assert message.startswith(f"the {side} of sample 5 of the {part} data set of own.py:build has {reason}")


def test_values_that_are_allowed(tmp_path: Path) -> None:
    """A mask that is added to scores is infinite; pixels of class 255 are ignored; labels may be smoothed."""
    prepared(tmp_path, "regression", "return (image, torch.tensor([0.0, -math.inf])), 0.5")
    prepared(tmp_path, "segmentation", "return image, torch.tensor([[255, index % 2]])", classes=["a", "b"])
    prepared(tmp_path, "multilabel", "return image, torch.tensor([0.1, 0.9])")


def test_a_loss_of_ones_own_decides_which_targets_are_wrong(tmp_path: Path) -> None:
    class Masked(Regression):
        def loss(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - target)[~target.isnan()].square().mean()

    class Named(Regression):
        name = "age"

    nan = torch.full((1, 3), torch.nan)
    assert Masked().value_check()(nan, 0) == ""
    assert Named().value_check()(nan, 0) == Regression().value_check()(nan, 0) == "has nan"


@pytest.mark.parametrize("side", ["inputs", "targets"])
def test_a_loss_that_is_not_finite_because_of_the_data(side: str, tmp_path: Path) -> None:
    """Such as after a transform that divides by zero: a lower learning rate would not help."""
    torch.manual_seed(0)
    network = nn.Linear(2, 2)

    def batches(epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(skip, 4):
            batch = {"inputs": torch.ones(3, 2), "targets": torch.zeros(3, 2)}
            if (epoch, step) == (1, 2):
                batch[side] = batch[side] / 0
            yield batch["inputs"], batch["targets"]

    def step(inputs: Tensor, targets: Tensor, number: int) -> Tensor:
        loss = (network(inputs) - targets).square().mean()
        loss.backward()
        return loss.detach()

    checkpoints = Checkpoints(tmp_path, "run", "key")
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    message = message_of(
        lambda: train(
            network,
            optimiser,
            Plan(3, 4),
            step=step,
            batches=batches,
            learning_rate=lambda number: 0.1,
            validate=dict,
            observe=lambda row: None,
            checkpoints=checkpoints,
            name="run",
            label="run",
        )
    )
    assert f"at step 7 (epoch 2), because its {side} have nan or infinite values; the last valid weights" in message
    assert message.endswith("; correct the data or their transforms")


def test_a_search_on_inputs_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a data set of which only some samples were read when it was prepared."""
    data = prepared_digits(tmp_path / "prepared")
    network, graph = small_network()
    chunk = torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr("autoslim.search.search.search_chunks", lambda *_, **__: [chunk])
    supernet, settings = Supernet(resize(network, graph, graph.default), graph), search_settings()

    def act() -> object:
        return scoring_runners(supernet, data, run_context(), settings, 0, Classification())

    assert message_of(act) == "inputs of the search split have nan; correct the data set"


class Ending:
    """A data set whose process ends in the middle."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end

    def __getitem__(self, index: int) -> int:
        if index == 5:
            self.end()
        return index


@pytest.mark.parametrize("end", [0, 3, signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_is_one_line(end: int) -> None:
    def act() -> object:
        return os.kill(os.getpid(), end) if isinstance(end, signal.Signals) else os._exit(end)

    batches = [np.arange(start, start + 2) for start in range(0, 12, 2)]
    message = message_of(lambda: list(loader(Ending(act), batches, list, 2)))  # type: ignore[arg-type]
    assert message.startswith("a process that reads samples ended before its work was done (DataLoader worker (pid")
    assert "runtime.workers" in message


def test_a_worker_that_ends_while_a_network_computes_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """torch's handler of the signal raises its error wherever the main thread is."""

    def command() -> None:
        slow = DataLoader(Ending(lambda: None), batch_sampler=[[0, 1]] * 4, num_workers=1)  # type: ignore[arg-type]
        batches = iter(slow)
        next(batches)
        os.kill(batches._workers[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
        end = time.monotonic() + 10
        while time.monotonic() < end:
            time.sleep(0.01)

    with pytest.raises(SystemExit) as ending:
        with_clear_errors(command)()
    assert ending.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a process that reads samples ended before its work was done (DataLoader worker (pid")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def npy(descr: str = "'<f4'", shape: str = "(2, 3, 4, 4)", body: bytes = b"", fortran: bool = False) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


VALUES = np.arange(96, dtype="<f4").reshape(2, 3, 4, 4)
BODY = VALUES.tobytes()


def archive() -> bytes:
    content = io.BytesIO()
    np.savez(content, a=VALUES)
    return content.getvalue()


BROKEN = {
    "objects": npy("'|O'", body=pickle.dumps(Evil())),
    "a pickle": pickle.dumps(Evil()),
    "a broken header": b"\x93NUMPY\x01\x00\x10\x00{'descr': __import" + b"x" * 400,
    "a header with code": npy("__import__('os')", body=BODY),
    "more than the memory": npy(shape="(10000000000, 3, 4, 4)", body=BODY),
    "more than 64 bits": npy(shape="(10000000000000000000000, 3, 4, 4)", body=BODY),
    "a negative size": npy(shape="(-1, 3, 4, 4)", body=BODY),
    "two negative sizes": npy(shape="(-2, -3, 4, 4)", body=BODY),
    "a truncated file": npy(body=BODY[:-5]),
    "an empty file": b"",
    "an archive": archive(),
}
OTHER_KINDS = {
    "complex numbers": npy("'<c8'", body=VALUES.astype("c8").tobytes()),
    "text": npy("'<U1'", body=b"1\0\0\0" * 96),
    "times": npy("'<M8[s]'", body=VALUES.astype("<i8").tobytes()),
    "records": npy("[('a', '<f4')]", body=BODY),
    "no samples": npy(shape="(0, 3, 4, 4)"),
}


def predictor(dtype: str) -> SamplePredictor:
    about = {
        "input": {"structure": {"shape": [3, 4, 4], "dtype": dtype}},
        "task": {"name": "regression", "outputs": "regression", "unit": ""},
        "classes": [],
    }
    return SamplePredictor(about, lambda inputs: inputs)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_arrays_are_never_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.npy"
    file.write_bytes(BROKEN[name])
    for mode in (None, "r", "c"):
        with pytest.raises(ValueError, match=r"."):
            read_array(file, mode)  # type: ignore[arg-type]
    assert message_of(lambda: predictor("float32").inputs(file)).startswith(f"{file} is not a readable .npy file (")
    data = prepared_digits(tmp_path / "prepared")
    for part in ("train.images", "test.labels"):
        content = (data.folder / f"{part}.npy").read_bytes()
        (data.folder / f"{part}.npy").write_bytes(BROKEN[name])
        message = message_of(lambda: PreparedData.open(data.folder))
        assert message.startswith(str(data.folder))
        assert message.endswith("run the prepare stage again")
        (data.folder / f"{part}.npy").write_bytes(content)
    assert not Path("executed").exists()


@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(OTHER_KINDS, ["float32", "int64"])))
def test_arrays_of_other_kinds_are_no_inputs(name: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(OTHER_KINDS[name])
    message = message_of(lambda: predictor(dtype).inputs(tmp_path / "x.npy"))
    assert message.startswith(f"{tmp_path / 'x.npy'} contains ")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_inputs_that_are_not_finite_are_not_predicted(value: float, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 3, 4, 4), value))
    assert message_of(lambda: predictor("float32").inputs(tmp_path / "x.npy")) == (
        f"{tmp_path / 'x.npy'} contains values that are not finite numbers of float32; correct them"
    )


@pytest.mark.parametrize(
    "content",
    [
        npy(body=BODY),
        npy("'>f4'", body=VALUES.astype(">f4").tobytes()),
        npy(fortran=True, body=VALUES.tobytes(order="F")),
        npy("'<f8'", body=VALUES.astype("<f8").tobytes()),
    ],
)
def test_the_same_array_in_other_forms(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    found = predictor("float32").inputs(tmp_path / "x.npy")
    assert np.array_equal(found, VALUES)
    assert found.dtype == np.float32
