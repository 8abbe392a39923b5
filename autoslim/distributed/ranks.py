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


class LostProcessError(UserError):
    """Another process of the run has gone; what it says of itself is the reason."""


class Processes:
    """This process's place among those of the run. Alone, everything here is the identity.

    Args:
        rank: from 0; the first one alone writes files, tracks and speaks.
        local_rank: its number on its node, which has ``local_size``.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._store: Any = None  # a few named values on the first node
        self._told = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """The process group of torch, with NCCL where the device is CUDA's and gloo elsewhere, until the block ends.

        Raises:
            LostProcessError: not all processes came.
        """
        if self.alone:
            yield
            return
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        cuda = device.type == "cuda"
        try:
            self._store, _, _ = next(iter(rendezvous("env://", self.rank, self.size, timeout=PATIENCE)))
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
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
            if self.first:
                self._store.wait([f"done/{rank}" for rank in range(self.size)], PATIENCE)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits on each."""
        if not self.alone:
            import torch.distributed as dist

            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(n, ...) -> (size, n, ...): each process's tensor, all of this shape, by rank."""
        if self.alone:
            return tensor[None]
        import torch.distributed as dist

        parts = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        with self._together():
            dist.all_gather_into_tensor(parts, tensor.contiguous())
        return parts.view(self.size, *tensor.shape)

    def from_first(self, act: Callable[[], Any]) -> Any:
        """What ``act`` gives, run by the first process alone; the others wait, however long that takes.

        It crosses over pickled, so it should be a small value.
        """
        if self.alone:
            return act()
        self._told += 1
        key = f"told/{self._told}"
        with self._together():
            if not self.first:
                while not self._store.check([key]):
                    time.sleep(_POLL_S)
                return pickle.loads(self._store.get(key))
        value = act()
        with self._together():
            self._store.set(key, pickle.dumps(value))
        return value

    @contextlib.contextmanager
    def first_in(self, own: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """The first process enters ``own`` (a lock, say) for all; the others wait until it has, however long."""
        with contextlib.ExitStack() as stack:
            self.from_first(lambda: stack.enter_context(own))
            yield

    def agree(self, value: object, what: str) -> None:
        """Raises:
        UserError: ``value`` is another one than that of the first process.
        """
        theirs = self.from_first(lambda: value)
        if theirs != value:
            raise UserError(
                f"process {self.rank} of {self.size} has other {what} ({value}) than the first one ({theirs}); let all "
                "processes see the same files, on a file system that they share, and run the same code"
            )

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of torch.distributed, whose own kinds are all of this one
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> LostProcessError:
        return LostProcessError(
            f"process {self.rank} of {self.size} lost the others ({first_line(error)}); what ended first says why; "
            "run it again to go on from the last checkpoint"
        )


ALONE = Processes()


def assigned(environment: Mapping[str, str]) -> Processes | None:
    """This process's place as torchrun or Slurm's srun set it in the environment; None where neither did.

    Raises:
        UserError: RANK is set, but what else torchrun sets is missing, or is no number.
    """
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
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
        if name == "local_size":  # not all launchers tell of it
            text = text or environment["WORLD_SIZE"]
        if not text.isdecimal():
            raise UserError(
                f"the environment has RANK, but {variable} is {text!r}; start the processes with torchrun or srun, or "
                "unset RANK"
            )
        values[name] = int(text)
    return Processes(**values)


def meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the processes of a Slurm step meet, as torch looks for it: its first node, and a port of the job's number.

    Nothing where MASTER_ADDR and MASTER_PORT are set already.
    """
    nodes = environment.get("SLURM_STEP_NODELIST", "localhost")  # gpu[003-006,009],big1
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    first = "".join(filter(None, found.groups())) if found else "localhost"
    port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000
    wanted = {"MASTER_ADDR": first, "MASTER_PORT": str(port)}
    return {name: value for name, value in wanted.items() if name not in environment}


def here() -> Processes:
    """This process's place by its environment: one of several, or alone."""
    own = assigned(os.environ) or ALONE
    if not own.alone:
        os.environ.update(meeting_point(os.environ))
    return own
