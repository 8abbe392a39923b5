"""What the stages of an experiment share in MLflow: the run above theirs, its summary, its data set and its view.

An experiment is a set of parameters that determine a result. This module does not import MLflow; ``tracking`` sends
what is made here.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autoslim.resources.budgets import UNITS, format_budgets
from autoslim.tasks.measure import TOP1, Measure

if TYPE_CHECKING:
    from autoslim.data.prepared import DataInfo
    from autoslim.pipeline.params import Params

EXPERIMENT = "experiment"
"""Value of the tag ``stage`` of a run that has the stages of an experiment as its children."""

VIEW = "autoslim"
"""Key of the view of MLflow's UI that has a column for each number of the summary."""

_NO_RESULT = ("tracking", "runtime", "report")  # sections that do not change a result
_COSTS = {"macs": "macs", "params": "parameters", "memory": "memory_bytes", "latency": "latency_ms"}


@dataclass(frozen=True)
class Experiment:
    """Describes the run of an experiment.

    Attributes:
        name: name of the run, such as ``mobilenet_v2-25%``.
        key: digest of the parameters that determine the result.
        params: the parameters by which experiments usually differ; all others are those of the stages' runs.
        tags: what runs are usually filtered by.
    """

    name: str
    key: str
    params: dict[str, str]
    tags: dict[str, str]

    @classmethod
    def of(cls, params: "Params") -> "Experiment":
        values = params.model_dump(mode="json")
        determining = {name: value for name, value in values.items() if name not in _NO_RESULT}
        network, budget = network_name(params.model.name), format_budgets(params.budgets)
        shown = {
            "network": network,
            "data": params.data.source,
            "budget": budget,
            "resource": ", ".join(params.budgets),
            "methods": ", ".join(params.methods),
            "supernet_epochs": str(params.supernet.epochs),
            "retrain_epochs": str(params.retrain.epochs),
            "retrain_start": params.retrain.start,
            "seeds": ", ".join(map(str, params.retrain.seeds)),
        }
        tags = {name: shown[name] for name in ("network", "budget", "resource", "seeds")}
        return cls(
            experiment_name(params),
            hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()[:16],
            shown,
            {**tags, "source": params.data.source, "task": params.task},
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def network_name(name: str) -> str:
    """Returns the last part of ``model.name``: ``mobilenet_v2`` for ``torchvision.models:mobilenet_v2``."""
    return re.split(r"[:/]", name)[-1]


def experiment_name(params: "Params") -> str:
    """Returns the network and its budget: ``mobilenet_v2-25%``, ``mobilenet_v2-3.4M-params``, ``resnet18-20MB``."""
    budget = format_budgets(params.budgets).replace(", ", "+").replace(" ", "-")
    known = len(params.budgets) > 1 or params.resource == "macs" or re.search("[Bs]$", budget)
    return f"{network_name(params.model.name)}-{budget}{'' if known else f'-{params.resource}'}"


def model_name(network: str, budget: str, method: str) -> str:
    """Returns the name of a logged model: ``mobilenet_v2-25pct-autoslim``. MLflow allows no ``%``, ``.``, ``/``, ..."""
    return re.sub(r"[^\w-]+", "_", f"{network}-{budget}-{method}".replace("%", "pct").replace(", ", "+"))


def summary(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of an experiment from the report's ``metrics.json``, with their units in their names.

    These are each method's main measure (fractions become percent), the gain over ``uniform`` of those that have one,
    and what the network costs of the resources that the budget limits. The cost is that of ``autoslim``, or of the
    first method without it.
    """
    measure = main_measure(report)
    unit = _in_a_name("percent" if measure.unit == "%" else measure.unit)
    unit_of_gain = _in_a_name(measure.unit_of_differences)
    methods = {name: value for name, value in report.items() if isinstance(value, Mapping) and measure.name in value}
    methods = {name: value for name, value in methods.items() if "macs" in value}

    def written(value: float) -> float:
        return round(measure.factor * value, 6)  # not 0.46999999999999, in a table

    numbers = {f"{name}_{measure.name}{unit}": written(value[measure.name]) for name, value in methods.items()}
    for name, gain in report.get("gain", {}).items():
        numbers[f"{name}_gain{unit_of_gain}"] = written(gain[measure.name])
    if methods:
        first = methods.get("autoslim") or next(iter(methods.values()))
        for resource in UNITS:
            if f"budget_{resource}" in report and resource in first:
                numbers[_COSTS[resource]] = first[resource]
    return numbers


def main_measure(report: Mapping[str, Any]) -> Measure:
    """Returns the main measure of a report's ``metrics.json``.

    Raises:
        TypeError, UserError: it is damaged.
    """
    return Measure(**report["measures"][0]) if report.get("measures") else TOP1


def _in_a_name(unit: str) -> str:
    """Returns a unit as the end of the name of a metric, in which MLflow allows few characters."""
    name = re.sub(r"\W+", "_", unit).strip("_")
    return f"_{name}" if name else ""


def dataset(info: "DataInfo") -> dict[str, str]:
    """Returns what MLflow shows of the prepared data: name, digest, source, shapes, and images by split."""
    from autoslim.data.structure import in_words, is_tensor

    profile: dict[str, Any] = {f"{split}_images": count for split, count in info.counts.items()}
    profile |= {"inputs": in_words(info.inputs), "targets": in_words(info.targets)}
    profile |= {"classes": len(info.classes)} if info.classes else {}
    described = {
        "name": shortened(info.source, 500),  # MLflow's limits
        "digest": hashlib.sha256(info.to_json().encode()).hexdigest()[:12],
        "source_type": "local" if info.source.partition(":")[0] in ("folder", "hf") else "autoslim",
        "source": json.dumps({"uri": info.source}),
        "profile": shortened(json.dumps(profile), 16_000),
    }
    if is_tensor(info.inputs):
        spec = {"dtype": info.inputs["dtype"], "shape": [-1, *info.inputs["shape"]]}
        features = json.dumps([{"type": "tensor", "tensor-spec": spec}])
        described["schema"] = json.dumps({"mlflow_tensorspec": {"features": features, "targets": None}})
    return described


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def view(metrics: Iterable[str], before: str = "") -> str:
    """Returns the state of MLflow's table of runs that shows one run for each experiment, with its summary.

    MLflow's UI keeps such states as tags of an experiment, for the links of its button "Share".

    Args:
        metrics: names of the summary's numbers.
        before: the state until now, whose columns are kept.
    """
    columns = ["params.`network`", "params.`data`", "params.`budget`"]
    columns += [f"metrics.`{name}`" for name in metrics]
    with suppress(ValueError, KeyError, TypeError):
        columns = list(dict.fromkeys([*json.loads(before)["selectedColumns"], *columns]))
    widths = {name: max(90, 7 * len(name) - 30) for name in columns if name.startswith("metrics.")}  # pixels
    state = {
        "searchFilter": f"tags.stage = '{EXPERIMENT}'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": widths,
    }
    return json.dumps(state)
