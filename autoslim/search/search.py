"""The search: greedy slimming of a trained supernet, recorded step by step in ``trajectory.json``."""

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from autoslim.channels.grid import Grid
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.resources.budgets import format_amount
from autoslim.resources.costs import Costs, Objective
from autoslim.search.greedy import Candidate, SlimmingStep, greedy_slim
from autoslim.search.racing import chunk_runners, racing_rule
from autoslim.search.scoring import By
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import check_finite, subnet_scorer
from autoslim.tasks.classification import Score
from autoslim.training.checkpoints import Checkpoints, read_json, write_atomically, write_json
from autoslim.training.device import Precision, RunContext, autocast
from autoslim.training.progress import Progress


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search.

    Attributes:
        stop: the search ends at this fraction of the default network's cost.
        images: number of search images on which each candidate is scored.
        chunk: number of images that share their batch statistics.
        score: the score that candidates are ranked by.
        per_cost: rank by the increase of the score per unit of cost saved.
        incremental: evaluate only the part of the network that a candidate changes (see ``IncrementalEvaluator``).
        risk: significance level of each comparison in the race (see ``racing_rule``). None drops no candidate.
        precision: dtype of the forward passes.
    """

    stop: float
    images: int
    chunk: int
    score: By
    per_cost: bool
    incremental: bool
    risk: float | None
    precision: Precision


def search(
    supernet: Supernet,
    grid: Grid,
    data: PreparedData,
    context: RunContext,
    *,
    objective: Objective,
    settings: SearchSettings,
    seed: int,
    folder: Path,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Slims from the widest configuration down to ``settings.stop`` times the default network's cost (AutoSlim).

    An interrupted search continues after its last recorded step. Several processes share the candidates of each step
    and make the same choice; rank 0 writes.

    Args:
        supernet: the trained supernet, on the device of ``context``.
        grid: the grid that the supernet was trained on.
        objective: the cost. With several limits the search continues until all of them are satisfied.
        seed: seed of the order of the search images.
        folder: the folder to which ``trajectory.json`` and ``metrics.json`` are written.

    Returns:
        The contents of ``trajectory.json``.

    Raises:
        UserError: the search split has fewer images than a chunk, or a subnet's cross-entropy is not finite.
    """
    graph, costs = supernet.graph, objective.costs
    if data.info.counts["search"] < settings.chunk:
        raise UserError(
            f"search.chunk is {settings.chunk}, but the search split has {data.info.counts['search']} images; "
            "lower search.chunk or raise data.search_images"
        )
    started = time.monotonic()
    chunks = search_chunks(
        data,
        images=settings.images,
        chunk=settings.chunk,
        seed=seed,
        device=context.device,
        workers=context.workers,
    )
    cast = autocast(context.device, settings.precision)
    world = context.world

    def report(text: str) -> None:
        if world.is_rank_zero:
            print(text, file=sys.stderr)

    runners = chunk_runners(supernet, chunks, cast, incremental=settings.incremental, report=report, world=world)
    unchecked_score = subnet_scorer(supernet, chunks, cast)

    def score(channels: Mapping[str, int]) -> Score:
        result = unchecked_score(channels)
        check_finite(result.cross_entropy, f"the subnet of {format_amount(graph.macs(channels))} MACs")
        return result

    images = sum(len(labels) for _, labels in chunks)
    limit = objective.stop(settings.stop, graph.default)
    log = checkpoints.folder / "steps.jsonl"
    recorded = world.on_rank_zero(lambda: _recorded_steps(log))
    steps: list[SlimmingStep] = [step_from_dict(step) for step in recorded]
    seconds_before = float(recorded[-1]["seconds"]) if recorded else 0.0  # of interrupted runs
    rule = racing_rule(runners, images, settings.score, settings.per_cost, settings.risk, seed)
    with Progress("search", grid.steps, done=max(0, len(steps) - 1)) as progress:
        for step in greedy_slim(
            grid,
            objective.cost,
            lambda c: Score(*world.on_rank_zero(lambda: list(astuple(score(c))))),
            limit,
            rule=rule,
            done=steps,
        ):
            steps.append(step)
            if step.slimmed is not None:
                saved, total = steps[0].cost - step.cost, steps[0].cost - limit
                if saved > 0:  # a step may save no latency
                    progress.expect(math.ceil((len(steps) - 1) * max(1.0, total / saved)))
                progress.advance()
            progress.show(
                top1=1 - step.score.error,
                cost=f"{objective.written(step.cost)}, down to {objective.written(limit)}",
            )
            if world.is_rank_zero:
                seconds = round(seconds_before + time.monotonic() - started, 1)
                with log.open("a") as file:
                    file.write(json.dumps(step_to_dict(step, costs) | {"seconds": seconds}) + "\n")
        progress.expect(len(steps) - 1)
    if steps[-1].cost > limit:
        progress.write(
            f"search: the cost of the narrowest subnet is {objective.written(steps[-1].cost)}, "
            f"more than search.stop allows ({objective.written(limit)})"
        )
    configurations = {"default": graph.default, "widest": grid.widest, "narrowest": grid.narrowest}
    trajectory = {
        "format": 1,
        "resource": objective.resource,
        "limits": dict(objective.limits),
        **{which: {"channels": c, **costs.all(c)} for which, c in configurations.items()},
        "images": images,
        "chunk": len(chunks[0][1]),
        "score": settings.score,
        "per_cost": settings.per_cost,
        "risk": settings.risk,
        "steps": [{"step": number, **step_to_dict(step, costs)} for number, step in enumerate(steps)],
    }
    if not world.is_rank_zero:
        return trajectory
    write_json(folder / "trajectory.json", trajectory)
    write_json(
        folder / "metrics.json",
        {
            "steps": len(steps) - 1,
            "evaluations": sum(max(1, len(step.candidates)) for step in steps),
            "images_evaluated": sum(score.images for step in steps for score in step.scores),
            "seconds": round(seconds_before + time.monotonic() - started, 1),
        },
    )
    return trajectory


def _recorded_steps(log: Path) -> list[dict[str, Any]]:
    """Returns the steps that an earlier run recorded, one per line, and removes a truncated last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    complete = [line for line in lines if line.endswith("\n")]
    if len(complete) < len(lines):
        write_atomically(log, lambda to: to.write_text("".join(complete)))
    return [json.loads(line) for line in complete]


def step_to_dict(step: SlimmingStep, costs: Costs) -> dict[str, Any]:
    """Converts a step to its entry in ``trajectory.json``: all resources, and as ``cost`` the search's objective."""
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
    """Inverts ``step_to_dict``."""
    candidates = {name: Candidate(c["channels"], c["cost"], _score(c)) for name, c in values["candidates"].items()}
    return SlimmingStep(values["slimmed"], values["channels"], values["cost"], _score(values), candidates)


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
