"""The ranks of a distributed run and their collective operations. A single process is the normal case.

``torch.distributed`` is imported only if there are several processes.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from autoslim.errors import UserError, first_line

TIMEOUT = timedelta(minutes=30)
"""Longest time that a rank waits for the others in one collective operation."""

SRUN_TORCHRUN = (
    "srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc-per-node=gpu --rdzv-backend=c10d "
    "--rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$(hostname):29500 stages/supernet.py"
)
"""The command that starts a stage on several nodes, in a Slurm batch script."""

STORE = "AUTOSLIM_STORE"
"""The variable with the path of the file in which the ranks of one node meet. No other user may have access to it."""

_POLL_S = 0.02


class LostRankError(UserError):
    """Raised if another rank has ended. The error of that rank is the cause."""


class World:
    """The rank of this process among all processes of the run. In a single process every collective is the identity.

    Args:
        rank: rank of this process, from 0. Only rank 0 writes files, tracks and prints.
        world_size: number of processes.
        local_rank: rank within the node.
        local_world_size: number of processes on the node.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0, local_world_size: int = 1) -> None:
        self.rank, self.world_size, self.local_rank, self.local_world_size = (
            rank,
            world_size,
            local_rank,
            local_world_size,
        )
        self._store: Any = None  # the key-value store of the rendezvous
        self._broadcasts = 0

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        return self.world_size == 1

    @contextlib.contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """Initialises torch's process group, with NCCL on a CUDA device and gloo elsewhere, until the block ends.

        Raises:
            LostRankError: not all ranks joined.
        """
        if self.is_single:
            yield
            return
        import torch.distributed as dist

        cuda = device.type == "cuda"
        try:
            self._store = self._rendezvous()
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.world_size,
                timeout=TIMEOUT,
                device_id=device if cuda else None,
            )
        except RuntimeError as error:
            raise self._lost(error) from error
        try:
            yield
            self._wait_for_all()
        finally:
            dist.destroy_process_group()
            self._store = None

    def _rendezvous(self) -> Any:
        """Returns the key-value store of all ranks: the file that ``STORE`` names, else torchrun's server."""
        from torch.distributed import FileStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        if path := os.environ.get(STORE):
            store = FileStore(path, self.world_size)
            store.set_timeout(TIMEOUT)
            return store
        return next(iter(rendezvous("env://", self.rank, self.world_size, timeout=TIMEOUT)))[0]

    def _wait_for_all(self) -> None:
        """Makes rank 0 end last, because it may host the store that the other ranks still read."""
        with self._lost_rank_errors():
            self._store.set(f"done/{self.rank}", b"")
            if self.is_rank_zero:
                self._store.wait([f"done/{rank}" for rank in range(self.world_size)], TIMEOUT)

    def add(self, tensor: Tensor) -> Tensor:
        """Sums ``tensor`` over all ranks in place (all-reduce). Every rank gets the same bits."""
        if not self.is_single:
            import torch.distributed as dist

            with self._lost_rank_errors():
                dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks (all-gather), all of one shape: (n, ...) -> (world size, n, ...)."""
        if self.is_single:
            return tensor[None]
        import torch.distributed as dist

        parts = tensor.new_empty((self.world_size * len(tensor), *tensor.shape[1:]))
        with self._lost_rank_errors():
            dist.all_gather_into_tensor(parts, tensor.contiguous())
        return parts.view(self.world_size, *tensor.shape)

    def on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """Calls ``function`` on rank 0 and returns its result on every rank.

        The other ranks wait without a time limit. The result crosses as JSON, so that nothing that is read from another
        process can run code: it must consist of numbers, text, None, lists and dictionaries with text as keys.
        """
        if self.is_single:
            return function()
        self._broadcasts += 1
        key = f"broadcast/{self._broadcasts}"
        # Uses the store instead of a collective, because collectives have a time limit, which a validation may exceed.
        with self._lost_rank_errors():
            if not self.is_rank_zero:
                while not self._store.check([key]):
                    time.sleep(_POLL_S)
                return json.loads(self._store.get(key))
        value = function()
        with self._lost_rank_errors():
            self._store.set(key, json.dumps(value))
        return value

    @contextlib.contextmanager
    def entered_on_rank_zero(self, context: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """Enters ``context``, such as a lock, on rank 0 for all ranks. The other ranks wait until it is entered."""
        with contextlib.ExitStack() as stack:
            self.on_rank_zero(lambda: stack.enter_context(context))
            yield

    def agree(self, value: object, what: str) -> None:
        """Checks that ``value`` is the same on every rank.

        Raises:
            UserError: ``value`` differs from that of rank 0.
        """
        expected = self.on_rank_zero(lambda: value)
        if expected != value:
            raise UserError(
                f"rank {self.rank} of {self.world_size} differs from rank 0 in its {what}: {value} instead of "
                f"{expected}; start all ranks with the same code and the same files, on a shared file system"
            )

    @contextlib.contextmanager
    def _lost_rank_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the base class of torch.distributed's errors
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> LostRankError:
        return LostRankError(
            f"rank {self.rank} of {self.world_size} lost the connection to the others ({first_line(error)}); the cause "
            "is the error of the rank that ended first; run it again to continue from the last checkpoint"
        )


SINGLE = World()


def world_from_environment(environment: Mapping[str, str]) -> World | None:
    """Returns the rank of this process from torchrun's environment variables, or None without torchrun.

    Raises:
        UserError: RANK is set, but another of torchrun's variables is missing or not a number; or srun started several
            tasks without torchrun.
    """
    names = {
        "rank": "RANK",
        "world_size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_world_size": "LOCAL_WORLD_SIZE",
    }
    if names["rank"] not in environment:
        tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")  # only srun sets it; a batch script has SLURM_NTASKS
        if tasks != "1":
            raise UserError(
                f"SLURM_STEP_NUM_TASKS is {tasks}, but RANK is not set, so {tasks} independent runs would write "
                f"the same files; start one torchrun per node: {SRUN_TORCHRUN}"
            )
        return None
    values = {}
    for name, variable in names.items():
        text = environment.get(variable, "")
        if name == "local_world_size":  # not every launcher sets it
            text = text or environment["WORLD_SIZE"]
        if not text.isdecimal():
            raise UserError(
                f"RANK is set, but {variable} is {text!r}; start the processes with torchrun, or unset RANK"
            )
        values[name] = int(text)
    return World(**values)


def current_world() -> World:
    """Returns the rank of this process and the world size; without torchrun, that of a single process."""
    return world_from_environment(os.environ) or SINGLE
