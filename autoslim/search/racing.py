"""Racing: scores candidates chunk by chunk, and drops those that are significantly worse than the best one."""

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from autoslim.channels.copying import inference_mode
from autoslim.distributed.ranks import SINGLE, World
from autoslim.search.greedy import Option, SelectionRule, SlimmingStep
from autoslim.search.incremental import IncrementalEvaluator, verified_evaluator
from autoslim.search.scoring import By, Outcome, losses_by_image, mean_score, rank, saving
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import check_finite
from autoslim.tasks.classification import Chunk, Score

CURRENT = ""
"""The key of the current configuration among the groups."""

VERIFICATION_IMAGES = 8


ChunkRunner = Callable[[SlimmingStep, Mapping[str, Option], Collection[str]], Mapping[str, Outcome]]
"""(current step, options, names) -> outcomes: runs the options of these groups, or ``CURRENT``, on one chunk."""


def racing_rule(
    runners: Sequence[ChunkRunner], images: int, by: By, per_cost: bool, risk: float | None, seed: int
) -> SelectionRule:
    """Returns a selection rule that scores options chunk by chunk and drops those that are significantly worse.

    After each chunk, an option is dropped if its mean loss is significantly higher than the leader's. The test is
    paired by image, assumes normal differences, and treats the images evaluated so far as a sample without replacement.
    The winner is scored on all images. Each step starts with a different, randomly drawn chunk, so that no chunk
    decides more often than others.

    Args:
        runners: one runner for each chunk.
        images: number of images in all chunks together.
        by: see ``greedy_slim``.
        per_cost: see ``greedy_slim``.
        risk: significance level of each comparison. It is a threshold, not a guarantee: multiplied by the number of
            comparisons of a step, (options - 1) * (chunks - 1), it is an upper bound on the probability of a different
            choice than on all images, and at usual sizes that bound exceeds 1. None drops nothing.
        seed: seed of the draw of each step's first chunk.
    """

    def rule(current: SlimmingStep, options: Mapping[str, Option]) -> tuple[str, Mapping[str, Score]]:
        race = _Race(current, options, images, by, per_cost)
        first = random.Random(f"{seed}/{current.cost}").randrange(len(runners))  # the same when a search is resumed
        for number in range(len(runners)):
            names = set(race.running)
            if per_cost and len(names) > 1:
                names.add(CURRENT)
            race.add(runners[(first + number) % len(runners)](current, options, names))
            if risk is not None and len(race.running) > 1 and number + 1 < len(runners):
                race.drop(NormalDist().inv_cdf(1 - risk))
        return race.leader(), race.scores()

    return rule


@dataclass
class _Race:
    """The state of the race of one slimming step."""

    current: SlimmingStep
    options: Mapping[str, Option]
    images: int
    by: By
    per_cost: bool
    running: list[str] = field(init=False)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.running = list(self.options)

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        for name, outcome in outcomes.items():
            self.outcomes.setdefault(name, []).append(outcome)

    def scores(self) -> dict[str, Score]:
        return {name: mean_score(self.outcomes[name]) for name in self.options}

    def leader(self) -> str:
        if len(self.running) == 1:
            return self.running[0]
        before = self.current.score
        if CURRENT in self.outcomes:  # on the same images as the options
            before = mean_score(self.outcomes[CURRENT])
        scores = {name: mean_score(self.outcomes[name]) for name in self.running}
        return min(self.running, key=lambda n: rank(scores[n], before, self._saved(n), self.by, self.per_cost))

    def drop(self, z: float) -> None:
        """Drops the options whose mean loss exceeds the leader's by more than ``z`` standard errors."""
        leader = self.leader()
        running = [leader]
        for name in self.running:
            if name != leader:
                excess = self._excess(name, leader)
                correction = 1 - len(excess) / self.images  # the finite population correction
                error = float(excess.std()) * math.sqrt(correction / len(excess))
                if float(excess.mean()) <= z * error:
                    running.append(name)
        self.running = running

    def _excess(self, name: str, leader: str) -> Tensor:
        """Returns (N,), the option's loss minus the leader's on each image; with ``per_cost`` per unit saved."""
        if not self.per_cost:
            return self._losses(name) - self._losses(leader)
        increases = [self._losses(which) - self._losses(CURRENT) for which in (name, leader)]
        saved = [self._saved(which) for which in (name, leader)]
        if all(float(increase.mean()) < 0 for increase in increases):  # a larger saving is better: see scoring.rank
            return increases[0] * saved[0] - increases[1] * saved[1]
        return increases[0] / saved[0] - increases[1] / saved[1]

    def _saved(self, name: str) -> float:
        return saving(self.current.cost, self.options[name].cost)

    def _losses(self, name: str) -> Tensor:
        return torch.cat([o.wrong if self.by == "error" else o.nats for o in self.outcomes[name]])


def chunk_runners(
    supernet: Supernet,
    chunks: Sequence[Chunk],
    autocast: Callable[[], torch.autocast],
    *,
    incremental: bool,
    report: Callable[[str], None],
    world: World = SINGLE,
) -> list[ChunkRunner]:
    """Returns one runner for each chunk of images. A chunk's images share their batch statistics.

    Each of several processes runs some of the configurations on the whole chunk, and every process receives all
    outcomes. They equal those that a single process would compute.

    Args:
        incremental: evaluate only the part that a candidate changes (see ``IncrementalEvaluator``). This is verified
            first; a network that does not support it is evaluated as a whole.
        report: called with a message if the network is evaluated as a whole.
    """
    evaluator = None
    if incremental:
        with inference_mode(supernet):
            evaluator, reason = verified_evaluator(supernet, chunks[0][0][:VERIFICATION_IMAGES])
        if evaluator is None:
            report(f"search: each candidate is evaluated as a whole, because the network cannot be split: {reason}")
    return [_chunk_runner(supernet, evaluator, chunk, autocast, world) for chunk in chunks]


def _chunk_runner(
    supernet: Supernet,
    evaluator: IncrementalEvaluator | None,
    chunk: Chunk,
    autocast: Callable[[], torch.autocast],
    world: World,
) -> ChunkRunner:
    images, labels = chunk

    def run_chunk(current: SlimmingStep, options: Mapping[str, Option], chosen: Collection[str]) -> dict[str, Outcome]:
        names = [name for name in (*options, CURRENT) if name in chosen]
        share = names[world.rank :: world.world_size]  # in the network's order: each rank gets early and late groups
        slimmer = {name: options[name].channels for name in share if name != CURRENT}
        table = torch.zeros(len(names), 2, len(labels), device=labels.device)
        with inference_mode(supernet), autocast():
            if evaluator is not None and len(names) > 1:
                runs = _branching(evaluator, images, current, share, slimmer)
            else:
                runs = _one_by_one(supernet, images, current, share, slimmer)
            for name, logits in runs:
                table[names.index(name)] = losses_by_image(logits, labels)
        table = world.add(table).cpu().double()  # rows of other ranks are zero; the host synchronises once per chunk
        for name, (_, nats) in zip(names, table, strict=True):
            if not bool(nats.isfinite().all()):
                slimmed = f"{options[name].channels} channels of {name}" if name != CURRENT else "no group slimmed"
                check_finite(float(nats.mean()), f"the subnet of cost {current.cost:,} with {slimmed}")
        return {name: Outcome(*rows.unbind()) for name, rows in zip(names, table, strict=True)}

    return run_chunk


def _branching(
    evaluator: IncrementalEvaluator,
    images: Tensor,
    current: SlimmingStep,
    names: Sequence[str],
    slimmer: Mapping[str, int],
) -> Iterator[tuple[str, Tensor]]:
    remaining = len(names)
    runs = evaluator.run(images, current.channels, slimmer)
    while remaining:  # stops before the end of the current network unless its output is needed
        name, logits = next(runs)
        remaining -= 1
        yield CURRENT if name is None else name, logits


def _one_by_one(
    supernet: Supernet, images: Tensor, current: SlimmingStep, names: Sequence[str], slimmer: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        supernet.select({**current.channels, **({name: slimmer[name]} if name != CURRENT else {})})
        yield name, supernet(images)
