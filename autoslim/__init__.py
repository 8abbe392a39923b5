"""AutoSlim: sets the channel numbers of a convolutional network for a budget (Yu & Huang, 2019).

The names of the Python API are imported when they are first used, so that a stage depends on the modules it needs only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoslim.algorithms.recalibration import recalibrate as recalibrate
    from autoslim.algorithms.sandwich import sandwich_step as sandwich_step
    from autoslim.algorithms.slimming import greedy_slim as greedy_slim
    from autoslim.networks.resizing import resize as resize
    from autoslim.networks.sorting import sort_channels as sort_channels
    from autoslim.networks.supernet import Supernet as Supernet
    from autoslim.networks.tracing import trace as trace

_PLACES = {
    "Supernet": "autoslim.networks.supernet",
    "greedy_slim": "autoslim.algorithms.slimming",
    "recalibrate": "autoslim.algorithms.recalibration",
    "resize": "autoslim.networks.resizing",
    "sandwich_step": "autoslim.algorithms.sandwich",
    "sort_channels": "autoslim.networks.sorting",
    "trace": "autoslim.networks.tracing",
}
__all__ = ["Supernet", "greedy_slim", "recalibrate", "resize", "sandwich_step", "sort_channels", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'autoslim' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_PLACES[name]), name)
