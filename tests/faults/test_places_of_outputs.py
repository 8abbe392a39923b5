"""Outputs that are symbolic links or in whose place something else is, and projects in folders with unusual names."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from failures import message_of
from small_data import prepared_digits
from small_project import error_of, stage
from torch import nn

from autoslim.files import append_line, read_json, write_json, write_sealed
from autoslim.training.checkpoints import Checkpoints, load_weights, save_weights

RESUME = "run again; files written before, such as the last checkpoint, are intact"


def removed(path: Path) -> Path:
    """Removes what is at ``path``, and makes the folder above it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def a_file(path: Path) -> None:
    removed(path).touch()


def a_dangling_link(path: Path) -> None:
    removed(path).symlink_to("/nonexistent/disk")


def a_loop(path: Path) -> None:
    removed(path).symlink_to(path.name)


OBSTACLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (a_file, "is not a folder"),
    "a dangling link": (a_dangling_link, "is a symbolic link to /nonexistent/disk, which does not exist"),
    "a loop": (a_loop, "is a symbolic link to folder, which does not exist"),
}
WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda path: write_sealed(path, {}),
    "weights": lambda path: save_weights(nn.Linear(1, 1), path),
    "log": lambda path: append_line(path, {}),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("below", ["x.json", "deeper/x.json"])
def test_something_else_in_place_of_a_folder(obstacle: str, writer: str, below: str, tmp_path: Path) -> None:
    make, reason = OBSTACLES[obstacle]
    folder = tmp_path / "folder"
    make(folder)
    assert message_of(lambda: WRITERS[writer](folder / below)) == (
        f"{folder / below} could not be written: {folder} {reason}; move it away and {RESUME}"
    )


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_in_place_of_a_file(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    (path / "kept").mkdir(parents=True)
    if writer == "log":
        pytest.skip("the reader of logs removes it")
    assert message_of(lambda: WRITERS[writer](path)) == (
        f"{path} could not be written: {path} is a folder; move it away and {RESUME}"
    )
    assert [file.name for file in tmp_path.rglob("*")] == ["x.json", "kept"]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_something_else_in_place_of_the_checkpoints(obstacle: str, tmp_path: Path) -> None:
    make, reason = OBSTACLES[obstacle]
    make(tmp_path / "folder")
    checkpoints = Checkpoints(tmp_path / "folder", "stage", "key")

    def locked() -> None:
        with checkpoints.lock():
            pass

    for act in (locked, lambda: checkpoints.save("run", {})):
        assert f"could not be written: {tmp_path / 'folder'} {reason}; move it away" in message_of(act)


@pytest.mark.parametrize("obstacle", ["a dangling link", "a loop"])
def test_prepared_data_on_a_disk_that_is_not_mounted(obstacle: str, tmp_path: Path) -> None:
    make, reason = OBSTACLES[obstacle]
    make(tmp_path / "folder")
    assert message_of(lambda: prepared_digits(tmp_path / "folder")) == (
        f"{tmp_path / 'folder'} could not be written: {tmp_path / 'folder'} {reason}; move it away, or restore what it "
        "names"
    )


def test_a_disk_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    assert message_of(lambda: write_json(tmp_path / "x.json", {})) == (
        f"{tmp_path / 'x.json'} could not be accessed: Input/output error; check the disk and {RESUME}"
    )


def test_a_link_to_a_file_is_replaced_and_its_target_is_kept(tmp_path: Path) -> None:
    """DVC's cache may link its files into the project, and they must not change."""
    cached, path = tmp_path / "cached.json", tmp_path / "x.json"
    write_sealed(cached, {"a": 1})
    path.symlink_to(cached)
    write_sealed(path, {"a": 2})
    assert (read_json(path, "s"), read_json(cached, "s")) == ({"a": 2}, {"a": 1})
    save_weights(nn.Linear(1, 1), path)
    load_weights(nn.Linear(1, 1), path)
    assert read_json(cached, "s") == {"a": 1}


def test_outputs_on_another_disk(done: Path, tmp_path: Path) -> None:
    """The folders are links to folders elsewhere, in a project whose path has unusual characters."""
    before = {path: path.read_bytes() for path in Path("outputs/channels").glob("*")}
    project = shutil.move(done, tmp_path / "a b'ü\n#%?&")
    os.chdir(project)
    for name in ("outputs", "data/prepared", "checkpoints"):
        elsewhere = tmp_path / "disk" / name
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        if Path(name).is_dir():
            shutil.move(name, elsewhere)
        elsewhere.mkdir(exist_ok=True)
        Path(name).symlink_to(elsewhere)
    for arguments in (["prepare"], ["resources"], ["allocate"], ["retrain", "uniform"], ["report"]):
        stage(*arguments)
    assert all(Path(name).is_symlink() for name in ("outputs", "data/prepared", "checkpoints"))
    assert {path: path.read_bytes() for path in before} == before


def test_a_stage_whose_output_cannot_be_written(done: Path) -> None:
    a_dangling_link(Path("outputs/channels"))
    assert error_of("allocate", trains=True).startswith("outputs/channels/")
