"""Damaged files: nothing that differs from what was written is used, and an error or a line names the file."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failures import KilledError, message_of
from small_data import prepared_digits
from small_project import error_of
from torch import Tensor, nn

from autoslim.data.prepare import prepare
from autoslim.data.prepared import FILE_NAME, DataInfo, PreparedData, read_info
from autoslim.errors import UserError
from autoslim.files import append_line, read_json, read_lines, write_sealed
from autoslim.training.checkpoints import Checkpoints, load_weights, save_weights
from autoslim.training.loop import Plan, Row, train


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


def zeroed(content: bytes, position: int) -> bytes:
    return content[:position] + bytes(len(content[position : position + 64])) + content[position + 64 :]


def saved(folder: Path, states: int = 2) -> Checkpoints:
    """Returns checkpoints with ``states`` states saved under the name "run"."""
    checkpoints = Checkpoints(folder, "stage", "key")
    for number in range(states):
        checkpoints.save("run", {"number": number, "weights": torch.full((40, 10), float(number))})
    return Checkpoints(folder, "stage", "key")  # as another process would open them


@pytest.mark.parametrize("damage", [flipped, zeroed])
def test_a_damaged_checkpoint_is_never_used(
    damage: Callable[[bytes, int], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path)
    path = checkpoints.path("run")
    content = path.read_bytes()
    positions = [place for place in range(0, len(content), 37) if damage(content, place) != content]
    for position in positions:
        path.write_bytes(damage(content, position))
        state = checkpoints.load("run")
        assert state is not None
        assert state["number"] == 0
        assert state["weights"].eq(0).all()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(positions) > 50
    assert all(line.startswith(f"checkpoint {path} cannot be used (it ") for line in lines)
    assert all(line.endswith("; continuing from the one before") for line in lines)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


@pytest.mark.parametrize(
    "replace",
    [
        folder_instead,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("something else"),
        lambda path: torch.save({"number": 7}, path),  # without a digest
        lambda path: shutil.copy(path.with_name("other.pt"), path),
    ],
)
def test_other_content_in_place_of_a_checkpoint(
    replace: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path)
    checkpoints.save("other", {"not": "a state"})
    replace(checkpoints.path("run"))
    assert checkpoints.restore("run", lambda state: state["number"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"checkpoint {checkpoints.path('run')} cannot be used (")
    checkpoints.save("run", {"number": 2})  # the good one before must not be replaced by the damaged one
    again = Checkpoints(tmp_path, "stage", "key")
    assert again.restore("run", lambda state: state["number"]) == 2
    replace(checkpoints.path("run"))
    assert again.restore("run", lambda state: state["number"]) == 0


def test_without_an_undamaged_checkpoint_a_run_starts_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = saved(tmp_path)
    for path in checkpoints.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert checkpoints.load("run") is None
    assert [line.rpartition("; ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "continuing from the one before",
        "starting from scratch",
    ]


def test_a_kill_between_the_two_renames_loses_one_checkpoint_at_most(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    checkpoints.path("run").unlink()
    state = checkpoints.load("run")
    assert state is not None
    assert state["number"] == 0


class Training:
    """Three epochs of four steps of a linear network, with a checkpoint after each step."""

    def __init__(self, folder: Path, kill_at: int = -1) -> None:
        torch.manual_seed(0)
        self.network = nn.Linear(3, 2)
        self.checkpoints = Checkpoints(folder, "training", "key")
        self.steps: list[int] = []
        self.kill_at = kill_at

    def step(self, images: Tensor, labels: Tensor, number: int) -> Tensor:
        if number == self.kill_at:
            raise KilledError
        self.steps.append(number)
        loss = nn.functional.cross_entropy(self.network(images), labels)
        loss.backward()
        return loss.detach()

    def batches(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(skip, 4):
            images = torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * epoch + step))
            yield images, images.argmax(1).clamp(max=1)

    def run(self) -> list[Row]:
        return train(
            self.network,
            torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9),
            Plan(epochs=3, steps_per_epoch=4, checkpoint_every_s=-1.0),
            step=self.step,
            batches=self.batches,
            learning_rate=lambda step: 0.1 / (1 + step),
            validate=dict,
            observe=lambda row: None,
            checkpoints=self.checkpoints,
            name="run",
            label="test",
        )


WRONG: dict[str, dict[str, Any]] = {
    "a missing key": {"losses": None},
    "a step beyond the plan": {"step": 13},
    "a step of another epoch": {"step": 2},
    "another network": {"network": nn.Linear(4, 2).state_dict()},
    "a part of a network": {"network": {"bias": torch.zeros(2)}},
    "another optimiser": {"optimiser": {"state": {}, "param_groups": []}},
    "other random numbers": {"rng": 5},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("both", [False, True])
def test_a_checkpoint_that_loads_but_is_wrong_changes_no_result(
    wrong: str, both: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Training(tmp_path / "whole")
    rows = whole.run()
    torn = Training(tmp_path / "torn", kill_at=7)
    with pytest.raises(KilledError):
        torn.run()
    state = torn.checkpoints.load("run")
    assert state is not None
    state |= WRONG[wrong]
    for _ in range(2 if both else 1):
        torn.checkpoints.save("run", {name: value for name, value in state.items() if value is not None})
    capsys.readouterr()
    again = Training(tmp_path / "torn")
    assert again.run() == rows
    assert again.steps[0] == (0 if both else 7)
    assert all(map(torch.equal, again.network.parameters(), whole.network.parameters()))
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("checkpoint ")]
    assert len(printed) == 1 + both
    assert f"{again.checkpoints.path('run')} cannot be used (" in printed[0]


def error_or_none(act: Callable[[], object]) -> str:
    """Returns the message of the error that ``act`` raises; "" if it raises none."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("damage", [flipped, zeroed])
def test_damaged_weights_are_never_loaded(damage: Callable[[bytes, int], bytes], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = nn.Linear(20, 10), tmp_path / "w.safetensors"
    save_weights(network, path)
    content = path.read_bytes()
    loaded, refused = nn.Linear(20, 10), 0
    for position in range(0, len(content), 7):
        path.write_bytes(damage(content, position))
        message = error_or_none(lambda: load_weights(loaded, path))
        if message:
            assert message.startswith(f"{path} does not contain weights of this network: ")
            assert message.endswith("run `dvc repro`")
            refused += 1
        else:  # damage that changes no tensor, such as in the name of the digest
            assert all(map(torch.equal, loaded.parameters(), network.parameters()))
    assert refused > 100


def test_damaged_json_is_never_read(tmp_path: Path) -> None:
    path, values = tmp_path / "channels.json", {"format": 2, "costs": {"macs": 0.1 + 0.2, "params": 5}, "list": [1]}
    write_sealed(path, values)
    assert read_json(path, "allocate") == values
    content, refused = path.read_bytes(), 0
    for position in range(len(content)):
        path.write_bytes(flipped(content, position))
        message = error_or_none(lambda: read_json(path, "allocate"))
        if message:
            assert message.startswith(f"{path} is damaged (")
            assert message.endswith("delete it and run `dvc repro allocate` again")
            refused += 1
        else:  # damage in white space or in the name of the digest
            assert values.items() <= read_json(path, "allocate").items()
    assert refused > len(content) // 2


def log_of(folder: Path, lines: int) -> Path:
    log = folder / "steps.jsonl"
    for number in range(lines):
        append_line(log, {"step": number, "channels": {"a": (number, 0.1 * number)}})
    return log


@pytest.mark.parametrize("line", [0, 2, 4])
@pytest.mark.parametrize("damage", ["deleted", "flipped", "swapped", "text", "empty"])
def test_a_log_is_read_up_to_its_first_damaged_line(
    line: int, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(tmp_path, 6)
    lines = log.read_bytes().splitlines(keepends=True)
    match damage:
        case "deleted":
            del lines[line]
        case "flipped":
            lines[line] = lines[line].replace(b'"step": ', b'"step": 1')
        case "swapped":
            lines[line], lines[line + 1] = lines[line + 1], lines[line]
        case "text":
            lines[line] = b"text\n"
        case "empty":
            lines[line] = b"\n"
    log.write_bytes(b"".join(lines))
    assert [values["step"] for values in read_lines(log)] == list(range(line))
    [message] = capsys.readouterr().err.splitlines()
    assert message.startswith(f"{log} is damaged or incomplete at line {line + 1} of {len(lines)}; ")
    append_line(log, {"step": "new"})
    assert [values["step"] for values in read_lines(log)] == [*range(line), "new"]
    assert not capsys.readouterr().err


def test_half_of_the_last_line_is_dropped_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_of(tmp_path, 3)
    log.write_bytes(log.read_bytes()[:-20])
    assert [values["step"] for values in read_lines(log)] == [0, 1]
    assert not capsys.readouterr().err
    log.unlink()
    log.mkdir()
    assert read_lines(log) == []
    assert capsys.readouterr().err == f"{log} is a folder instead of a log; starting from scratch\n"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "prepared"
    prepared_digits(folder)
    return folder


def opened(folder: Path) -> list[bytes]:
    data = PreparedData.open(folder)
    return [part.tobytes() for split in data.info.counts for part in (data.images(split), data.labels(split))]


@pytest.mark.parametrize("name", ["train.images.npy", "search.images.npy", "test.labels.npy", FILE_NAME])
def test_damaged_prepared_data_are_never_used(name: str, digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits, tmp_path / "prepared")
    content = (folder / name).read_bytes()
    for position in range(0, len(content), max(1, len(content) // 25)):
        for damage in (flipped, zeroed):
            (folder / name).write_bytes(damage(content, position))
            if damage(content, position) != content:
                assert message_of(lambda: opened(folder)).endswith("run the prepare stage again")
    (folder / name).write_bytes(content)
    assert opened(folder) == opened(digits)


def without_digests(folder: Path, change: Callable[[Path], object]) -> Path:
    """Changes a prepared folder as another program would that writes consistent digests."""
    change(folder)
    values = json.loads((folder / FILE_NAME).read_text()) | {"digests": {}}
    del values["digest"]
    (folder / FILE_NAME).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("train.labels", np.full(160, 10), "the labels of train are from 10 to 10, but there are 10 classes"),
        ("train.labels", np.full(160, -1), "the labels of train are from -1 to -1, but there are 10 classes"),
        ("train.labels", np.zeros(160), "the labels of train are float64 of shape (160,), not int64 (N,)"),
        ("train.labels", np.zeros((160, 1), int), "the labels of train are int64 of shape (160, 1), not int64 (N,)"),
        ("train.labels", np.zeros(3, int), "the images of train are uint8 (160, 1, 8, 8), not uint8 (3, 1, 8, 8)"),
        (
            "test.images",
            np.zeros((99, 1, 8, 8), np.uint8),
            "the images of test are uint8 (99, 1, 8, 8), not uint8 (100",
        ),
        ("test.images", np.zeros((100, 1, 8, 8)), "the images of test are float64 (100, 1, 8, 8), not uint8"),
        ("test.images", np.zeros((100, 8, 8), np.uint8), "the images of test are uint8 (100, 8, 8), not uint8"),
    ],
)
def test_arrays_that_do_not_fit(name: str, array: np.ndarray, reason: str, digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(digits, tmp_path / "prepared")
    without_digests(folder, lambda folder: np.save(folder / f"{name}.npy", array))
    message = message_of(lambda: PreparedData.open(folder))
    assert message.startswith(f"{folder} is damaged ({reason}")


def test_a_data_json_without_digests_is_read(digits: Path, tmp_path: Path) -> None:
    folder = without_digests(shutil.copytree(digits, tmp_path / "prepared"), lambda folder: None)
    assert opened(folder) == opened(digits)
    assert DataInfo.from_json(read_info(digits).to_json()) == read_info(digits)


READ = {
    "data/prepared/data.json": ("resources", "supernet", "search", "allocate", "report"),
    "data/prepared/train.images.npy": ("supernet", "search"),
    "data/prepared/test.labels.npy": ("supernet", "report"),
    "outputs/resources/latency.json": ("search", "allocate", "report"),
    "outputs/resources/objective.json": ("search",),
    "outputs/supernet/supernet.json": ("search", "allocate"),
    "outputs/supernet/weights.safetensors": ("search", "allocate"),
    "outputs/supernet/curves.csv": ("report",),
    "outputs/search/trajectory.json": ("allocate", "report"),
    "outputs/channels/uniform.json": ("report", "retrain uniform"),
    "outputs/channels/budgets.json": ("retrain uniform",),
    "outputs/channels/uniform.safetensors": ("retrain uniform",),
    "outputs/retrain/uniform/curves.csv": ("report",),
    "outputs/retrain/uniform/weights/seed-0.safetensors": ("report",),
}


@pytest.mark.parametrize("name", READ)
def test_an_empty_file_is_one_line_in_every_stage_that_reads_it(name: str, done: Path) -> None:
    (done / name).write_bytes(b"")
    for stage in READ[name]:
        message = error_of(*stage.split(), trains=True)
        assert Path(name).name in message or "data/prepared" in message
        assert "run `dvc repro" in message or "run the prepare stage again" in message


def remove(values: dict[str, Any], path: list[Any]) -> None:
    for part in path[:-1]:
        values = values[part]
    del values[path[-1]]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (["resource"], "it lacks 'resource'"),
        (["limits"], "it lacks 'limits'"),
        (["default"], "it lacks 'default'"),
        (["narrowest", "channels"], "narrowest lacks 'channels'"),
        (["default", "macs"], "default lacks 'macs'"),
        (["steps", 1, "error"], "step 1 lacks 'error'"),
        (["steps", 2, "channels"], "step 2 lacks 'channels'"),
        (["steps", 0, "slimmed"], "step 0 lacks 'slimmed'"),
    ],
)
def test_a_trajectory_without_a_key_is_one_line(path: list[Any], reason: str, done: Path) -> None:
    from autoslim.cli.trajectory import trajectory_cli

    file = done / "outputs/search/trajectory.json"
    values = json.loads(file.read_text())
    remove(values, path)
    del values["digest"]
    file.write_text(json.dumps(values))
    for command in ("allocate", "report", trajectory_cli):
        assert error_of(command) == (
            f"outputs/search/trajectory.json is damaged ({reason}); delete it and run `dvc repro search` again"
        )


def test_a_manifest_with_wrong_labels(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (8, 8), number).save(tmp_path / "images" / split / name / f"{number}.png")
    prepare(
        f"folder:{tmp_path / 'images'}",
        tmp_path / "prepared",
        image_size=None,
        channels=None,
        search_images=2,
        seed=0,
        storage="files",
    )
    manifest = tmp_path / "prepared/manifest.csv"
    text = manifest.read_text()
    without_digests(tmp_path / "prepared", lambda folder: None)
    for change in ("train,2,", "train,-1,", "train,x,", "other,0,"):
        manifest.write_text(text.replace("train,0,", change, 1))
        message = message_of(lambda: PreparedData.open(tmp_path / "prepared"))
        assert message.endswith("run the prepare stage again")
        assert str(tmp_path / "prepared") in message


def test_a_damaged_key_of_an_earlier_checkpoint_is_ignored(tmp_path: Path) -> None:
    from autoslim.pipeline.checkpoint_keys import KeyedCheckpoints

    with contextlib.suppress(KilledError), (first := KeyedCheckpoints(tmp_path, "stage", {"a": 1})).lock():
        first.save("x", {})
        raise KilledError
    for text in ("", "[]", "3", '{"a": [1]}'):
        (first.folder / "key.json").write_text(text)
        with KeyedCheckpoints(tmp_path, "stage", {"a": 2}).lock():
            pass
