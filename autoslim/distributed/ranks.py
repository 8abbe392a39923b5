"""The processes that share one run: what each knows of the others, and how they agree. One process is the normal case.

``torch.distributed`` is imported only where there are several processes.
"""

import contextlib
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from autoslim.errors import UserError, first_line

PATIENCE = timedelta(minutes=30)
"""How long a process waits in one collective operation for the others before it gives up."""

_POLL_S = 0.02


class LostRankError(UserError):
    """Another process of the run has gone; what it says of itself is the reason."""


class World:
    """This process's place among those of the run. Alone, everything here is the identity.

    Args:
        rank: from 0; the first one alone writes files, tracks and speaks.
        local_rank: its number on its node, which has ``local_size``.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size, self.local_rank, self.local_world_size = (
            rank,
            world_size,
            local_rank,
            local_world_size,
        )
        self._store: Any = None  # a few named values on the first node
        self._told = 0

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.world_size == 1

    @contextlib.contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """The process group of torch, with NCCL where the device is CUDA's and gloo elsewhere, until the block ends.

        Raises:
            LostRankError: not all processes came.
        """
        if self.is_single:
            yield
            return
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        cuda = device.type == "cuda"
        try:
            self._store, _, _ = next(iter(rendezvous("env://", self.rank, self.world_size, timeout=PATIENCE)))
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=PATIENCE,
                device_id=device if cuda else None,
            )
        except RuntimeError as error:
            raise self._lost(error) from error
        try:
            yield
            self._sign_off()
        finally:
            dist.destroy_process_group()
            self._store = None

    def _sign_off(self) -> None:
        """The first process goes last, for it may be the one that holds what the others still read."""
        with self._together():
            self._store.set(f"done/{self.rank}", b"")
            if self.is_rank_zero:
                self._store.wait([f"done/{rank}" for rank in range(self.world_size)], PATIENCE)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits on each."""
        if not self.is_single:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(n, ...) -> (size, n, ...): each process's tensor, all of this shape, by rank."""
        if self.is_single:
            return tensor[None]
        import torch.distributed as dist

        parts = tensor.new_empty((self.world_size * len(tensor), *tensor.shape[1:]))
        with self._together():
            dist.all_gather_into_tensor(parts, tensor.contiguous())
        return parts.view(self.world_size, *tensor.shape)

    def on_rank_zero(self, act: Callable[[], Any]) -> Any:
        """What ``act`` gives, run by the first process alone; the others wait, however long that takes.

        It crosses over pickled, so it should be a small value.
        """
        if self.is_single:
            return act()
        self._told += 1
        key = f"told/{self._told}"
        with self._together():
            if not self.is_rank_zero:
                while not self._store.check([key]):
                    time.sleep(_POLL_S)
                return pickle.loads(self._store.get(key))
        value = act()
        with self._together():
            self._store.set(key, pickle.dumps(value))
        return value

    @contextlib.contextmanager
    def entered_on_rank_zero(self, own: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """The first process enters ``own`` (a lock, say) for all; the others wait until it has, however long."""
        with contextlib.ExitStack() as stack:
            self.on_rank_zero(lambda: stack.enter_context(own))
            yield

    def agree(self, value: object, what: str) -> None:
        """Raises:
        UserError: ``value`` is another one than that of the first process.
        """
        theirs = self.on_rank_zero(lambda: value)
        if theirs != value:
            raise UserError(
                f"process {self.rank} of {self.world_size} has other {what} ({value}) than the first one ({theirs}); "
                "let all processes see the same files, on a file system that they share, and run the same code"
            )

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch.distributed, whose own kinds are all of this one
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> LostRankError:
        return LostRankError(
            f"process {self.rank} of {self.world_size} lost the others ({first_line(error)}); what ended first says "
            "why; run it again to go on from the last checkpoint"
        )


SINGLE = World()


def world_from_environment(environment: Mapping[str, str]) -> World | None:
    """This process's place as torchrun or Slurm's srun set it in the environment; None where neither did.

    Raises:
        UserError: RANK is set, but what else torchrun sets is missing, or is no number.
    """
    names = {
        "rank": "RANK",
        "world_size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_world_size": "LOCAL_WORLD_SIZE",
    }
    if names["rank"] not in environment:
        if environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":  # of srun alone: a batch script has SLURM_NTASKS too
            return None
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"])
        environment = {
            "RANK": environment.get("SLURM_PROCID", "0"),
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
            "LOCAL_WORLD_SIZE": re.split(r"[(,]", tasks)[0],  # "4(x2),3": of the nodes in turn, the fullest first
        }
    values = {}
    for name, variable in names.items():
        text = environment.get(variable, "")
        if name == "local_world_size":  # not all launchers tell of it
            text = text or environment["WORLD_SIZE"]
        if not text.isdecimal():
            raise UserError(
                f"the environment has RANK, but {variable} is {text!r}; start the processes with torchrun or srun, or "
                "unset RANK"
            )
        values[name] = int(text)
    return World(**values)


def slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the processes of a Slurm step meet, as torch looks for it: its first node, and a port of the job's number.

    Nothing where MASTER_ADDR and MASTER_PORT are set already.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", "localhost")  # gpu[003-006,009],big1
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    first = "".join(filter(None, found.groups())) if found else "localhost"
    port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000
    wanted = {"MASTER_ADDR": first, "MASTER_PORT": str(port)}
    return {name: value for name, value in wanted.items() if name not in environment}


def current_world() -> World:
    """This process's place by its environment: one of several, or alone."""
    own = world_from_environment(os.environ) or SINGLE
    if not own.is_single:
        os.environ.update(slurm_rendezvous(os.environ))
    return own
