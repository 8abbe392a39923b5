"""A full disk, a quota and a read-only folder: one line, nothing half-written, and the last checkpoint is intact.

A limit of the size of files (RLIMIT_FSIZE) makes writing fail in this process as a full disk does.
"""

import contextlib
import errno
import os
import re
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from failures import message_of
from small_data import prepared_digits
from small_project import change_params, error_of, finished_project
from torch import nn

from autoslim.data.prepared import PreparedData, read_info
from autoslim.export.formats import export
from autoslim.files import append_line, read_json, read_lines, write_sealed
from autoslim.pipeline.entry import with_clear_errors
from autoslim.training.checkpoints import Checkpoints, load_weights, save_weights

INTACT = "run again; files written before, such as the last checkpoint, are intact"


@contextlib.contextmanager
def full_disk(limit: int = 1000) -> Iterator[None]:
    """Lets every write beyond ``limit`` bytes of a file fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def error_on_full_disk(act: Callable[[], object], limit: int = 1000) -> str:
    with full_disk(limit):
        return message_of(act)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "stage", "key")
    checkpoints.save("run", {"number": 1, "weights": torch.ones(1000)})
    before = names(tmp_path)
    message = error_on_full_disk(lambda: checkpoints.save("run", {"number": 2, "weights": torch.ones(1000)}))
    assert re.fullmatch(
        rf"{checkpoints.path('run')} could not be written: File too large \([\d.]+ kB needed, [\d.e+]+ [GM]B free\); "
        f"free space and {INTACT}",
        message,
    )
    assert names(tmp_path) == before
    state = checkpoints.load("run")
    assert state is not None
    assert state["number"] == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_each_reason_is_named(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, to: str) -> None:
        raise OSError(code, os.strerror(code), path)

    write_sealed(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(os, "replace", refuse)
    message = message_of(lambda: write_sealed(tmp_path / "a.json", {"a": 2}))
    assert message.startswith(f"{tmp_path / 'a.json'} could not be ")
    assert os.strerror(code) in message
    assert INTACT in message
    assert names(tmp_path) == ["a.json"]
    assert read_json(tmp_path / "a.json", "search") == {"a": 1}


def test_weights_files_and_exports_that_do_not_fit(tmp_path: Path) -> None:
    network, other = nn.Linear(100, 10), nn.Linear(100, 10)
    save_weights(network, tmp_path / "w.safetensors")
    assert "w.safetensors could not be written" in error_on_full_disk(
        lambda: save_weights(other, tmp_path / "w.safetensors")
    )
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.weight, network.weight)
    prepared_digits(tmp_path / "prepared")
    digits = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    info = read_info(tmp_path / "prepared")
    assert "n.pt2 could not be written" in error_on_full_disk(lambda: export(digits, info, tmp_path / "n.pt2", {}))
    assert not list(tmp_path.glob("*n*.pt2"))


def test_a_log_on_a_full_disk_keeps_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "steps.jsonl"
    append_line(log, {"step": 0})
    assert f"{log} could not be written" in error_on_full_disk(lambda: append_line(log, {"step": 1, "x": "y" * 2000}))
    assert [line["step"] for line in read_lines(log)] == [0]
    append_line(log, {"step": 1})
    assert [line["step"] for line in read_lines(log)] == [0, 1]
    assert not capsys.readouterr().err


def test_prepared_data_that_do_not_fit_leave_the_old_ones(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    prepared_digits(folder)
    before = names(tmp_path)
    message = error_on_full_disk(lambda: prepared_digits(folder), 5000)  # the images of the train split have 10 kB
    assert message.startswith(f"{folder} could not be written: File too large (")
    assert names(tmp_path) == before
    assert len(PreparedData.open(folder).images("train")) == 160


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".prepared.partial").mkdir()
    (tmp_path / ".prepared.partial/train.images.npy").touch()
    prepared_digits(tmp_path / "prepared")
    (tmp_path / ".a.partial.json").write_text("half")
    write_sealed(tmp_path / "a.json", {"a": 1})
    assert [name for name in names(tmp_path) if "/" not in name] == ["a.json", "prepared"]


Usage = namedtuple("Usage", "total used free")


def test_free_space_is_checked_before_the_work(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = shutil.copytree(finished_project(tmp_path_factory.getbasetemp()), tmp_path / "project")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(done)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 3000, 3000))
    message = error_of("prepare")
    assert message == (
        "the prepared images need 11.6 kB, but only 3 kB are free at data/prepared; free space, or move the project to "
        "a larger disk"
    )
    change_params(done, {"retrain": {"seeds": [0]}})
    message = error_of("retrain", "uniform")
    assert re.fullmatch(
        r"the checkpoints of this training need [\d.]+ kB, but only 3 kB are free at \S+; free space, or move the "
        "project to a larger disk",
        message,
    )


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_write_of_another_library_that_fails_is_one_line(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    @with_clear_errors
    def command() -> None:
        raise OSError(code, os.strerror(code), "outputs/report/trajectory.png")

    with pytest.raises(SystemExit) as ending:
        command()
    assert ending.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: outputs/report/trajectory.png could not be ")
    assert os.strerror(code) in line


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    @with_clear_errors
    def command() -> None:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    with pytest.raises(ConnectionResetError):
        command()
