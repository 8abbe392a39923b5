"""Greedy slimming: from the widest configuration down, one step of one group at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from autoslim.vocabulary.channels import Channels


@dataclass(frozen=True)
class Score:
    """A configuration on the search images: ``error`` is the fraction wrong at top-1, ``cross_entropy`` in nats."""

    error: float
    cross_entropy: float


@dataclass(frozen=True)
class Candidate:
    """One group's removal of one slimming step: the group's channels after it, the network's cost, and its score."""

    channels: int
    cost: int
    score: Score


@dataclass(frozen=True)
class SlimmingStep:
    """A configuration on the trajectory, and the candidates it was chosen from. The widest one has none."""

    slimmed: str | None
    channels: Channels
    cost: int
    score: Score
    candidates: Mapping[str, Candidate] = field(default_factory=dict)


By = Literal["error", "cross_entropy"]


def greedy_slim(
    grid: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], int],
    score: Callable[[Mapping[str, int]], Score],
    stop: float,
    *,
    by: By = "error",
    per_cost: bool = False,
    done: Sequence[SlimmingStep] = (),
) -> Iterator[SlimmingStep]:
    """Slims one group by one level at a time, always the one whose removal scores best, down to the cost ``stop``.

    The authors' greedy loop (paper section 1.4), with other ties: they take the first group, here cross-entropy decides
    and then the larger saving, so that early layers are not slimmed for their position (section 6, row 12). A step is
    taken even where the score improves, and never undone; one pass serves every budget.

    Args:
        grid: each group's numbers of channels, from the widest down.
        cost: of a configuration, in the resource's unit.
        score: of a configuration; called once for each candidate.
        stop: yields no further step once the cost is at most this. Ends too when every group is at its narrowest.
        by: what is ranked first. ``error`` is the paper's.
        per_cost: rank by the increase of the score for each unit of cost saved, not by the score.
        done: steps of an earlier run of the same search, to go on from; they are not yielded again.

    Yields:
        The widest configuration first, then one step after the other.
    """
    if done:
        current = done[-1]
    else:
        widest = {name: levels[0] for name, levels in grid.items()}
        current = SlimmingStep(None, widest, cost(widest), score(widest))
        yield current
    while current.cost > stop:
        candidates: dict[str, Candidate] = {}
        for name, levels in grid.items():
            level = levels.index(current.channels[name]) + 1
            if level == len(levels):
                continue
            slimmer = current.channels | {name: levels[level]}
            candidates[name] = Candidate(levels[level], cost(slimmer), score(slimmer))
        if not candidates:
            return
        best = min(candidates, key=lambda name: _rank(candidates[name], current, by, per_cost))
        chosen = candidates[best]
        current = SlimmingStep(best, current.channels | {best: chosen.channels}, chosen.cost, chosen.score, candidates)
        yield current


def _rank(candidate: Candidate, current: SlimmingStep, by: By, per_cost: bool) -> tuple[float, ...]:
    saved = max(1, current.cost - candidate.cost)
    new, old = candidate.score, current.score
    error, entropy = new.error, new.cross_entropy
    if per_cost:
        error, entropy = _rate(new.error - old.error, saved), _rate(new.cross_entropy - old.cross_entropy, saved)
    return (error, entropy, -saved) if by == "error" else (entropy, error, -saved)


def _rate(increase: float, saved: float) -> float:
    """An increase for each unit saved. A decrease is better the more is saved with it, so there it is the product."""
    return increase / saved if increase > 0 else increase * saved
