"""The trajectory of a search as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autoslim.errors import UserError
from autoslim.files import read_json
from autoslim.resources.costs import Costs
from autoslim.search.greedy import Option, SlimmingStep
from autoslim.search.scoring import Increase
from autoslim.tasks.measure import CROSS_ENTROPY
from autoslim.tasks.task import Score


def score_to_dict(score: Score, loss_name: str) -> dict[str, Any]:
    """Converts a score to its entries in a file, in which the loss has the task's name."""
    return {"error": score.error, loss_name: score.loss, "images": score.images}


def step_to_dict(step: SlimmingStep, costs: Costs, loss_name: str = CROSS_ENTROPY) -> dict[str, Any]:
    """Converts a step to its entry in ``trajectory.json``: all resources, and as ``cost`` the search's objective."""
    options = {
        name: asdict(option) | score_to_dict(step.scores[name], loss_name) for name, option in step.options.items()
    }
    for name, (error, loss) in step.increases.items():
        options[name]["increase"] = {"error": error, loss_name: loss}
    return {
        "slimmed": list(step.slimmed),
        "channels": step.channels,
        "cost": step.cost,
        **costs.all(step.channels),
        **score_to_dict(step.score, loss_name),
        "options": options,
        "taken": list(step.taken),
    }


def step_from_dict(values: Mapping[str, Any], loss_name: str = CROSS_ENTROPY) -> SlimmingStep:
    """Inverts ``step_to_dict``."""
    options = values["options"]
    return SlimmingStep(
        tuple(values["slimmed"]),
        values["channels"],
        values["cost"],
        _score(values, loss_name),
        {name: Option(option["channels"], option["cost"], option["saved"]) for name, option in options.items()},
        {name: _score(option, loss_name) for name, option in options.items()},
        tuple(values["taken"]),
        {
            name: Increase(option["increase"]["error"], option["increase"][loss_name])
            for name, option in options.items()
            if "increase" in option  # not in trajectories of earlier versions
        },
    )


def read_trajectory(path: Path) -> dict[str, Any]:
    """Reads ``trajectory.json``. It is empty if no method needed a search.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not path.exists():
        raise UserError(f"there is no trajectory at {path}; run `dvc repro search`")
    values = read_json(path, "search")
    if values and not isinstance(values.get("steps"), list):
        raise UserError(f"{path} is not a trajectory (it has no steps); run `dvc repro search`")
    return values


def _score(values: Mapping[str, Any], loss_name: str) -> Score:
    return Score(values["error"], values[loss_name], values["images"])
