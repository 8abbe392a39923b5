"""The search: greedy slimming of a trained supernet, recorded step by step in ``trajectory.json``."""

import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from autoslim.channels.batches import first_tensor
from autoslim.channels.grid import Grid
from autoslim.data.batches import search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.data.structure import not_finite
from autoslim.distributed.ranks import World
from autoslim.errors import UserError
from autoslim.files import append_line, read_lines, write_json, write_sealed
from autoslim.resources.costs import Objective
from autoslim.search.greedy import SlimmingStep, greedy_slim
from autoslim.search.racing import ChunkRunner, chunk_runners, racing_rule
from autoslim.search.scoring import CURRENT, By, chosen_by_noise, mean_score
from autoslim.search.trajectory import score_to_dict, step_from_dict, step_to_dict
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.classification import CLASSIFICATION
from autoslim.tasks.measure import TOP1, Measure, scores_entry
from autoslim.tasks.task import Score, Task
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import Precision, RunContext, autocast
from autoslim.training.progress import Progress


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search.

    Attributes:
        stop: the search ends at this fraction of the default network's cost.
        images: number of search images on which options are scored.
        chunk: number of images that share their batch statistics.
        score: the score that options are ranked by.
        per_cost: rank by the increase of the score per unit of cost saved.
        step: the share of the cost that each step removes, and twice that above the default network's cost (see
            ``greedy_slim``).
        incremental: evaluate only the part of the network that an option changes (see ``IncrementalEvaluator``).
        risk: significance level of each comparison in the race (see ``racing_rule``). None runs every option on all
            images.
        precision: dtype of the forward passes.
    """

    stop: float
    images: int
    chunk: int
    score: By
    per_cost: bool
    step: float
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
    task: Task = CLASSIFICATION,
    supernet_digest: str = "",
) -> dict[str, Any]:
    """Slims from the widest configuration down to ``settings.stop`` times the default network's cost (AutoSlim).

    An interrupted search continues after its last recorded step. Several processes share the options of each step
    and make the same choice; rank 0 writes.

    Args:
        supernet: the trained supernet, on the device of ``context``.
        grid: the grid that the supernet was trained on.
        objective: the cost. With several limits the search continues until all of them are satisfied.
        seed: seed of the order of the search images.
        folder: the folder to which ``trajectory.json`` and ``metrics.json`` are written.
        task: computes the scores.
        supernet_digest: the digest of the supernet's weights, which ``trajectory.json`` names.

    Returns:
        The contents of ``trajectory.json``.

    Raises:
        UserError: there are fewer than two search images, or a subnet's loss is not finite.
    """
    graph, costs = supernet.graph, objective.costs
    started = time.monotonic()
    world = context.world
    runners, images = scoring_runners(supernet, data, context, settings, seed, task)
    limit = objective.stop(settings.stop, graph.default)
    log = checkpoints.folder / "steps.jsonl"
    recorded = world.on_rank_zero(lambda: read_lines(log))
    steps: list[SlimmingStep] = [step_from_dict(step, task.loss_name) for step in recorded]
    seconds_before = float(recorded[-1]["seconds"]) if recorded else 0.0  # of interrupted runs
    rule = racing_rule(runners, images, settings.score, settings.per_cost, settings.risk, seed)
    with Progress("search", grid.steps, done=max(0, len(steps) - 1)) as progress:
        for step in greedy_slim(
            grid,
            objective.cost,
            rule,
            limit,
            by=settings.score,
            per_cost=settings.per_cost,
            step=settings.step,
            coarse_above=objective.cost(graph.default),
            done=steps,
        ):
            steps.append(step)
            if step.slimmed:
                if step.cost < steps[0].cost:  # a step may save no latency
                    part = part_done(steps[0].cost, step.cost, limit, shares=settings.step > 0)
                    progress.expect(math.ceil((len(steps) - 1) / min(1.0, part)))
                progress.advance()
            progress.show(
                **{task.score.name: task.score.short(task.value(step.score.error))},
                cost=f"{objective.written(step.cost)}, down to {objective.written(limit)}",
            )
            if world.is_rank_zero:
                seconds = round(seconds_before + time.monotonic() - started, 1)
                append_line(log, step_to_dict(step, costs, task.loss_name) | {"seconds": seconds})
        progress.expect(len(steps) - 1)
    if steps[-1].cost > limit:
        progress.write(
            f"search: the cost of the narrowest subnet is {objective.written(steps[-1].cost)}, "
            f"more than search.stop allows ({objective.written(limit)})"
        )
    narrowest = mean_score([run_chunk(grid.narrowest, {})[CURRENT] for run_chunk in runners])
    if message := unevenly_trained(steps, objective.cost(grid.narrowest), narrowest, task.score):
        report(world, message)
    if message := chosen_by_noise([step.score for step in steps], task.chance(data)):
        report(world, f"search: warning: {message}")
    configurations = {"default": graph.default, "widest": grid.widest, "narrowest": grid.narrowest}
    trajectory = {
        "format": 2,
        "resource": objective.resource,
        "limits": dict(objective.limits),
        "supernet": supernet_digest,
        **{which: {"channels": c, **costs.all(c)} for which, c in configurations.items()},
        "narrowest_score": score_to_dict(narrowest, task.loss_name),
        "images": images,
        "chunk": images // len(runners),
        "score": settings.score,
        "per_cost": settings.per_cost,
        "step": settings.step,
        "risk": settings.risk,
        **scores_entry(task.score, task.loss_name),
        "steps": [{"step": number, **step_to_dict(step, costs, task.loss_name)} for number, step in enumerate(steps)],
    }
    if not world.is_rank_zero:
        return trajectory
    write_sealed(folder / "trajectory.json", trajectory)
    write_json(
        folder / "metrics.json",
        {
            "steps": len(steps) - 1,
            "evaluations": 1 + sum(1 + len(step.options) for step in steps),
            "images_evaluated": images_evaluated(images, steps),
            "seconds": round(seconds_before + time.monotonic() - started, 1),
        },
    )
    return trajectory


def images_evaluated(images: int, steps: Iterable[SlimmingStep]) -> int:
    """Returns how many images a search has run, each once for every configuration; the narrowest one ran on all."""
    return images + sum(score.images for step in steps for score in (step.score, *step.scores.values()))


def part_done(first: float, current: float, last: float, *, shares: bool) -> float:
    """Returns the part of the way from ``first`` to ``last``; steps remove amounts or ``shares`` of the cost."""
    if shares:
        return math.log(first / current) / math.log(first / last)
    return (first - current) / (first - last)


def unevenly_trained(steps: Sequence[SlimmingStep], cost: float, narrowest: Score, measure: Measure = TOP1) -> str:
    """Returns a message if a configuration of the trajectory is clearly worse than the narrowest one, which costs less.

    Slimming should cost accuracy. If the narrowest subnet is better than wider ones, the supernet has trained it better
    than them: it is part of every training step, and the configurations of a trajectory are not.

    Args:
        cost: the cost of the narrowest configuration.
        narrowest: its score on the images of the search.
        measure: what the errors measure. If lower is better, they have no bound, and nothing is checked.

    Returns:
        "" if no error is more than two standard errors above that of the narrowest configuration.
    """
    costlier = [step for step in steps if step.cost > cost]
    worst = max(costlier, key=lambda step: step.score.error, default=None)
    if worst is None or not measure.higher_is_better:
        return ""
    error = worst.score.error
    # The largest variance that errors between 0 and 1 can have at their mean.
    variance = (error * (1 - error) + narrowest.error * (1 - narrowest.error)) / narrowest.images
    if error - narrowest.error <= 2 * math.sqrt(variance):
        return ""
    return (
        f"search: step {steps.index(worst)} has a {measure.title} of {measure.short(measure.of_error(error))}, but the "
        f"narrowest subnet, which costs less, has {measure.short(measure.of_error(narrowest.error))}; the supernet is "
        "trained unevenly, and networks that are found in it may be worse than uniform ones: train it longer, or set "
        "supernet.random_widths_per to both"
    )


def report(world: World, message: str) -> None:
    """Prints a message once, on rank 0."""
    if world.is_rank_zero:
        print(message, file=sys.stderr)


def scoring_runners(
    supernet: Supernet, data: PreparedData, context: RunContext, settings: SearchSettings, seed: int, task: Task
) -> tuple[list[ChunkRunner], int]:
    """Returns a runner for each chunk of search images, and the number of images.

    If there are fewer images than ``settings.images``, or than a chunk, all of them are used, or one chunk.

    Raises:
        UserError: there are fewer than two images, from which no batch statistics can be computed, or they have nan.
    """
    if (count := min(settings.images, data.info.counts["search"])) < 2:
        raise UserError(
            f"there is {count} image to score, but batch statistics need at least 2; raise search.images and "
            "data.search_images"
        )
    chunks = search_chunks(
        data,
        images=settings.images,
        chunk=settings.chunk,
        seed=seed,
        device=context.device,
        workers=context.workers,
    )
    for inputs, _ in chunks:
        if found := not_finite(inputs):
            raise UserError(f"inputs of the search split have {found}; correct the data set")
    runners = chunk_runners(
        supernet,
        chunks,
        autocast(context.device, settings.precision),
        incremental=settings.incremental,
        report=partial(report, context.world),
        world=context.world,
        scores=task.sample_scores,
    )
    return runners, sum(len(first_tensor(inputs)) for inputs, _ in chunks)
