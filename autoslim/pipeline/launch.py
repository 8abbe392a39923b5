"""Runs a stage in several processes, which ``launch`` starts on one node and torchrun starts on several."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoslim.distributed.ranks import STORE, LostRankError, current_world, world_from_environment
from autoslim.errors import UserError, worker_error
from autoslim.files import os_error
from autoslim.pipeline.assembly import run_context
from autoslim.pipeline.params import Runtime
from autoslim.pipeline.start_rank import PARENT
from autoslim.training.device import RunContext

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_START = Path(__file__).with_name("start_rank.py")
_COMPLETE = "complete-"  # and the rank: a file that a rank writes at the end of the stage
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def rank_count(runtime: Runtime) -> int:
    """Returns the number of processes on this node according to ``runtime.processes``.

    Raises:
        UserError: there are fewer CUDA devices than processes, or ``runtime.device`` names a single device.
    """
    import torch

    count, device = runtime.processes, runtime.device
    visible = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if count == "auto":
        return max(1, visible)
    if count > 1 and device not in ("auto", "cuda", "cpu"):
        raise UserError(
            f"runtime.processes is {count}, but runtime.device {device!r} is one device; set runtime.device to cuda "
            "or cpu, or runtime.processes to 1"
        )
    if visible and count > visible:
        raise UserError(
            f"runtime.processes is {count}, but {visible} CUDA devices are visible; set runtime.processes to auto, or "
            "runtime.device to cpu"
        )
    return count


def launch(runtime: Runtime, stage: str, *arguments: str) -> bool:
    """Runs a stage in as many processes as ``runtime`` sets, and waits for them.

    Returns:
        True if the stage has run. False if the caller must run it, because a single process is set or because this
        process is already one of several.

    Raises:
        UserError: a process failed. The message is that process's error. The other processes were stopped.
    """
    if world_from_environment(os.environ) is not None:
        return False
    count = rank_count(runtime)
    if count == 1:
        return False
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch would log the error that is raised below
    with tempfile.TemporaryDirectory(prefix="autoslim-") as folder:  # only this user may enter it
        ranks, processes = range(count), None
        try:
            processes = start_processes(
                name=stage,
                entrypoint=sys.executable,
                args=dict.fromkeys(ranks, ("-P", str(_START), stage, *arguments)),
                envs={rank: _environment(rank, count, folder) for rank in ranks},
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            result = processes.wait(period=0.1)
        except SignalException as error:
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)  # a second one must not end this process before the ranks
            if processes is not None:
                processes.close(error.sigval)
            raise KeyboardInterrupt from None
        finally:
            logging.disable(disabled)
            for number, handler in handlers.items():
                with contextlib.suppress(ValueError):  # not in the main thread: torch set no handlers
                    signal.signal(number, handler)
        if result is not None and result.is_failed():
            raise UserError(_reason(result.failures.values(), count))
        if incomplete := [rank for rank in ranks if not Path(folder, f"{_COMPLETE}{rank}").exists()]:
            raise UserError(
                f"rank {incomplete[0]} of {count} ended before the stage was complete, because sys.exit or os._exit "
                "was called; remove it from your code"
            )
    return True


def _environment(rank: int, count: int, folder: str) -> dict[str, str]:
    """Returns the variables of a rank. The ranks of one node meet in a file, and their sockets use only loopback."""
    number, size = str(rank), str(count)
    variables = {
        "RANK": number,
        "WORLD_SIZE": size,
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": size,
        STORE: str(Path(folder, "store")),
        PARENT: str(os.getpid()),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # a lost rank logs a page of warnings
    }
    if loopback := {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
        variables |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback.pop())
    return variables


@contextlib.contextmanager
def distributed_context(runtime: Runtime, run: str) -> Iterator[RunContext]:
    """Yields the run context of this process within the run's process group. Only rank 0 prints.

    Args:
        run: the name of the run's checkpoints, which contains the key of all that decides its result.

    Raises:
        UserError: ``run`` differs from that of rank 0, because a file was edited while the ranks started.
    """
    world = current_world()
    context = run_context(runtime, world)
    with contextlib.ExitStack() as stack:
        stack.enter_context(world.process_group(context.device))
        if not world.is_rank_zero:
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        world.agree(run, "parameters, data or code")
        yield context


def _reason(failures: Iterable["ProcessFailure"], count: int) -> str:
    """Returns the message for the user: the first error of a rank other than a lost connection to another rank."""
    failure = min(failures, key=lambda f: (_recorded(f, LostRankError) is not None, f.timestamp, f.local_rank))
    for kind in (UserError, LostRankError):
        if (text := _recorded(failure, kind)) is not None:
            return text
    recorded = failure.error_file_data.get("message")
    if isinstance(recorded, dict):
        print(recorded["extraInfo"]["py_callstack"], file=sys.stderr, end="")
        how = "failed with the error above"
    elif failure.exitcode < 0:
        how = f"was killed ({failure.signal_name()})"
    else:
        how = f"ended with exit code {failure.exitcode}"
    return (
        f"rank {failure.local_rank} of {count} {how}, and the others were stopped; run the stage again to continue "
        "from the last checkpoint"
    )


def _recorded(failure: "ProcessFailure", kind: type[Exception]) -> str | None:
    """Returns the message of the exception that torch's ``@record`` wrote for a rank; None if its class differs."""
    recorded = failure.error_file_data.get("message")
    if not isinstance(recorded, dict):  # no error file: the process was killed, or called os._exit
        return None
    text: str = recorded["message"].removeprefix(f"{kind.__name__}: ")
    # The record has the bare name, which torch._dynamo's UserError shares; the traceback's last line has the module.
    last = f"{kind.__module__}.{kind.__qualname__}: {text}\n"
    return text if recorded["extraInfo"]["py_callstack"].endswith(last) else None


def run_rank(stage: str, arguments: Sequence[str]) -> None:
    """Runs a stage in a process that ``launch`` started. The parent process reports its errors."""
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.argv = [f"{stage}.py", *arguments]
    try:
        record(_run)(stage, arguments)
    except Exception:
        sys.exit(1)  # the parent process prints the recorded error, once for all ranks


def _run(stage: str, arguments: Sequence[str]) -> None:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ["RANK"] == "0":  # rank 0 tracks, and MLflow must record a stopped run as killed
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        importlib.import_module(f"autoslim.pipeline.{stage}").run(*arguments)
        Path(os.environ[STORE]).with_name(f"{_COMPLETE}{os.environ['RANK']}").touch()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second one would be reported as a failure
        sys.exit(130)
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SIGTERM must not interrupt writing the error file
        if isinstance(error, OSError) and (message := os_error(error)):
            raise message from error
        if isinstance(error, RuntimeError) and (message := worker_error(error)):
            raise message from error
        if isinstance(error, UserError) and not isinstance(error, LostRankError):
            raise UserError(str(error)) from error  # not a subclass: the parent reads the class from the traceback
        raise
