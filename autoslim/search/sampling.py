"""Random configurations within a budget, and their evolution: the searches that greedy slimming is compared with."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autoslim.channels.groups import Channels
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.files import append_line, read_lines
from autoslim.resources.costs import Fits
from autoslim.search.scoring import CURRENT, mean_score
from autoslim.search.search import SearchSettings, scoring_runners
from autoslim.search.trajectory import score_to_dict
from autoslim.supernet.supernet import Supernet
from autoslim.tasks.task import Score, Task
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import RunContext
from autoslim.training.progress import Progress

Numbers = Mapping[str, Sequence[int]]
"""The numbers of channels that each group may have, in ascending order."""

SPREAD = math.log(3)  # a random group is between a third and three times as wide as the others


@dataclass(frozen=True)
class Scored:
    """A configuration and its score; lower is better."""

    channels: Channels
    score: float


def random_within(numbers: Numbers, fits: Fits, draw: random.Random) -> Channels:
    """Draws a configuration that uses the whole budget.

    Each group gets a random width, all widths are scaled by a common factor until the configuration is within the
    limits, and then single groups are widened in random order as long as they fit.

    Raises:
        UserError: even the narrowest configuration exceeds the limits.
    """
    widths = {name: math.exp(draw.uniform(-SPREAD, SPREAD)) for name in numbers}
    return _filled(_scaled(numbers, fits, widths), numbers, fits, draw)


def _scaled(numbers: Numbers, fits: Fits, widths: Mapping[str, float]) -> Channels:
    def at(exponent: float) -> Channels:
        scale = math.exp(exponent)
        return {
            name: min(levels, key=lambda number: abs(number - scale * widths[name] * levels[-1]))
            for name, levels in numbers.items()
        }

    low, high = -20.0, 3.0  # the narrowest and the widest configuration
    if not fits(at(low)):
        raise UserError(
            "the narrowest configuration exceeds the budget; raise budget, or lower supernet.grid.narrowest"
        )
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low)


def _filled(channels: Channels, numbers: Numbers, fits: Fits, draw: random.Random) -> Channels:
    """Widens groups in random order, one number at a time, as long as the configuration is within the limits."""
    channels, names = dict(channels), list(numbers)
    draw.shuffle(names)
    for name in names:
        levels = numbers[name]
        for number in levels[levels.index(channels[name]) + 1 :]:
            if not fits({**channels, name: number}):
                break
            channels[name] = number
    return channels


def _repaired(channels: Channels, numbers: Numbers, fits: Fits, draw: random.Random) -> Channels:
    """Slims random groups, one number at a time, until the configuration is within the limits."""
    channels = dict(channels)
    while not fits(channels):
        wider = [name for name, levels in numbers.items() if channels[name] > levels[0]]
        name = draw.choice(wider)
        channels[name] = numbers[name][numbers[name].index(channels[name]) - 1]
    return channels


def random_search(
    numbers: Numbers, fits: Fits, score: Callable[[Channels], float], evaluations: int, seed: int
) -> Iterator[Scored]:
    """Yields ``evaluations`` random configurations within the limits, with their scores.

    Raises:
        UserError: even the narrowest configuration exceeds the limits.
    """
    draw = random.Random(seed)
    for _ in range(evaluations):
        channels = random_within(numbers, fits, draw)
        yield Scored(channels, score(channels))


def evolution(
    numbers: Numbers,
    fits: Fits,
    score: Callable[[Channels], float],
    evaluations: int,
    seed: int,
    *,
    population: int = 20,
    mutation: float = 0.1,
) -> Iterator[Scored]:
    """Yields configurations that evolve from random ones, with their scores.

    The parents are the best configurations so far, a quarter of ``population``. Mutations (each group gets a random
    number of channels with probability ``mutation``, at least one does) and crossovers (each group's number comes from
    either parent) take turns. Children are slimmed until they are within the limits, and then use the whole budget.
    (Evolutionary search in a supernet, as in Guo et al., "Single Path One-Shot Neural Architecture Search with Uniform
    Sampling", 2020, section 3.4, without generations.)

    Args:
        evaluations: number of configurations that are yielded.
        population: number of random configurations at the start.

    Raises:
        UserError: even the narrowest configuration exceeds the limits.
    """
    draw = random.Random(seed)
    scored: dict[tuple[int, ...], Scored] = {}

    def evaluated(channels: Channels) -> Scored:
        key = tuple(channels[name] for name in numbers)
        if key not in scored:
            scored[key] = Scored(channels, score(channels))
        return scored[key]

    population = min(population, evaluations)
    for _ in range(population):
        yield evaluated(random_within(numbers, fits, draw))
    for number in range(population, evaluations):
        parents = sorted(scored.values(), key=lambda each: each.score)[: max(2, population // 4)]
        if number % 2 and len(parents) > 1:
            one, other = draw.sample(parents, 2)
            child = {name: draw.choice((one, other)).channels[name] for name in numbers}
        else:
            child = dict(draw.choice(parents).channels)
            changed = [name for name in numbers if draw.random() < mutation] or [draw.choice(list(numbers))]
            child |= {name: draw.choice(list(numbers[name])) for name in changed}
        yield evaluated(_filled(_repaired(child, numbers, fits, draw), numbers, fits, draw))


def sample_within(
    supernet: Supernet,
    data: PreparedData,
    context: RunContext,
    *,
    method: str,
    numbers: Numbers,
    fits: Fits,
    evaluations: int,
    settings: SearchSettings,
    seed: int,
    checkpoints: Checkpoints,
    task: Task,
) -> tuple[Channels, Score]:
    """Returns the best of ``evaluations`` configurations that ``random`` or ``evolution`` scores on the search images.

    A configuration that was scored before, also by an interrupted run, is not run again. It runs in one process.

    Args:
        supernet: the trained supernet, on the device of ``context``.
        method: ``random`` (see ``random_search``) or ``evolution``.
        settings: the images, the score, and the precision.
        seed: seed of the configurations, and of the order of the search images.
        task: computes the scores.

    Raises:
        UserError: even the narrowest configuration exceeds the limits.
    """
    runners, _ = scoring_runners(supernet, data, context, settings, seed, task)
    log = checkpoints.folder / f"{method}.jsonl"
    scores = {
        tuple(line["channels"]): Score(line["error"], line[task.loss_name], line["images"]) for line in read_lines(log)
    }

    def key(channels: Channels) -> tuple[int, ...]:
        return tuple(channels[name] for name in numbers)

    def score(channels: Channels) -> float:
        if key(channels) not in scores:
            found = mean_score([run_chunk(channels, {})[CURRENT] for run_chunk in runners])
            scores[key(channels)] = found
            append_line(log, {"channels": key(channels), **score_to_dict(found, task.loss_name)})
        found = scores[key(channels)]
        return found.error if settings.score == "error" else found.loss

    search = random_search if method == "random" else evolution
    best: Scored | None = None
    with Progress(method, evaluations, "network") as progress:
        for each in search(numbers, fits, score, evaluations, seed):
            if best is None or each.score < best.score:
                best = each
                progress.show(**{task.score.name: task.score.short(task.value(scores[key(best.channels)].error))})
            progress.advance()
    assert best is not None
    return best.channels, scores[key(best.channels)]
