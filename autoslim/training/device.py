"""Where and how precisely the work runs: device, memory layout and dtype."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from autoslim.distributed.ranks import SINGLE, World
from autoslim.errors import UserError, first_line

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class RunContext:
    """Where the work runs. Nothing here is part of a result's identity."""

    device: torch.device
    workers: int
    checkpoint_every_s: float = 300.0
    world: World = SINGLE


def select_device(name: str = "auto", world: World = SINGLE, *, parameter: str = "runtime.device") -> torch.device:
    """``auto`` is the first CUDA device, else the CPU. Several processes on a node have one CUDA device each.

    Raises:
        UserError: the device named is not there, or there are more processes than devices.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    devices = torch.cuda.device_count() if name == "cuda" and not world.is_single else 0
    if devices > 1:  # if one is visible, it is this one's
        if world.local_world_size > devices:
            raise UserError(
                f"there are {world.local_world_size} processes on this node, but {devices} CUDA devices are visible; "
                f"start {devices}, or set {parameter} to cpu"
            )
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{parameter} {name!r} is not available here ({first_line(error)}); set it to auto or cpu"
        ) from error
    if device.type == "cuda":
        # Every width of a supernet is a new shape: autotuning would run again at each.
        torch.backends.cudnn.benchmark = False
        torch.cuda.set_device(device)  # whose generator is the one that checkpoints keep
    return device


def worker_count(number: int | Literal["auto"], world: World = SINGLE) -> int:
    """World that decode images; ``auto`` leaves one core to the training, and shares the node's with the others."""
    if number == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(16, max(1, cores // world.local_world_size - 1))
    return number


def autocast(device: torch.device, precision: Precision) -> Callable[[], torch.autocast]:
    """A function that makes the autocast context of a step: bf16 where asked for, a context without effect for fp32."""
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=True)


def to_device(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Moves a network, in place, to the device and, where asked for, its convolutions to the channels-last layout."""
    network.to(device)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    return network


def rng_state() -> dict[str, Any]:
    """The state of torch's global generators (dropout draws from them)."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds torch's global generators.

    Data order and random widths have generators of their own, keyed by (seed, step).
    """
    torch.manual_seed(seed)


def seed_step(root: int, step: int, rank: int) -> None:
    """Seeds torch's global generators for a step of one of several processes, so that each has draws of its own."""
    torch.manual_seed(random.Random(f"{root}/{step}/{rank}").getrandbits(63))
