"""Racing: candidates are scored chunk by chunk, and those that are clearly worse are dropped."""

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.channels.copying import inference_mode
from autoslim.distributed.ranks import SINGLE, World
from autoslim.search.greedy import By, Option, SelectionRule, SlimmingStep, rank, saving
from autoslim.search.incremental import IncrementalEvaluator, verified_evaluator
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import check_finite
from autoslim.tasks.classification import Chunk, Score

CURRENT = ""
"""The key of the current configuration among the groups."""

VERIFICATION_IMAGES = 8


@dataclass(frozen=True)
class Outcome:
    """The result of a configuration for each image: ``wrong`` at top-1 (0 or 1), and ``nats`` of cross-entropy.

    Both are (N,), float64, on the CPU.
    """

    wrong: Tensor
    nats: Tensor


ChunkRunner = Callable[[SlimmingStep, Mapping[str, Option], Collection[str]], Mapping[str, Outcome]]
"""(current step, options, names) -> outcomes: runs the options of these groups, or ``CURRENT``, on one chunk."""


def racing_rule(
    runners: Sequence[ChunkRunner], images: int, by: By, per_cost: bool, risk: float | None, seed: int
) -> SelectionRule:
    """Returns a selection rule that scores options chunk by chunk and drops those that are clearly behind.

    After each chunk, an option is dropped if its mean loss exceeds the leader's by more than chance explains. The
    differences are paired by image and taken as normal; the images seen are a sample of all images without replacement.
    The winner is scored on all images. Each step starts with another, randomly drawn chunk, so that no chunk decides
    more often than others.

    Args:
        runners: one for each chunk, with ``images`` images in all.
        by: see ``greedy_slim``.
        per_cost: see ``greedy_slim``.
        risk: significance level of each comparison. It is a threshold and not a guarantee: times the number of
            comparisons of a step, (options - 1) * (chunks - 1), it bounds the probability of another choice than all
            images would give, and at usual sizes that bound exceeds 1. None drops nothing.
        seed: seed of the chunk that each step starts with.
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
                race.drop(min_z=NormalDist().inv_cdf(1 - risk))
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
        return {name: _score(self.outcomes[name]) for name in self.options}

    def leader(self) -> str:
        if len(self.running) == 1:
            return self.running[0]
        current = self.current
        if CURRENT in self.outcomes:  # on the same images as the options
            current = SlimmingStep(None, current.channels, current.cost, _score(self.outcomes[CURRENT]))
        scores = {name: _score(self.outcomes[name]) for name in self.running}
        return min(self.running, key=lambda n: rank(scores[n], self.options[n], current, self.by, self.per_cost))

    def drop(self, min_z: float) -> None:
        """Drops the options whose mean is at least ``min_z`` standard errors behind the leader's."""
        leader = self.leader()
        running = [leader]
        for name in self.running:
            if name != leader:
                behind = self._behind(name, leader)
                unseen = 1 - len(behind) / self.images  # the finite population correction
                error = float(behind.std()) * math.sqrt(unseen / len(behind))
                if float(behind.mean()) <= min_z * error:
                    running.append(name)
        self.running = running

    def _behind(self, name: str, leader: str) -> Tensor:
        """(N,): how much more the option loses on each image than the leader, per unit of cost saved if so ranked."""
        if not self.per_cost:
            return self._losses(name) - self._losses(leader)
        increases = [self._losses(which) - self._losses(CURRENT) for which in (name, leader)]
        saved = [saving(self.current, self.options[which]) for which in (name, leader)]
        if all(float(increase.mean()) < 0 for increase in increases):  # see greedy.rank: the more saved, the better
            return increases[0] * saved[0] - increases[1] * saved[1]
        return increases[0] / saved[0] - increases[1] / saved[1]

    def _losses(self, name: str) -> Tensor:
        return torch.cat([o.wrong if self.by == "error" else o.nats for o in self.outcomes[name]])


def _score(outcomes: Sequence[Outcome]) -> Score:
    wrong = torch.cat([outcome.wrong for outcome in outcomes])
    nats = torch.cat([outcome.nats for outcome in outcomes])
    return Score(float(wrong.mean()), float(nats.mean()), len(wrong))


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

    Each of several processes runs some of the configurations, on the whole chunk, and all receive all outcomes. They
    are the same numbers that a single process would compute.

    Args:
        incremental: evaluate only what a candidate changes (see ``IncrementalEvaluator``). This is verified first; a
            network that does not support it is evaluated as a whole.
        report: called with a message in that case.
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

    def run_chunk(current: SlimmingStep, options: Mapping[str, Option], wanted: Collection[str]) -> dict[str, Outcome]:
        names = [name for name in (*options, CURRENT) if name in wanted]
        own = names[world.rank :: world.world_size]  # in the network's order: each rank gets early and late groups
        slimmer = {name: options[name].channels for name in own if name != CURRENT}
        table = torch.zeros(len(names), 2, len(labels), device=labels.device)
        with inference_mode(supernet), autocast():
            if evaluator is not None and len(names) > 1:
                runs = _branching(evaluator, images, current, own, slimmer)
            else:
                runs = _one_by_one(supernet, images, current, own, slimmer)
            for name, logits in runs:
                table[names.index(name)] = _losses_by_image(logits, labels)
        table = world.add(table).cpu().double()  # rows of other ranks are zero; the host waits once per chunk
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
    own: Sequence[str],
    slimmer: Mapping[str, int],
) -> Iterator[tuple[str, Tensor]]:
    remaining = len(own)
    runs = evaluator.run(images, current.channels, slimmer)
    while remaining:  # stops before the current network's end unless its output is wanted
        name, logits = next(runs)
        remaining -= 1
        yield CURRENT if name is None else name, logits


def _one_by_one(
    supernet: Supernet, images: Tensor, current: SlimmingStep, own: Sequence[str], slimmer: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for name in own:
        supernet.select({**current.channels, **({name: slimmer[name]} if name != CURRENT else {})})
        yield name, supernet(images)


def _losses_by_image(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, classes), (N,) -> (2, N): whether each image is wrong at top-1, and its cross-entropy in nats."""
    logits = logits.float()
    return torch.stack([(logits.argmax(1) != labels).float(), F.cross_entropy(logits, labels, reduction="none")])
