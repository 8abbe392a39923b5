"""Racing: candidates are scored chunk by chunk, and those that are clearly not the best drop out."""

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from autoslim.algorithms.slimming import By, Judge, Option, SlimmingStep, rank, saving
from autoslim.vocabulary.scores import Score

CURRENT = ""
"""Stands for the current configuration among the groups."""


@dataclass(frozen=True)
class Outcome:
    """What a configuration makes of each image: ``wrong`` at top-1 (0 or 1) and ``nats`` of cross-entropy.

    Both (N,), float64, on the CPU.
    """

    wrong: Tensor
    nats: Tensor


Lap = Callable[[SlimmingStep, Mapping[str, Option], Collection[str]], Mapping[str, Outcome]]
"""Runs the configurations that slim these groups, or ``CURRENT``, on one chunk of images."""


def race_judge(laps: Sequence[Lap], images: int, by: By, per_cost: bool, risk: float | None, seed: int) -> Judge:
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

    def judge(current: SlimmingStep, options: Mapping[str, Option]) -> tuple[str, Mapping[str, Score]]:
        course = _Course(current, options, images, by, per_cost)
        first = random.Random(f"{seed}/{current.cost}").randrange(len(laps))  # the same when a search goes on
        for number in range(len(laps)):
            wanted = set(course.running)
            if per_cost and len(wanted) > 1:
                wanted.add(CURRENT)
            course.add(laps[(first + number) % len(laps)](current, options, wanted))
            if risk is not None and len(course.running) > 1 and number + 1 < len(laps):
                course.drop(least_z=NormalDist().inv_cdf(1 - risk))
        return course.leader(), course.scores()

    return judge


@dataclass
class _Course:
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
