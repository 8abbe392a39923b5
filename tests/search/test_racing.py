"""Compares the race with the exhaustive choice on synthetic outcomes."""

import json
import random
from collections.abc import Collection, Mapping
from types import SimpleNamespace

import pytest
import torch

from autoslim.channels.groups import Channels
from autoslim.search.greedy import Choose, Evaluation, Option, SlimmingStep, exhaustive_rule
from autoslim.search.racing import ChunkRunner, racing_rule
from autoslim.search.scoring import CURRENT, By, Increase, Outcome, rank
from autoslim.search.trajectory import step_from_dict, step_to_dict
from autoslim.tasks.task import Score

CHUNKS, CHUNK = 8, 64
IMAGES = CHUNKS * CHUNK


def first_chunk_of(field: "Field") -> int:
    """Returns the chunk that a race begins with."""
    ran: list[int] = []

    def runner(number: int, run_chunk: ChunkRunner) -> ChunkRunner:
        def run(channels: Channels, changes: Mapping[str, int]) -> Mapping[str, Outcome]:
            ran.append(number)
            return run_chunk(channels, changes)

        return run

    field.race("error", False, None, runners=[runner(number, run) for number, run in enumerate(field.runners())])
    assert sorted(ran) == list(range(CHUNKS))
    return ran[0]


def option(cost: float) -> Option:
    """Returns an option of a configuration that costs 1000."""
    return Option(1, cost, 1000 - cost)


class Field:
    """Losses of every option on every image: the difficulty of the image, the mean of the option, and noise."""

    def __init__(self, seed: int, options: int, spread: float) -> None:
        draw = torch.Generator().manual_seed(seed)
        difficulty = torch.rand(IMAGES, generator=draw, dtype=torch.float64)
        self.names = [f"g{number}" for number in range(options)]
        self.nats, self.wrong = {}, {}
        for name in [CURRENT, *self.names]:
            mean = 0 if name == CURRENT else spread * float(torch.rand(1, generator=draw))
            self.nats[name] = difficulty + mean + 0.2 * torch.randn(IMAGES, generator=draw, dtype=torch.float64)
            self.wrong[name] = (self.nats[name] > 0.7).double()
        costs = random.Random(seed)
        self.options = {name: option(costs.randrange(500, 900)) for name in self.names}
        self.channels = dict.fromkeys(self.names, 2)

    def score(self, name: str) -> Score:
        return Score(float(self.wrong[name].mean()), float(self.nats[name].mean()), IMAGES)

    def runners(self) -> list[ChunkRunner]:
        def run_chunk(number: int) -> ChunkRunner:
            part = slice(number * CHUNK, (number + 1) * CHUNK)

            def run(_: Mapping[str, int], changes: Mapping[str, int]) -> dict[str, Outcome]:
                return {name: Outcome(self.wrong[name][part], self.nats[name][part]) for name in (*changes, CURRENT)}

            return run

        return [run_chunk(number) for number in range(CHUNKS)]

    def choice(self, by: By, per_cost: bool, count: int = 1) -> Choose:
        """Returns the choice of the ``count`` best options."""

        def choose(increases: Mapping[str, Increase], first: Collection[str]) -> tuple[str, ...]:
            def key(name: str) -> tuple[float, ...]:
                return name not in first, *rank(increases[name], self.options[name].saved, by, per_cost)

            return tuple(sorted(increases, key=key)[:count])

        return choose

    def race(
        self, by: By, per_cost: bool, risk: float | None, count: int = 1, runners: list[ChunkRunner] | None = None
    ) -> Evaluation:
        rule = racing_rule(runners or self.runners(), IMAGES, by, per_cost, risk, 0)
        return rule(self.channels, self.options, self.choice(by, per_cost, count))

    def exhaustive(self, by: By, per_cost: bool, count: int = 1) -> tuple[str, ...]:
        def score(channels: Mapping[str, int]) -> Score:
            return self.score(next((name for name in self.names if channels[name] == 1), CURRENT))

        return exhaustive_rule(score)(self.channels, self.options, self.choice(by, per_cost, count)).taken


WAYS = [(by, per_cost) for by in ("error", "cross_entropy") for per_cost in (False, True)]


COUNTS = [1, 4]
"""Options that a step takes."""


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("by", "per_cost"), WAYS)
def test_without_risk_every_option_is_scored_on_every_image(by: By, per_cost: bool, count: int) -> None:
    for seed in range(20):
        field = Field(seed, options=9, spread=0.1)
        result = field.race(by, per_cost, None, count)
        assert result.taken == field.exhaustive(by, per_cost, count)
        for name, score in {CURRENT: result.score, **result.scores}.items():
            assert score.images == IMAGES
            assert (score.error, score.loss) == pytest.approx((field.score(name).error, field.score(name).loss))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("by", "per_cost"), WAYS)
def test_the_choice_differs_from_the_exhaustive_one_no_more_often_than_stated(
    by: By, per_cost: bool, count: int
) -> None:
    """Near ties, the hardest case: 300 races whose comparisons together have a risk of 10 %."""
    risk = 0.1 / (count * (10 - count) * (CHUNKS - 1))
    others = evaluated = 0
    for seed in range(300):
        field = Field(seed, options=10, spread=0.05)
        result = field.race(by, per_cost, risk, count)
        others += set(result.taken) != set(field.exhaustive(by, per_cost, count))
        evaluated += sum(score.images for score in result.scores.values())
        assert result.score.images == IMAGES
    assert others <= 30 + 2 * 5.2  # two standard deviations of a count with mean 30
    assert evaluated < 300 * 10 * IMAGES


@pytest.mark.parametrize("count", COUNTS)
def test_more_risk_evaluates_fewer_images(count: int) -> None:
    def evaluated(risk: float) -> int:
        results = [Field(seed, options=10, spread=0.05).race("cross_entropy", False, risk, count) for seed in range(30)]
        return sum(score.images for result in results for score in result.scores.values())

    assert evaluated(0.2) < evaluated(0.02) < evaluated(0.0002) < 30 * 10 * IMAGES


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("by", "per_cost"), WAYS)
def test_clear_options_leave_the_race_after_one_round(by: By, per_cost: bool, count: int) -> None:
    """Those that are clearly worse, and those that are clearly taken. The current configuration keeps running."""
    field = Field(0, options=6, spread=0.0)
    for name in field.names:
        field.nats[name][:] = field.nats[CURRENT] + (0.1 if name in field.names[:count] else 5.0)
        field.wrong[name][:] = 0.0 if name in field.names[:count] else 1.0
    result = field.race(by, per_cost, 0.05, count)
    assert set(result.taken) == set(field.names[:count])
    assert {score.images for score in result.scores.values()} == {CHUNK}
    assert result.score.images == IMAGES


def test_increases_compare_an_option_with_the_current_configuration_on_the_same_images() -> None:
    """Options leave the race after different chunks. Those of an exhaustive search are on all images."""
    field = Field(3, options=10, spread=0.05)
    result = field.race("cross_entropy", False, 0.02)
    assert len({score.images for score in result.scores.values()}) > 1
    first = first_chunk_of(field) * CHUNK
    for name in field.names:
        images = [(first + number) % IMAGES for number in range(result.scores[name].images)]
        for values, found in zip((field.wrong, field.nats), result.increases[name], strict=True):
            assert found == pytest.approx(float((values[name] - values[CURRENT])[images].mean()))
    step = SlimmingStep((), field.channels, 1.0, result.score, field.options, result.scores, (), result.increases)
    costs = SimpleNamespace(all=lambda _: {})
    written = json.loads(json.dumps(step_to_dict(step, costs)))  # type: ignore[arg-type]
    assert step_from_dict(written) == step


@pytest.mark.parametrize(
    ("in_first_chunk", "in_others", "expected"),
    [
        # g0 leaves as taken, with an increase that is above those of g1 and g2 on all chunks.
        ((0.5, 1.0, 1.0, 5.0), (0.0, 0.1, 0.1, 4.0), {"g0"}),
        # g3 leaves as not taken, with an increase that is below those of g1 and g2 on all chunks.
        ((0.0, 0.1, 0.1, 0.3), (0.5, 1.0, 1.0, 1.5), set()),
    ],
)
def test_an_option_that_has_left_the_race_keeps_its_decision(
    in_first_chunk: tuple[float, ...], in_others: tuple[float, ...], expected: set[str]
) -> None:
    field = Field(0, options=4, spread=0.0)
    field.options = dict.fromkeys(field.names, option(500))
    first = first_chunk_of(field)
    noise = 0.02 * torch.randn(4, IMAGES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, name, early, late in zip(noise, field.names, in_first_chunk, in_others, strict=True):
        field.nats[name] = field.nats[CURRENT] + row + late
        field.nats[name][first * CHUNK : (first + 1) * CHUNK] += early - late
    taken = set(field.race("cross_entropy", False, 0.05, count=2).taken)
    assert expected <= taken <= {"g0", "g1", "g2"}


def test_the_first_chunk_differs_between_steps_and_is_the_same_when_a_step_is_repeated() -> None:
    field = Field(0, options=3, spread=0.1)
    firsts = []
    for channels in range(1000, 1040):
        field.channels = dict.fromkeys(field.names, channels)
        firsts += [first_chunk_of(field), first_chunk_of(field)]
    assert firsts[::2] == firsts[1::2]
    assert set(firsts) == set(range(CHUNKS))
