"""The search: greedy slimming of a trained supernet, every step written down."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoslim.algorithms.slimming import By, Score, SlimmingStep, greedy_slim
from autoslim.engine.artifacts import step_from_dict, step_to_dict
from autoslim.engine.checkpoints import Checkpoints, write_json
from autoslim.engine.chunks import search_chunks
from autoslim.engine.data import PreparedData
from autoslim.engine.evaluation import subnet_scorer
from autoslim.engine.progress import Progress
from autoslim.engine.runtime import Machine, Precision, autocast
from autoslim.networks.supernet import Supernet
from autoslim.vocabulary.budgets import format_amount
from autoslim.vocabulary.errors import UserError


def search(
    supernet: Supernet,
    grid: dict[str, tuple[int, ...]],
    data: PreparedData,
    machine: Machine,
    *,
    resource: str,
    stop: float,
    images: int,
    chunk: int,
    by: By,
    per_cost: bool,
    precision: Precision,
    seed: int,
    folder: Path,
    checkpoints: Checkpoints,
) -> dict[str, Any]:
    """Slims from the widest configuration to ``stop`` times the default network's cost (paper section 1.4).

    Goes on from the last step that an earlier run of the same search wrote. The trajectory is written to ``folder``.

    Returns:
        The contents of ``trajectory.json``.

    Raises:
        UserError: the search split has fewer images than a chunk.
    """
    graph = supernet.graph
    if data.info.counts["search"] < chunk:
        raise UserError(
            f"search.chunk is {chunk}, but the search split has {data.info.counts['search']} images; "
            "lower search.chunk or raise data.search_images"
        )
    chunks = search_chunks(data, machine, images=images, chunk=chunk, seed=seed)
    unchecked = subnet_scorer(supernet, chunks, autocast(machine.device, precision))

    def score(channels: Mapping[str, int]) -> Score:
        result = unchecked(channels)
        if not math.isfinite(result.cross_entropy):
            raise UserError(
                f"a subnet of {format_amount(graph.cost(channels, resource), resource)} {resource} scores a "
                f"cross-entropy of {result.cross_entropy}; set search.precision to fp32, or lower the supernet's "
                "learning_rate"
            )
        return result

    limit = stop * graph.cost(graph.default, resource)
    path = checkpoints.folder / "steps.json"
    steps: list[SlimmingStep] = [step_from_dict(s) for s in json.loads(path.read_text())] if path.exists() else []
    most = sum(len(levels) - 1 for levels in grid.values())
    started = time.monotonic()
    with Progress("search", most, done=max(0, len(steps) - 1)) as progress:
        for step in greedy_slim(
            grid, lambda c: graph.cost(c, resource), score, limit, by=by, per_cost=per_cost, done=steps
        ):
            steps.append(step)
            if step.slimmed is not None:
                saved, asked = steps[0].cost - step.cost, steps[0].cost - limit
                progress.expect(math.ceil((len(steps) - 1) * max(1.0, asked / saved)))
                progress.advance()
            progress.show(
                top1=1 - step.score.error,
                cost=f"{format_amount(step.cost, resource)} of {format_amount(limit, resource)}",
            )
            write_json(path, [step_to_dict(s, graph) for s in steps])
        progress.expect(len(steps) - 1)
    if steps[-1].cost > limit:
        progress.write(
            f"search: the narrowest subnet takes {format_amount(steps[-1].cost, resource)}, "
            f"more than search.stop asks ({format_amount(limit, resource)})"
        )
    configurations = {
        "default": graph.default,
        "widest": {name: levels[0] for name, levels in grid.items()},
        "narrowest": {name: levels[-1] for name, levels in grid.items()},
    }
    scored = sum(len(labels) for _, labels in chunks)
    trajectory = {
        "format": 1,
        "resource": resource,
        **{
            which: {"channels": c, "macs": graph.macs(c), "params": graph.params(c)}
            for which, c in configurations.items()
        },
        "images": scored,
        "chunk": len(chunks[0][1]),
        "score": by,
        "per_cost": per_cost,
        "steps": [{"step": number, **step_to_dict(step, graph)} for number, step in enumerate(steps)],
    }
    write_json(folder / "trajectory.json", trajectory)
    evaluations = sum(max(1, len(step.candidates)) for step in steps)
    write_json(
        folder / "metrics.json",
        {
            "steps": len(steps) - 1,
            "evaluations": evaluations,
            "images_evaluated": evaluations * scored,
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    return trajectory
