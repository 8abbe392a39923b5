"""The times of stages: which result they belong to, and that they never disturb a stage."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autoslim.pipeline.times import recorded_time, timed


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc.yaml").touch()
    return tmp_path


def stage(name: str, result: Path, content: str, *, work: Callable[[], object] = lambda: None) -> Callable[..., None]:
    """Returns a stage that writes ``content`` to its result."""

    def run(*_: str) -> None:
        work()
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(content)

    run.__module__ = f"autoslim.pipeline.{name}"
    return run


def test_a_time_belongs_to_a_result(project: Path) -> None:
    result = Path("outputs/search/trajectory.json")
    assert recorded_time("search") is None
    timed(stage("search", result, "first", work=lambda: time.sleep(0.3)))
    seconds, continued = recorded_time("search") or (0, True)
    assert 0.3 <= seconds < 5
    assert not continued
    result.write_text("that of another machine")
    assert recorded_time("search") is None
    timed(stage("search", result, "second"))
    assert recorded_time("search") != (seconds, False)
    result.write_text("first")  # as `dvc checkout` restores it
    assert recorded_time("search") == (seconds, False)


def test_each_method_has_its_time(project: Path) -> None:
    for method in ("uniform", "released/mobilenet_v2-305M"):
        timed(stage("retrain", Path("outputs/retrain", method, "curves.csv"), "the same"), method)
    assert recorded_time("retrain@uniform") is not None
    assert recorded_time("retrain@released/mobilenet_v2-305M") is not None
    assert recorded_time("retrain@autoslim") is None


def test_the_time_of_a_continued_run_is_marked(project: Path) -> None:
    own, other = Path("checkpoints/supernet-0123"), Path("checkpoints/search-0123")
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "state").touch()

    def finish() -> None:  # a run that ends deletes its checkpoints
        (own / "state").unlink()
        own.rmdir()

    curves = Path("outputs/supernet/curves.csv")
    timed(stage("supernet", curves, "", work=finish))
    assert (recorded_time("supernet") or (0, False))[1]
    timed(stage("supernet", curves, ""))
    assert not (recorded_time("supernet") or (0, True))[1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"search": 1}', "\x00"])
def test_a_damaged_file_of_times_is_replaced(project: Path, content: str) -> None:
    Path("checkpoints").mkdir()
    Path("checkpoints/times.json").write_text(content)
    result = Path("outputs/search/trajectory.json")
    assert recorded_time("search") is None
    timed(stage("search", result, "x"))
    assert recorded_time("search") is not None


def test_times_that_cannot_be_written_are_left_out(project: Path) -> None:
    Path("checkpoints").write_text("a file where the folder belongs")
    timed(stage("search", Path("outputs/search/trajectory.json"), "x"))
    assert recorded_time("search") is None


def test_a_failed_stage_and_other_ranks_record_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("x")

    result = Path("outputs/search/trajectory.json")
    with pytest.raises(ValueError, match="x"):
        timed(stage("search", result, "x", work=fail))
    monkeypatch.setenv("RANK", "1")
    timed(stage("search", result, "x"))
    assert recorded_time("search") is None
