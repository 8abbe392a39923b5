"""Memory that runs out: one line with the use and the parameter to lower, and the last checkpoint remains."""

import re
from pathlib import Path

import pytest
import torch
from failures import message_of
from small_data import small_network
from small_project import change_params, error_of, stage, start_project

from autoslim.channels.resize import resize
from autoslim.files import format_bytes
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import memory_errors

NET = """
import os
import torch
from torch import nn
from autoslim.models.architectures import mobilenet_v2

class Hungry(nn.Module):
    steps = 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled() and len(x) > 4:
            Hungry.steps += 1
            if Hungry.steps > 3 * 3:  # in the second epoch: each step of an epoch runs three subnets
                torch.empty(2**58, dtype=torch.uint8)
        return x

def build(num_classes=10):
    return nn.Sequential(Hungry(), mobilenet_v2(num_classes, 8, [[1, 8, 1, 1], [2, 8, 2, 2]], 16, in_channels=1))
"""


def test_a_training_that_needs_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(start_project(tmp_path / "project"))
    Path("net.py").write_text(NET)
    model = {"name": "net.py:build", "kwargs": {}, "leaves": ["0"]}
    change_params(Path(), {"model": model, "supernet": {"epochs": 3, "batch_size": 40}})
    stage("prepare")
    message = error_of("supernet", trains=True)
    assert re.fullmatch(
        r"memory ran out on cpu \(the peak of this process was [\d.]+ [GM]B: .*allocate.*\); "
        r"lower supernet.batch_size, which is 40 and needs a new start, or free memory and run again to continue from "
        r"the last checkpoint",
        message,
    )
    (checkpoint,) = Path("checkpoints").glob("*/supernet.pt")
    assert len(Checkpoints(Path("checkpoints"), *checkpoint.parent.name.rsplit("-", 1)).load("supernet")["rows"]) > 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_kind_of_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 16 * 10**9))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 15 * 10**9)

    def act() -> None:
        with memory_errors(torch.device("cuda", 0), "search.chunk", 500):
            raise error

    message = message_of(act)
    cuda = isinstance(error, torch.OutOfMemoryError)
    assert ("on cuda:0 (the peak was 15 GB; 1 GB of 16 GB are free: CUDA out of memory." in message) == cuda
    assert ("on cpu (the peak of this process was " in message) != cuda
    assert "; lower search.chunk, which is 500 and" in message


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shape$"), memory_errors(torch.device("cpu"), "search.chunk", 500):
        raise RuntimeError("shape")


def test_a_network_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    network, graph = small_network()
    group = next(iter(graph.groups))
    message = message_of(lambda: resize(network, graph, graph.default | {group: 10**13}))
    assert message.startswith(f"the network with these channels (up to {10**13} channels, in {group}) needs ")
    assert message.endswith(" of memory are free on cpu; use fewer channels")
    wide = graph.scaled(2.0, 1)
    needed = sum(tensor.nbytes for tensor in resize(network, graph, wide).state_dict().values())
    monkeypatch.setattr("autoslim.channels.resize._free_memory", lambda device: needed)
    resize(network, graph, wide)
    monkeypatch.setattr("autoslim.channels.resize._free_memory", lambda device: needed - 1)
    assert f"needs {format_bytes(needed)} for its weights" in message_of(lambda: resize(network, graph, wide))
    resize(network, graph, graph.default)


def test_a_supernet_that_does_not_fit_is_refused_by_every_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(start_project(tmp_path / "project", {"supernet": {"width": 1e8}}))
    message = error_of("prepare")
    assert message.startswith("supernet.width is 100000000.0, and the supernet (up to ")
    assert message.endswith("lower supernet.width, or the number of channels of model.name")
