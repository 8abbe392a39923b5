"""The trajectory of a search as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoslim.errors import UserError
from autoslim.files import read_json
from autoslim.resources.costs import Costs
from autoslim.search.greedy import Option, SlimmingStep
from autoslim.tasks.classification import Score


def step_to_dict(step: SlimmingStep, costs: Costs) -> dict[str, Any]:
    """Converts a step to its entry in ``trajectory.json``: all resources, and as ``cost`` the search's objective."""
    return {
        "slimmed": list(step.slimmed),
        "channels": step.channels,
        "cost": step.cost,
        **costs.all(step.channels),
        **asdict(step.score),
        "options": {name: asdict(option) | asdict(step.scores[name]) for name, option in step.options.items()},
        "taken": list(step.taken),
    }


def step_from_dict(values: Mapping[str, Any]) -> SlimmingStep:
    """Inverts ``step_to_dict``."""
    options = values["options"]
    return SlimmingStep(
        tuple(values["slimmed"]),
        values["channels"],
        values["cost"],
        _score(values),
        {name: Option(option["channels"], option["cost"], option["saved"]) for name, option in options.items()},
        {name: _score(option) for name, option in options.items()},
        tuple(values["taken"]),
    )


def read_trajectory(path: Path) -> dict[str, Any]:
    """Reads ``trajectory.json``.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"there is no trajectory at {path}; run `dvc repro search`")
    values = read_json(path, "search")
    if not isinstance(values.get("steps"), list):
        raise UserError(f"{path} is not a trajectory (it has no steps); run `dvc repro search`")
    return values


def _score(values: Mapping[str, Any]) -> Score:
    return Score(values["error"], values["cross_entropy"], values["images"])
