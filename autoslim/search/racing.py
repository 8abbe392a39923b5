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
"""Stands for the current configuration among the groups."""


@dataclass(frozen=True)
class Outcome:
    """What a configuration makes of each image: ``wrong`` at top-1 (0 or 1) and ``nats`` of cross-entropy.

    Both (N,), float64, on the CPU.
    """

    wrong: Tensor
    nats: Tensor


ChunkRunner = Callable[[SlimmingStep, Mapping[str, Option], Collection[str]], Mapping[str, Outcome]]
"""Runs the configurations that slim these groups, or ``CURRENT``, on one chunk of images."""


def racing_rule(
    runners: Sequence[ChunkRunner], images: int, by: By, per_cost: bool, risk: float | None, seed: int
) -> SelectionRule:
    """Chooses as if each option were scored on all images, but lets those drop out on the way that are far behind.

    After each lap an option is dropped where its mean is above the leader's by more than chance explains: the
    differences are paired by image, taken as normal, and the images seen are a sample without replacement of all. The
    winner is scored on all images. Each step begins with a lap drawn anew, so that no chunk decides more than others.

    Args:
        laps: one for each chunk; ``images`` in all.
        risk: the chance that an option drops out at one comparison though it is as good as the leader. Times the number
            of comparisons, (options - 1) * (laps - 1), it bounds the chance, at each step, of another choice than all
            images would make; in practice that bound is loose, and near ties are what is decided otherwise. None:
            nothing is dropped.
        seed: of the lap that each step begins with.
    """

    def rule(current: SlimmingStep, options: Mapping[str, Option]) -> tuple[str, Mapping[str, Score]]:
        race = _Race(current, options, images, by, per_cost)
        first = random.Random(f"{seed}/{current.cost}").randrange(len(runners))  # the same when a search goes on
        for number in range(len(runners)):
            wanted = set(race.running)
            if per_cost and len(wanted) > 1:
                wanted.add(CURRENT)
            race.add(runners[(first + number) % len(runners)](current, options, wanted))
            if risk is not None and len(race.running) > 1 and number + 1 < len(runners):
                race.drop(least_z=NormalDist().inv_cdf(1 - risk))
        return race.leader(), race.scores()

    return rule


@dataclass
class _Race:
    """The state of one step's race. ``losses`` are of the kind that is ranked first."""

    current: SlimmingStep
    options: Mapping[str, Option]
    images: int
    by: By
    per_cost: bool
    running: list[str] = field(init=False)
    seen: dict[str, list[Outcome]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.running = list(self.options)

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        for name, outcome in outcomes.items():
            self.seen.setdefault(name, []).append(outcome)

    def scores(self) -> dict[str, Score]:
        return {name: _score(self.seen[name]) for name in self.options}

    def leader(self) -> str:
        if len(self.running) == 1:
            return self.running[0]
        current = self.current
        if CURRENT in self.seen:  # on the same images as the options
            current = SlimmingStep(None, current.channels, current.cost, _score(self.seen[CURRENT]))
        scores = {name: _score(self.seen[name]) for name in self.running}
        return min(self.running, key=lambda n: rank(scores[n], self.options[n], current, self.by, self.per_cost))

    def drop(self, least_z: float) -> None:
        leader = self.leader()
        running = [leader]
        for name in self.running:
            if name != leader:
                behind = self._behind(name, leader)
                left = 1 - len(behind) / self.images  # the correction for a finite population
                error = float(behind.std()) * math.sqrt(left / len(behind))
                if float(behind.mean()) <= least_z * error:
                    running.append(name)
        self.running = running

    def _behind(self, name: str, leader: str) -> Tensor:
        """How much more the option loses on each image than the leader, for each unit of cost saved if so ranked."""
        if not self.per_cost:
            return self._losses(name) - self._losses(leader)
        increases = [self._losses(which) - self._losses(CURRENT) for which in (name, leader)]
        saved = [saving(self.current, self.options[which]) for which in (name, leader)]
        if all(float(increase.mean()) < 0 for increase in increases):  # see slimming.rank: the more saved the better
            return increases[0] * saved[0] - increases[1] * saved[1]
        return increases[0] / saved[0] - increases[1] / saved[1]

    def _losses(self, name: str) -> Tensor:
        return torch.cat([o.wrong if self.by == "error" else o.nats for o in self.seen[name]])


def _score(outcomes: Sequence[Outcome]) -> Score:
    wrong = torch.cat([outcome.wrong for outcome in outcomes])
    nats = torch.cat([outcome.nats for outcome in outcomes])
    return Score(float(wrong.mean()), float(nats.mean()), len(wrong))


TRIED = 8  # images


def chunk_runners(
    supernet: Supernet,
    chunks: Sequence[Chunk],
    autocast: Callable[[], torch.autocast],
    *,
    incremental: bool,
    say: Callable[[str], None],
    world: World = SINGLE,
) -> list[ChunkRunner]:
    """One lap for each chunk of images, under the batch statistics of that chunk.

    Of several processes each runs some of the configurations, on the whole chunk, and all get all outcomes: the very
    numbers that one process would have had.

    Args:
        incremental: run only what a candidate changes (see ``IncrementalEvaluator``), not each candidate as a whole. It
            is tried first; a network that it does not work on is run whole.
        say: is told of that.
    """
    tails = None
    if incremental:
        with inference_mode(supernet):
            tails, reason = verified_evaluator(supernet, chunks[0][0][:TRIED])
        if tails is None:
            say(f"search: each candidate is run whole, because the network does not run in parts: {reason}")
    return [_chunk_runner(supernet, tails, chunk, autocast, world) for chunk in chunks]


def _chunk_runner(
    supernet: Supernet,
    tails: IncrementalEvaluator | None,
    chunk: Chunk,
    autocast: Callable[[], torch.autocast],
    world: World,
) -> ChunkRunner:
    images, labels = chunk

    def run_chunk(current: SlimmingStep, options: Mapping[str, Option], wanted: Collection[str]) -> dict[str, Outcome]:
        names = [name for name in (*options, CURRENT) if name in wanted]
        own = names[world.rank :: world.world_size]  # in the network's order: each gets long tails and short ones
        slimmer = {name: options[name].channels for name in own if name != CURRENT}
        shared = torch.zeros(len(names), 2, len(labels), device=labels.device)
        with inference_mode(supernet), autocast():
            if tails is not None and len(names) > 1:
                runs = _branching(tails, images, current, own, slimmer)
            else:
                runs = _one_by_one(supernet, images, current, own, slimmer)
            for name, logits in runs:
                shared[names.index(name)] = _judged(logits, labels)
        table = world.add(shared).cpu().double()  # the others' rows are zero; the host waits once a lap
        for name, (_, nats) in zip(names, table, strict=True):
            if not bool(nats.isfinite().all()):
                slimmed = f"{options[name].channels} channels of {name}" if name != CURRENT else "no group slimmed"
                check_finite(float(nats.mean()), f"the subnet of cost {current.cost:,} with {slimmed}")
        return {name: Outcome(*rows.unbind()) for name, rows in zip(names, table, strict=True)}

    return run_chunk


def _branching(
    tails: IncrementalEvaluator, images: Tensor, current: SlimmingStep, own: Sequence[str], slimmer: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    left = len(own)
    runs = tails.run(images, current.channels, slimmer)
    while left:  # and no further: the current network's end is only run where it is asked for
        name, logits = next(runs)
        left -= 1
        yield CURRENT if name is None else name, logits


def _one_by_one(
    supernet: Supernet, images: Tensor, current: SlimmingStep, own: Sequence[str], slimmer: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for name in own:
        supernet.select({**current.channels, **({name: slimmer[name]} if name != CURRENT else {})})
        yield name, supernet(images)


def _judged(logits: Tensor, labels: Tensor) -> Tensor:
    """(2, N): whether each image is wrong at top-1, and its cross-entropy in nats."""
    logits = logits.float()
    return torch.stack([(logits.argmax(1) != labels).float(), F.cross_entropy(logits, labels, reduction="none")])
