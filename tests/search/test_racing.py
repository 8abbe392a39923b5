"""Compares the race with the exhaustive choice on synthetic outcomes."""

import random
from collections.abc import Collection, Mapping

import pytest
import torch

from autoslim.search.greedy import Option, SlimmingStep, exhaustive_rule
from autoslim.search.racing import CURRENT, ChunkRunner, racing_rule
from autoslim.search.scoring import By, Outcome
from autoslim.tasks.classification import Score

LAPS, LAP = 8, 64
IMAGES = LAPS * LAP


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
        self.options = {name: Option(1, costs.randrange(500, 900)) for name in self.names}
        self.current = SlimmingStep(None, dict.fromkeys(self.names, 2), 1000, self.score(CURRENT))

    def score(self, name: str) -> Score:
        return Score(float(self.wrong[name].mean()), float(self.nats[name].mean()), IMAGES)

    def runners(self) -> list[ChunkRunner]:
        def run_chunk(number: int) -> ChunkRunner:
            part = slice(number * LAP, (number + 1) * LAP)

            def run(_: SlimmingStep, __: Mapping[str, Option], wanted: Collection[str]) -> dict[str, Outcome]:
                return {name: Outcome(self.wrong[name][part], self.nats[name][part]) for name in wanted}

            return run

        return [run_chunk(number) for number in range(LAPS)]

    def exhaustive(self, by: By, per_cost: bool) -> str:
        def score(channels: Mapping[str, int]) -> Score:
            return self.score(next(name for name in self.names if channels[name] == 1))

        return exhaustive_rule(score, by, per_cost)(self.current, self.options)[0]


WAYS = [(by, per_cost) for by in ("error", "cross_entropy") for per_cost in (False, True)]


@pytest.mark.parametrize(("by", "per_cost"), WAYS)
def test_without_risk_every_option_is_scored_on_every_image(by: By, per_cost: bool) -> None:
    for seed in range(20):
        field = Field(seed, options=9, spread=0.1)
        best, scores = racing_rule(field.runners(), IMAGES, by, per_cost, None, 0)(field.current, field.options)
        assert best == field.exhaustive(by, per_cost)
        for name, score in scores.items():
            assert score.images == IMAGES
            assert (score.error, score.cross_entropy) == pytest.approx(
                (field.score(name).error, field.score(name).cross_entropy)
            )


@pytest.mark.parametrize(("by", "per_cost"), WAYS)
def test_the_exhaustive_choice_is_dropped_no_more_often_than_stated(by: By, per_cost: bool) -> None:
    """Near ties, the hardest case: 300 races whose comparisons together have a risk of 10 %."""
    risk = 0.1 / (9 * (LAPS - 1))
    others = evaluated = 0
    for seed in range(300):
        field = Field(seed, options=10, spread=0.05)
        best, scores = racing_rule(field.runners(), IMAGES, by, per_cost, risk, 0)(field.current, field.options)
        others += best != field.exhaustive(by, per_cost)
        evaluated += sum(score.images for score in scores.values())
        assert scores[best].images == IMAGES
        assert scores[best].cross_entropy == pytest.approx(field.score(best).cross_entropy)
    assert others <= 30 + 2 * 5.2  # two standard deviations of a count with mean 30
    assert evaluated < 300 * 10 * IMAGES


def test_more_risk_evaluates_fewer_images() -> None:
    def evaluated(risk: float) -> int:
        races = []
        for seed in range(30):
            field = Field(seed, options=10, spread=0.05)
            _, scores = racing_rule(field.runners(), IMAGES, "cross_entropy", False, risk, 0)(
                field.current, field.options
            )
            races.append(sum(score.images for score in scores.values()))
        return sum(races)

    assert evaluated(0.2) < evaluated(0.02) < evaluated(0.0002) < 30 * 10 * IMAGES


@pytest.mark.parametrize(("by", "per_cost"), WAYS)
def test_clearly_worse_options_are_dropped_after_one_round(by: By, per_cost: bool) -> None:
    field = Field(0, options=6, spread=0.0)
    for name in field.names[1:]:
        field.nats[name] += 5.0
        field.wrong[name][:] = 1.0
    best, scores = racing_rule(field.runners(), IMAGES, by, per_cost, 0.05, 0)(field.current, field.options)
    assert best == field.names[0]
    assert {scores[name].images for name in field.names[1:]} == {LAP}
    assert scores[best].images == IMAGES


def test_the_first_chunk_differs_between_steps_and_is_the_same_when_a_step_is_repeated() -> None:
    field = Field(0, options=3, spread=0.1)
    starts: list[int] = []

    def runners() -> list[ChunkRunner]:
        def recorded(number: int, run_chunk: ChunkRunner) -> ChunkRunner:
            def run(current: SlimmingStep, options: Mapping[str, Option], wanted: Collection[str]) -> object:
                starts.append(number)
                return run_chunk(current, options, wanted)

            return run  # type: ignore[return-value]

        return [recorded(number, run_chunk) for number, run_chunk in enumerate(field.runners())]

    firsts = []
    for cost in range(1000, 1040):
        step = SlimmingStep(None, field.current.channels, cost, field.current.score)
        for _ in range(2):
            starts.clear()
            racing_rule(runners(), IMAGES, "error", False, None, 0)(step, field.options)
            assert sorted(starts) == list(range(LAPS))
            firsts.append(starts[0])
    assert firsts[::2] == firsts[1::2]
    assert set(firsts) == set(range(LAPS))
