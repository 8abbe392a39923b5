"""The search: greedy slimming of a trained supernet, recorded step by step."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.resources.budgets import format_amount
from autoslim.resources.costs import Costs, Objective
from autoslim.search.greedy import By, Candidate, SlimmingStep, greedy_slim
from autoslim.search.racing import chunk_runners, racing_rule
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import check_finite, subnet_scorer
from autoslim.tasks.classification import Score
from autoslim.training.checkpoints import Checkpoints, read_json, write_atomically, write_json
from autoslim.training.device import Precision, RunContext, autocast
from autoslim.training.progress import Progress


def search(
    supernet: Supernet,
    grid: dict[str, tuple[int, ...]],
    data: PreparedData,
    context: RunContext,
    *,
    objective: Objective,
    stop: float,
    images: int,
    chunk: int,
    by: By,
    per_cost: bool,
    incremental: bool,
    risk: float | None,
    precision: Precision,
    seed: int,
    folder: Path,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Slims from the widest configuration to ``stop`` times the default network's cost (AutoSlim).

    Args:
        objective: the cost; with several limits the search goes on to where all are held.
        incremental: run only what a candidate changes (see ``networks.tails``).
        risk: let candidates drop out that are clearly not the best (see ``algorithms.racing``); None: none does.

    Goes on from the last step that an earlier run of the same search wrote. The trajectory is written to ``folder``.
    Several processes share the candidates of each step, choose alike, and the first one writes.

    Returns:
        The contents of ``trajectory.json``.

    Raises:
        UserError: the search split has fewer images than a chunk.
    """
    graph, costs = supernet.graph, objective.costs
    if data.info.counts["search"] < chunk:
        raise UserError(
            f"search.chunk is {chunk}, but the search split has {data.info.counts['search']} images; "
            "lower search.chunk or raise data.search_images"
        )
    started = time.monotonic()
    chunks = search_chunks(data, images=images, chunk=chunk, seed=seed, device=context.device, workers=context.workers)
    cast = autocast(context.device, precision)
    world = context.world

    def say(text: str) -> None:
        if world.is_rank_zero:
            print(text, file=sys.stderr)

    runners = chunk_runners(supernet, chunks, cast, incremental=incremental, say=say, world=world)
    unchecked = subnet_scorer(supernet, chunks, cast)

    def score(channels: Mapping[str, int]) -> Score:
        found = unchecked(channels)
        check_finite(found.cross_entropy, f"the subnet of {format_amount(graph.macs(channels))} MACs")
        return found

    scored = sum(len(labels) for _, labels in chunks)
    limit = objective.stop(stop, graph.default)
    path = checkpoints.folder / "steps.jsonl"
    written = world.on_rank_zero(lambda: _kept(path))
    steps: list[SlimmingStep] = [step_from_dict(step) for step in written]
    before = float(written[-1]["seconds"]) if written else 0.0  # of runs that were killed
    most = sum(len(levels) - 1 for levels in grid.values())
    with Progress("search", most, done=max(0, len(steps) - 1)) as progress:
        for step in greedy_slim(
            grid,
            objective.cost,
            lambda c: world.on_rank_zero(lambda: score(c)),
            limit,
            rule=racing_rule(runners, scored, by, per_cost, risk, seed),
            done=steps,
        ):
            steps.append(step)
            if step.slimmed is not None:
                saved, asked = steps[0].cost - step.cost, steps[0].cost - limit
                if saved > 0:  # a step may save no latency
                    progress.expect(math.ceil((len(steps) - 1) * max(1.0, asked / saved)))
                progress.advance()
            progress.show(
                top1=1 - step.score.error,
                cost=f"{objective.written(step.cost)}, down to {objective.written(limit)}",
            )
            if world.is_rank_zero:
                seconds = round(before + time.monotonic() - started, 1)
                with path.open("a") as file:
                    file.write(json.dumps(step_to_dict(step, costs) | {"seconds": seconds}) + "\n")
        progress.expect(len(steps) - 1)
    if steps[-1].cost > limit:
        progress.write(
            f"search: the narrowest subnet takes {objective.written(steps[-1].cost)}, "
            f"more than search.stop asks ({objective.written(limit)})"
        )
    configurations = {
        "default": graph.default,
        "widest": {name: levels[0] for name, levels in grid.items()},
        "narrowest": {name: levels[-1] for name, levels in grid.items()},
    }
    trajectory = {
        "format": 1,
        "resource": objective.resource,
        "limits": dict(objective.limits),
        **{which: {"channels": c, **costs.all(c)} for which, c in configurations.items()},
        "images": scored,
        "chunk": len(chunks[0][1]),
        "score": by,
        "per_cost": per_cost,
        "risk": risk,
        "steps": [{"step": number, **step_to_dict(step, costs)} for number, step in enumerate(steps)],
    }
    if not world.is_rank_zero:
        return trajectory
    write_json(folder / "trajectory.json", trajectory)
    evaluations = sum(max(1, len(step.candidates)) for step in steps)
    write_json(
        folder / "metrics.json",
        {
            "steps": len(steps) - 1,
            "evaluations": evaluations,
            "images_evaluated": sum(score.images for step in steps for score in step.scores),
            "seconds": round(before + time.monotonic() - started, 1),
        },
    )
    return trajectory


def _kept(path: Path) -> list[dict[str, Any]]:
    """The steps that an earlier run wrote, one a line; a line that its end cut short is taken out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        write_atomically(path, lambda to: to.write_text("".join(whole)))
    return [json.loads(line) for line in whole]


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
