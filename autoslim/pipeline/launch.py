"""A stage in several processes: started here for the devices of this node, or from outside by torchrun or srun."""

import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autoslim.distributed.ranks import LostRankError, current_world, world_from_environment
from autoslim.errors import UserError
from autoslim.pipeline.assembly import run_context
from autoslim.pipeline.params import Runtime
from autoslim.training.device import RunContext

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_REPORT = "TORCHELASTIC_ERROR_FILE"  # where torch's launcher looks for what ended a process


def rank_count(runtime: Runtime) -> int:
    """How many processes ``runtime.processes`` asks for on this node.

    Raises:
        UserError: there are not as many CUDA devices, or the device named is a single one.
    """
    import torch

    asked, device = runtime.processes, runtime.device
    visible = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if asked == "auto":
        return max(1, visible)
    if asked > 1 and device not in ("auto", "cuda", "cpu"):
        raise UserError(
            f"runtime.processes is {asked}, but runtime.device {device!r} is one device; set runtime.device to cuda "
            "or cpu, or runtime.processes to 1"
        )
    if visible and asked > visible:
        raise UserError(
            f"runtime.processes is {asked}, but {visible} CUDA devices are visible; set runtime.processes to auto, or "
            "runtime.device to cpu"
        )
    return asked


def launch(runtime: Runtime, stage: str, *arguments: str) -> bool:
    """Runs a stage in as many processes as are asked for and waits for them, or gives False: run it here.

    That is where one is asked for, or this process is one of several already.

    Raises:
        UserError: one of them failed, for the reason it told; the others were stopped.
    """
    if world_from_environment(os.environ) is not None:
        return False
    count = rank_count(runtime)
    if count == 1:
        return False
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the processes: a lost one gives a page of warnings
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"autoslim-{os.getpid()}",
        max_restarts=0,
        local_addr="localhost",  # a machine's own name does not always resolve
    )
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    logged = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what failed is told here, once
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "autoslim.pipeline.launch", stage, *arguments)
    except ChildFailedError as error:
        raise UserError(_reason(error.failures.values(), count)) from None
    except SignalException:
        raise KeyboardInterrupt from None
    finally:
        logging.disable(logged)
        for number, handler in handlers.items():
            with contextlib.suppress(ValueError):  # not in the main thread: the launcher changed none either
                signal.signal(number, handler)
    return True


@contextlib.contextmanager
def distributed_context(runtime: Runtime) -> Iterator[RunContext]:
    """The machine of ``machine``, together with the other processes of this run; the first one alone speaks."""
    world = current_world()
    context = run_context(runtime, world)
    with contextlib.ExitStack() as stack:
        stack.enter_context(world.process_group(context.device))
        if not world.is_rank_zero:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        yield context


def _reason(failures: Any, count: int) -> str:
    """Of all that ended, what ended first of itself: the others only lost it."""
    told = sorted(failures, key=lambda f: (f.error_file_data.get("kind") == "lost", f.timestamp, f.local_rank))[0]
    kind = told.error_file_data.get("kind")
    if kind in ("mistake", "lost"):
        return str(told.message)
    if kind == "defect":
        print(told.message, file=sys.stderr, end="")
        how = "failed as told above"
    elif told.exitcode < 0:
        how = f"was killed ({told.signal_name()})"
    else:
        how = f"ended with exit code {told.exitcode}"
    return (
        f"process {told.local_rank} of {count} {how}, and the others were stopped; run it again to go on from the last "
        "checkpoint"
    )


def _work(stage: str, arguments: Sequence[str]) -> None:
    """One process of those that ``launched`` starts; what ends it is written down for the one that waits."""
    if os.environ["RANK"] == "0":  # it tracks, and its run is to end as killed; the others need no notice
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    sys.argv = [f"{stage}.py", *arguments]
    try:
        importlib.import_module(f"autoslim.pipeline.{stage}").run(*arguments)
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would be told as a defect of what is ending
        sys.exit(130)
    except LostRankError as error:
        _report("lost", str(error))
    except UserError as error:
        _report("mistake", str(error))
    except Exception:
        _report("defect", traceback.format_exc())


def _end_with(parent: int) -> None:
    """Whoever kills the process that waits means the run: nobody else would end this one."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    os._exit(1)


def _report(kind: str, message: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report = {"kind": kind, "message": message, "timestamp": int(time.time())}
    Path(os.environ[_REPORT]).write_text(json.dumps(report))
    sys.exit(1)


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2:])
