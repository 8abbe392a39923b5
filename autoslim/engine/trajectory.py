"""``trajectory.json``: the search, step by step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoslim.algorithms.resources import Costs
from autoslim.algorithms.slimming import Candidate, SlimmingStep
from autoslim.engine.artifacts import read_json
from autoslim.vocabulary.errors import UserError
from autoslim.vocabulary.scores import Score


def step_to_dict(step: SlimmingStep, costs: Costs) -> dict[str, Any]:
    """One step of ``trajectory.json``: its ``cost`` is that of the search's objective; all resources stand beside."""
    return {
        "slimmed": step.slimmed,
        "channels": step.channels,
        "cost": step.cost,
        **costs.all(step.channels),
        "error": step.score.error,
        "cross_entropy": step.score.cross_entropy,
        "images": step.score.images,
        "candidates": {
            name: {
                "channels": c.channels,
                "cost": c.cost,
                "error": c.score.error,
                "cross_entropy": c.score.cross_entropy,
                "images": c.score.images,
            }
            for name, c in step.candidates.items()
        },
    }


def step_from_dict(values: Mapping[str, Any]) -> SlimmingStep:
    candidates = {name: Candidate(c["channels"], c["cost"], _score(c)) for name, c in values["candidates"].items()}
    return SlimmingStep(values["slimmed"], values["channels"], values["cost"], _score(values), candidates)


def read_trajectory(path: Path) -> dict[str, Any]:
    """The contents of ``trajectory.json``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.exists():
        raise UserError(f"there is no trajectory at {path}; run `dvc repro search`")
    values = read_json(path, "search")
    if not isinstance(values.get("steps"), list):
        raise UserError(f"{path} is not the file of a trajectory (it has no steps); run `dvc repro search`")
    return values


def _score(values: Mapping[str, Any]) -> Score:
    return Score(values["error"], values["cross_entropy"], values["images"])
