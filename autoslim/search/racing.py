"""Racing: scores options chunk by chunk until it is clear which ones are taken."""

import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from autoslim.channels.batches import batch_arguments, call, first_tensor
from autoslim.channels.copying import inference_mode
from autoslim.channels.groups import Channels
from autoslim.distributed.ranks import SINGLE, World
from autoslim.errors import UserError
from autoslim.resources.budgets import format_amount
from autoslim.search.greedy import Choose, Evaluation, Option, SelectionRule
from autoslim.search.incremental import IncrementalEvaluator, verified_evaluator
from autoslim.search.scoring import CURRENT, By, Increase, Outcome, increase, mean_score
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import check_finite
from autoslim.tasks.classification import CLASSIFICATION
from autoslim.tasks.task import Score

VERIFICATION_IMAGES = 8


SampleScores = Callable[[Any, Any], Tensor]
"""(output, targets) -> the error and the loss of each image, (2, N); see ``Task.sample_scores``."""

ChunkRunner = Callable[[Channels, Mapping[str, int]], Mapping[str, Outcome]]
"""(configuration, changes) -> outcomes on one chunk: of the configuration, under ``CURRENT``, and, for each group in
``changes``, of the configuration with this number of channels in the group."""


def racing_rule(
    runners: Sequence[ChunkRunner], images: int, by: By, per_cost: bool, risk: float | None, seed: int
) -> SelectionRule:
    """Returns a selection rule that scores options chunk by chunk until it is clear which ones are taken.

    After each chunk, an option leaves the race and is not taken if its increase of the score is significantly higher
    than those of all options that would be taken now. It leaves and is taken if it would be taken now and the increases
    of all others that are still in the race are significantly higher. The test is paired by image, assumes normal
    differences, and treats the images evaluated so far as a sample without replacement. The current configuration is
    scored on all images. Each step starts with a different, randomly drawn chunk, so that no chunk decides more often
    than others.

    Args:
        runners: one runner for each chunk.
        images: number of images in all chunks together.
        by: see ``greedy_slim``.
        per_cost: see ``greedy_slim``.
        risk: significance level of each comparison. It is a threshold, not a guarantee: multiplied by the number of
            comparisons of a step, at least (options - 1) * (chunks - 1), it is an upper bound on the probability of a
            different choice than on all images, and at usual sizes that bound exceeds 1. None runs all options on all
            images.
        seed: seed of the draw of each step's first chunk.
    """
    z = None if risk is None else NormalDist().inv_cdf(1 - risk)

    def rule(channels: Channels, options: Mapping[str, Option], choose: Choose) -> Evaluation:
        race = _Race(options, images, by, per_cost)
        drawn = f"{seed}/{sorted(channels.items())}"  # the same when a search is resumed
        first = random.Random(drawn).randrange(len(runners))
        taken: tuple[str, ...] = ()
        for number in range(len(runners)):
            undecided = {name: options[name].channels for name in race.undecided}
            race.add(runners[(first + number) % len(runners)](channels, undecided))
            if race.undecided:
                taken = choose(race.increases((*race.taken, *race.undecided)), race.taken)
                if z is not None and number + 1 < len(runners):
                    race.decide(taken, z)
        scores = {name: race.score(name) for name in options}
        return Evaluation(race.score(CURRENT), scores, taken, race.increases(options))

    return rule


@dataclass
class _Race:
    """The state of the race of one slimming step."""

    options: Mapping[str, Option]
    images: int
    by: By
    per_cost: bool
    undecided: list[str] = field(init=False)
    taken: list[str] = field(default_factory=list)  # the options that have left the race and are taken
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.undecided = list(self.options)

    def add(self, outcomes: Mapping[str, Outcome]) -> None:
        for name, outcome in outcomes.items():
            self.outcomes.setdefault(name, []).append(outcome)

    def score(self, name: str) -> Score:
        return mean_score(self.outcomes[name])

    def increases(self, names: Iterable[str]) -> dict[str, Increase]:
        """Returns the increase of the score of each option in ``names``, on the images that it was run on."""
        return {
            name: increase(mean_score(self.outcomes[CURRENT][: len(self.outcomes[name])]), self.score(name))
            for name in names
        }

    def decide(self, taken: Collection[str], z: float) -> None:
        """Removes from the race the options that are separated from others by more than ``z`` standard errors.

        Args:
            taken: the options that would be taken now.
        """
        increases = {name: self._increases_by_image(name) for name in (*self.taken, *self.undecided)}

        def worse(name: str, other: str) -> bool:
            return self._is_worse(name, increases[name], other, increases[other], z)

        rivals = [name for name in self.undecided if name not in taken]
        rivals = [name for name in rivals if not all(worse(name, chosen) for chosen in taken)]
        chosen = [name for name in taken if name in self.undecided]
        contested = [name for name in chosen if not all(worse(rival, name) for rival in rivals)]
        self.taken += [name for name in chosen if name not in contested]
        self.undecided = [name for name in self.undecided if name in (*rivals, *contested)]

    def _is_worse(self, name: str, increases: Tensor, other: str, others: Tensor, z: float) -> bool:
        """Returns whether an option's increase, with ``per_cost`` per unit saved, is significantly above another's."""
        images = min(len(increases), len(others))  # those that both have been run on
        pair = [increases[:images], others[:images]]
        if self.per_cost:
            saved = [self.options[name].saved, self.options[other].saved]
            if all(float(increase.mean()) < 0 for increase in pair):  # a larger saving is better: see scoring.rank
                saved = [1 / amount for amount in saved]
            pair = [increase / amount for increase, amount in zip(pair, saved, strict=True)]
        excess = pair[0] - pair[1]
        correction = 1 - images / self.images  # the finite population correction
        error = float(excess.std()) * math.sqrt(correction / images)
        return float(excess.mean()) > z * error

    def _increases_by_image(self, name: str) -> Tensor:
        """Returns (N,), the option's score minus that of the current configuration on each image it was run on."""
        outcomes = [self.outcomes[which][: len(self.outcomes[name])] for which in (name, CURRENT)]
        scores = [torch.cat([outcome.scores(self.by) for outcome in chunks]) for chunks in outcomes]
        return scores[0] - scores[1]


def chunk_runners(
    supernet: Supernet,
    chunks: Sequence[tuple[Any, Any]],
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    incremental: bool,
    report: Callable[[str], None],
    world: World = SINGLE,
    scores: SampleScores = CLASSIFICATION.sample_scores,
    check: Callable[[float, str], None] = check_finite,
) -> list[ChunkRunner]:
    """Returns one runner for each chunk (inputs, targets) of images. A chunk's images share their batch statistics.

    Each of several processes runs some of the configurations on the whole chunk, and every process receives all
    outcomes. They equal those that a single process would compute.

    Args:
        incremental: evaluate only the part that a candidate changes (see ``IncrementalEvaluator``). This is verified
            first; a network that does not support it is evaluated as a whole.
        report: called with a message if the network is evaluated as a whole.
        scores: computes the error and the loss of each image from the network's output and the targets.
        check: raises an error for (a mean score, the description of a subnet) that is not finite.
    """
    evaluator = None
    if incremental:
        few = batch_arguments(chunks[0][0]).map(lambda tensor: tensor[:VERIFICATION_IMAGES])
        with inference_mode(supernet):
            evaluator, reason = verified_evaluator(supernet, few)
        if evaluator is None:
            report(f"search: each candidate is evaluated as a whole, because the network cannot be split: {reason}")
    return [_chunk_runner(supernet, evaluator, chunk, autocast, world, scores, check) for chunk in chunks]


def _chunk_runner(
    supernet: Supernet,
    evaluator: IncrementalEvaluator | None,
    chunk: tuple[Any, Any],
    autocast: Callable[[], AbstractContextManager[object]],
    world: World,
    scores: SampleScores,
    check: Callable[[float, str], None],
) -> ChunkRunner:
    inputs, targets = chunk
    samples = first_tensor(inputs)

    def run_chunk(channels: Channels, changes: Mapping[str, int]) -> dict[str, Outcome]:
        names = [*changes, CURRENT]
        share = names[world.rank :: world.world_size]  # in the network's order: each rank gets early and late groups
        table = torch.zeros(len(names), 2, len(samples), device=samples.device)
        with inference_mode(supernet), autocast():
            for name, output in _runs(supernet, evaluator, inputs, channels, changes, share):
                rows = scores(output, targets)
                if rows.shape != table.shape[1:]:
                    raise UserError(
                        f"score must return one number for each of the {len(samples)} samples of a batch, but it "
                        f"returned a tensor of shape {tuple(rows.shape[1:])}; do not average over samples"
                    )
                table[names.index(name)] = rows
        table = world.add(table).cpu().double()  # rows of other ranks are zero; the host synchronises once per chunk
        for name, (_, losses) in zip(names, table, strict=True):
            if not bool(losses.isfinite().all()):
                changed = f" with {changes[name]} channels of {name}" if name != CURRENT else ""
                macs = format_amount(supernet.graph.macs(channels))
                check(float(losses.mean()), f"the subnet of {macs} MACs{changed}")
        return {name: Outcome(*rows.unbind()) for name, rows in zip(names, table, strict=True)}

    return run_chunk


def _runs(
    supernet: Supernet,
    evaluator: IncrementalEvaluator | None,
    inputs: Any,
    channels: Channels,
    changes: Mapping[str, int],
    names: Sequence[str],
) -> Iterator[tuple[str, Any]]:
    """Yields (name, output) for each of ``names``. Narrower groups branch off the run of ``channels``."""
    if evaluator is not None:
        slimmer = {name: changes[name] for name in names if name != CURRENT and changes[name] < channels[name]}
        if slimmer:
            runs = evaluator.run(batch_arguments(inputs), channels, slimmer)
            for _ in range(len(slimmer) + (CURRENT in names)):  # the current network ends early unless it is needed
                group, output = next(runs)
                yield CURRENT if group is None else group, output
            names = [name for name in names if name not in slimmer and name != CURRENT]
    for name in names:
        supernet.select(channels if name == CURRENT else {**channels, name: changes[name]})
        yield name, call(supernet, inputs)
