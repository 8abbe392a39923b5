"""AutoSlim: chooses the number of channels of each layer for a budget (Yu & Huang, 2019).

The names of the Python API are imported on first use, so that importing a single module stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoslim.channels.resize import resize as resize
    from autoslim.channels.sort import sort_channels as sort_channels
    from autoslim.search.greedy import greedy_slim as greedy_slim
    from autoslim.supernet.recalibration import recalibrate as recalibrate
    from autoslim.supernet.sandwich import sandwich_step as sandwich_step
    from autoslim.supernet.supernet import Supernet as Supernet
    from autoslim.tracing import trace as trace

_MODULES = {
    "Supernet": "autoslim.supernet.supernet",
    "greedy_slim": "autoslim.search.greedy",
    "recalibrate": "autoslim.supernet.recalibration",
    "resize": "autoslim.channels.resize",
    "sandwich_step": "autoslim.supernet.sandwich",
    "sort_channels": "autoslim.channels.sort",
    "trace": "autoslim.tracing",
}
__all__ = ["Supernet", "greedy_slim", "recalibrate", "resize", "sandwich_step", "sort_channels", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'autoslim' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)
