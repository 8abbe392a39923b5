"""Several processes of one node: no socket that others can reach, and none of them outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_project import change_params, stage, start_project

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

NET = """
import json, os, pathlib, time
import torch
from torch import nn
from autoslim.models.architectures import mobilenet_v2

def listening(pid):
    # The addresses on which a process listens, as in /proc/net/tcp.
    links = [os.readlink(link) for link in pathlib.Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    found = []
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/{pid}/net/{table}").readlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in links:
                found.append(local.split(":")[0])
    return found

class Waiting(nn.Module):
    def forward(self, x):
        if "RANK" in os.environ and len(x) > 4:
            rank, store = os.environ["RANK"], os.environ.get("AUTOSLIM_STORE", "")
            stat = [oct(os.stat(path).st_mode & 0o777) for path in (os.path.dirname(store), store) if path]
            found = listening(os.getpid()) + listening(os.getppid())
            record = {"rank": rank, "pid": os.getpid(), "listening": found, "modes": stat}
            pathlib.Path(f"rank-{rank}.partial").write_text(json.dumps(record))
            os.rename(f"rank-{rank}.partial", f"rank-{rank}.json")
            time.sleep(60)
        return x

def build(num_classes=10):
    return nn.Sequential(Waiting(), mobilenet_v2(num_classes, 8, [[1, 8, 1, 1], [2, 8, 2, 2]], 16, in_channels=1))
"""

START_S = 240  # of two ranks, on a machine with other work


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a project with prepared data and two processes, whose network waits in its first step."""
    folder = start_project(tmp_path_factory.mktemp("processes") / "project")
    (folder / "net.py").write_text(NET)
    model = {"name": "net.py:build", "kwargs": {}, "leaves": ["0"]}
    change_params(folder, {"model": model, "runtime": {"processes": 2, "device": "cpu"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_ROOT", raising=False)
        patch.chdir(folder)
        stage("prepare")
    return folder


@pytest.fixture
def parent(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Returns the process that waits for the two ranks of the stage supernet."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(project)
    for old in project.glob("rank-*"):
        old.unlink()
    process = subprocess.Popen(
        [sys.executable, "stages/supernet.py"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        for pid in started_in(tmp_path):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> set[int]:
    try:
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def started_in(folder: Path) -> list[int]:
    """Returns the processes whose temporary folder is ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"TMPDIR={folder}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def eventually(ready: Callable[[], Any], within: float) -> Any:
    """Returns the first true value of ``ready``; False after ``within`` seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        if value := ready():
            return value
        time.sleep(0.01)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def recorded(project: Path) -> list[dict[str, Any]]:
    """Returns what the ranks recorded in their first step, once both have."""
    files = list(project.glob("rank-*.json"))
    return [json.loads(file.read_text()) for file in files] if len(files) == 2 else []


def test_local_ranks_listen_on_loopback_only_and_end_with_their_parent(
    project: Path, parent: subprocess.Popen[str]
) -> None:
    """A socket that other machines reach is a way in: torch's own launcher unpickles what it reads from its store."""
    ranks = eventually(lambda: recorded(project), START_S)
    assert ranks
    loopback = {"0100007F", "0" * 24 + "01000000"}
    assert [rank["listening"] for rank in ranks] != [[], []]  # gloo's sockets
    assert {address for rank in ranks for address in rank["listening"]} <= loopback
    assert {tuple(rank["modes"]) for rank in ranks} == {("0o700", "0o644")}
    parent.kill()
    assert eventually(lambda: not any(alive(rank["pid"]) for rank in ranks), 8)


def test_ranks_end_with_a_parent_that_is_killed_during_their_imports(parent: subprocess.Popen[str]) -> None:
    ranks = eventually(lambda: (found := children(parent.pid)) and len(found) == 2 and found, START_S)
    assert ranks
    parent.kill()
    assert eventually(lambda: not any(alive(pid) for pid in ranks), 8)


@pytest.mark.parametrize(
    "ending",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGSEGV, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_one_rank_ends_the_stage_with_one_line(
    ending: signal.Signals, project: Path, parent: subprocess.Popen[str], tmp_path: Path
) -> None:
    ranks = eventually(lambda: recorded(project), 150)
    assert ranks
    [pid] = [rank["pid"] for rank in ranks if rank["rank"] == "1"]
    os.kill(pid, signal.SIGSTOP)  # for a while, as a debugger or a full disk would
    time.sleep(0.5)
    assert parent.poll() is None
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, ending)
    _, errors = parent.communicate(timeout=100)
    assert parent.returncode == 1
    how = "ended with exit code 130" if ending == signal.SIGINT else f"was killed ({ending.name})"
    assert errors.splitlines()[-1] == (
        f"error: rank 1 of 2 {how}, and the others were stopped; run the stage again to continue from the last "
        "checkpoint"
    )
    assert "Traceback" not in errors
    assert eventually(lambda: not started_in(tmp_path), 8)


def test_a_rank_that_exits_does_not_end_a_stage_as_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sys.exit(0) or os._exit(0) in a data set would: the parent process sees the exit code of a success."""
    from failures import message_of

    from autoslim.pipeline import launch
    from autoslim.pipeline.params import Runtime

    runtime = Runtime.model_construct(processes=2, device="cpu")
    script = tmp_path / "rank.py"
    monkeypatch.setattr(launch, "_START", script)
    complete = "import os; open(os.path.dirname(os.environ['AUTOSLIM_STORE']) + '/complete-' + os.environ['RANK'], 'w')"
    script.write_text(f"{complete}\n")
    assert launch.launch(runtime, "supernet")
    script.write_text(f"import os\nif os.environ['RANK'] == '0':\n    {complete}\n")
    assert message_of(lambda: launch.launch(runtime, "supernet")) == (
        "rank 1 of 2 ended before the stage was complete, because sys.exit or os._exit was called; remove it from your "
        "code"
    )
