"""Start of a process that ``launch`` starts. Run as a script, so that a killed parent is noticed before the imports."""

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "AUTOSLIM_PARENT"
"""The variable with the process id of the parent."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def stop_with_parent(parent: int) -> None:
    """Makes this process end once the process ``parent`` has ended. A killed parent cannot stop its workers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # at once, also while a library blocks Python
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of an import
    stop_with_parent(int(os.environ[PARENT]))
    from autoslim.pipeline.launch import run_rank

    run_rank(sys.argv[1], sys.argv[2:])
