"""AutoSlim: chooses the number of channels of each layer for a budget (Yu & Huang, 2019).

The names of the Python API are imported on first use, so that importing a single module stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoslim.channels.grid import Grid as Grid
    from autoslim.channels.grid import GridSpec as GridSpec
    from autoslim.channels.limits import GroupLimits as GroupLimits
    from autoslim.channels.resize import current_channels as current_channels
    from autoslim.channels.resize import resize as resize
    from autoslim.channels.sort import sort_channels as sort_channels
    from autoslim.errors import UserError as UserError
    from autoslim.export.elastic import load_elastic as load_elastic
    from autoslim.resources.costs import Costs as Costs
    from autoslim.resources.latency.table import LatencyTable as LatencyTable
    from autoslim.slimming.baselines import baseline_channels as baseline_channels
    from autoslim.slimming.networks import extract_network as extract_network
    from autoslim.slimming.networks import load_latency_table as load_latency_table
    from autoslim.slimming.networks import load_network as load_network
    from autoslim.slimming.networks import measure_latency_table as measure_latency_table
    from autoslim.slimming.networks import save_network as save_network
    from autoslim.slimming.networks import saved_channels as saved_channels
    from autoslim.slimming.search import SearchProgress as SearchProgress
    from autoslim.slimming.search import Trajectory as Trajectory
    from autoslim.slimming.search import TrajectoryPoint as TrajectoryPoint
    from autoslim.slimming.search import refine_channels as refine_channels
    from autoslim.slimming.search import search_channels as search_channels
    from autoslim.slimming.search import uniform_channels as uniform_channels
    from autoslim.slimming.slim import Slimmed as Slimmed
    from autoslim.slimming.slim import slim as slim
    from autoslim.supernet.recalibration import recalibrate as recalibrate
    from autoslim.supernet.sandwich import random_subnet as random_subnet
    from autoslim.supernet.sandwich import sandwich_step as sandwich_step
    from autoslim.supernet.supernet import Supernet as Supernet
    from autoslim.tasks.measure import Measure as Measure
    from autoslim.tasks.task import Task as Task
    from autoslim.tracing import trace as trace

_MODULES = {
    "Costs": "autoslim.resources.costs",
    "Grid": "autoslim.channels.grid",
    "GridSpec": "autoslim.channels.grid",
    "GroupLimits": "autoslim.channels.limits",
    "LatencyTable": "autoslim.resources.latency.table",
    "Measure": "autoslim.tasks.measure",
    "SearchProgress": "autoslim.slimming.search",
    "Slimmed": "autoslim.slimming.slim",
    "Supernet": "autoslim.supernet.supernet",
    "Task": "autoslim.tasks.task",
    "Trajectory": "autoslim.slimming.search",
    "TrajectoryPoint": "autoslim.slimming.search",
    "UserError": "autoslim.errors",
    "baseline_channels": "autoslim.slimming.baselines",
    "current_channels": "autoslim.channels.resize",
    "extract_network": "autoslim.slimming.networks",
    "load_elastic": "autoslim.export.elastic",
    "load_latency_table": "autoslim.slimming.networks",
    "load_network": "autoslim.slimming.networks",
    "measure_latency_table": "autoslim.slimming.networks",
    "random_subnet": "autoslim.supernet.sandwich",
    "recalibrate": "autoslim.supernet.recalibration",
    "refine_channels": "autoslim.slimming.search",
    "resize": "autoslim.channels.resize",
    "sandwich_step": "autoslim.supernet.sandwich",
    "save_network": "autoslim.slimming.networks",
    "saved_channels": "autoslim.slimming.networks",
    "search_channels": "autoslim.slimming.search",
    "slim": "autoslim.slimming.slim",
    "sort_channels": "autoslim.channels.sort",
    "trace": "autoslim.tracing",
    "uniform_channels": "autoslim.slimming.search",
}
__all__ = [
    "Costs",
    "Grid",
    "GridSpec",
    "GroupLimits",
    "LatencyTable",
    "Measure",
    "SearchProgress",
    "Slimmed",
    "Supernet",
    "Task",
    "Trajectory",
    "TrajectoryPoint",
    "UserError",
    "baseline_channels",
    "current_channels",
    "extract_network",
    "load_elastic",
    "load_latency_table",
    "load_network",
    "measure_latency_table",
    "random_subnet",
    "recalibrate",
    "refine_channels",
    "resize",
    "sandwich_step",
    "save_network",
    "saved_channels",
    "search_channels",
    "slim",
    "sort_channels",
    "trace",
    "uniform_channels",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'autoslim' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
