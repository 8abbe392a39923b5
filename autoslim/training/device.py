"""The run context: device, memory layout, precision and random number generators."""

import contextlib
import random
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from autoslim.distributed.ranks import SINGLE, World
from autoslim.errors import UserError, first_line
from autoslim.files import format_bytes

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class RunContext:
    """The device and processes that a stage runs on. No result depends on them, so checkpoint keys leave them out."""

    device: torch.device
    workers: int
    checkpoint_every_s: float = 300.0
    world: World = SINGLE


def select_device(name: str = "auto", world: World = SINGLE, *, parameter: str = "runtime.device") -> torch.device:
    """Returns the device ``name``; ``auto`` is the first CUDA device if there is one, else the CPU.

    Each of several processes on a node gets a different CUDA device.

    Raises:
        UserError: the device is not available, or there are more processes than devices.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    devices = torch.cuda.device_count() if name == "cuda" and not world.is_single else 0
    if devices > 1:  # if only one is visible, the launcher has already assigned it
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
        # Every width of a supernet is a new shape, and autotuning would run for each of them.
        torch.backends.cudnn.benchmark = False
        torch.cuda.set_device(device)  # checkpoints store the generator of the current device
    return device


@contextlib.contextmanager
def memory_errors(device: torch.device, parameter: str, images: int) -> Iterator[None]:
    """Raises ``UserError`` if memory runs out within the block.

    Args:
        parameter: the parameter that sets the number of images that are processed at once, and so the memory.
        images: its value.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or "bad_alloc" in str(error)
        if not cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        if device.type == "cuda" and not cpu:
            free, total = torch.cuda.mem_get_info(device)
            peak = torch.cuda.max_memory_allocated(device)
            use = f"the peak was {format_bytes(peak)}; {format_bytes(free)} of {format_bytes(total)} are free"
        else:
            # in kB on Linux and in bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            use = f"the peak of this process was {format_bytes(peak)}"
        raise UserError(
            f"memory ran out on {'cpu' if cpu else device} ({use}: {first_line(error)}); lower {parameter}, which is "
            f"{images} and needs a new start, or free memory and run again to continue from the last checkpoint"
        ) from error


def autocast(device: torch.device, precision: Precision) -> Callable[[], torch.autocast]:
    """Returns a factory of autocast contexts for ``precision``; with ``fp32`` they have no effect."""
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=True)


def to_device(network: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Moves a network to the device in place; if ``channels_last``, also to the channels-last memory format."""
    network.to(device)
    if channels_last:
        to_channels_last(network)
    return network


def to_channels_last(network: nn.Module) -> None:
    """Moves the tensors of rank 4 to the channels-last memory format in place; torch refuses others, as of Conv3d."""
    network._apply(lambda tensor: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor)


def rng_state() -> dict[str, Any]:
    """Returns the states of torch's global random number generators, which dropout uses."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seeds torch's global generators. The data order and random widths use others, keyed by (seed, step)."""
    torch.manual_seed(seed)


def seed_step(root: int, step: int, rank: int) -> None:
    """Seeds torch's global generators for one step on one rank, so that dropout differs between ranks."""
    torch.manual_seed(random.Random(f"{root}/{step}/{rank}").getrandbits(63))
