"""The evidence: its params files, what makes two runs the same, and its statistics against formulas."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
import pytest
import run
import summary
import torch
from closure import ROOT
from studies import Pieces, changed, load_yaml

from autoslim import trace
from autoslim.networks.building import build_network
from autoslim.shell.params import check_params

NETWORKS = ("mobilenet_v2", "resnet")
STUDIES = load_yaml(ROOT / "evidence/studies.yaml")


@pytest.fixture(params=NETWORKS)
def params(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load_yaml(ROOT / f"evidence/{request.param}.yaml")


def test_every_study_has_parameters_that_the_stages_take(params: dict[str, Any]) -> None:
    check_params(params, "base")
    regimes = [regime["changes"] for regime in STUDIES["table"]["regimes"].values()]
    for changes in (*regimes, *STUDIES["factors"]["changes"].values()):
        check_params(changed(params, changes), str(changes))
    with pytest.raises(SystemExit, match=r"there is no parameter search\.scores"):
        changed(params, {"search.scores": "error"})


def test_pieces_are_the_same_where_what_they_read_is(tmp_path: Path, params: dict[str, Any]) -> None:
    pieces = Pieces(tmp_path)

    def same(changes: dict[str, Any], files: dict[str, bytes] | None = None) -> set[str]:
        other = changed(params, changes)
        return {stage for stage in stages if pieces.key(stage, params, {}) == pieces.key(stage, other, files)}

    stages = {"prepare", "resources", "supernet", "search", "allocate", "retrain"}
    assert same({}) == stages
    assert same({"budget": "31%"}) == stages - {"allocate"}
    assert same({"search.images": 300}) == stages - {"search", "allocate"}
    assert same({"supernet.epochs": 1}) == {"prepare", "resources", "retrain"}
    assert same({"retrain.seeds": [7]}) == stages - {"retrain"}
    assert same({"data.search_images": 300}) == set()
    assert same({}, {"channels": b"1"}) == set()


def test_random_networks_just_hold_the_budget(params: dict[str, Any]) -> None:
    model = params["model"]
    graph = trace(build_network(model["name"], model["kwargs"], 10), torch.empty(1, 3, 16, 16))
    divisor = params["supernet"]["grid"]["divisor"]
    drawn = [run._random_network(graph, STUDIES["ranking"], divisor, seed) for seed in range(6)]
    assert drawn[0] == run._random_network(graph, STUDIES["ranking"], divisor, 0)
    for channels in drawn:
        graph.check(channels)
        assert 0.96 < graph.macs(channels) / (0.5 * graph.macs()) <= 1
    assert len({tuple(channels.values()) for channels in drawn}) == 6


def row(supernet: int, seed: int, top1: float) -> dict[str, float]:
    return {"supernet": supernet, "seed": seed, "params": 1000, "search_top1": top1, "top1": top1}


def frame(rows: Iterable[dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def test_intervals_count_a_supernet_once() -> None:
    found = frame(row(supernet, seed, 60 + supernet + 0.5 * seed) for supernet in range(3) for seed in range(3))
    uniform = frame(row(0, seed, 59 + 0.4 * seed) for seed in range(5))
    gains, interval = summary._gain(found, uniform, paired=False)
    assert gains == pytest.approx([60.5 - 59.8, 61.5 - 59.8, 62.5 - 59.8])
    one, other = [60.5, 61.5, 62.5], [59 + 0.4 * seed for seed in range(5)]
    a, b = stdev(one) ** 2 / 3, stdev(other) ** 2 / 5
    half = _t_quantile((a + b) ** 2 / (a**2 / 2 + b**2 / 4)) * math.sqrt(a + b)
    assert interval == pytest.approx((fmean(gains) - half, fmean(gains) + half), rel=1e-4)

    paired = frame(row(supernet, seed, 58 + 2 * supernet + seed) for supernet in range(3) for seed in range(3))
    gains, interval = summary._gain(found, paired, paired=True)
    assert gains == pytest.approx([60.5 - 59, 61.5 - 61, 62.5 - 63])
    half = _t_quantile(2) * stdev(gains) / math.sqrt(3)
    assert interval == pytest.approx((fmean(gains) - half, fmean(gains) + half), rel=1e-4)


def _t_quantile(freedom: float) -> float:
    """Of 97.5 %, by bisection of the integral of Student's density."""

    def tail(t: float, steps: int = 4000) -> float:
        at = [math.atan(t) + (math.pi / 2 - math.atan(t)) * (n + 0.5) / steps for n in range(steps)]
        density = [(1 + math.tan(x) ** 2 / freedom) ** (-(freedom + 1) / 2) / math.cos(x) ** 2 for x in at]
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        return scale * sum(density) * (math.pi / 2 - math.atan(t)) / steps

    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > 0.025 else (low, middle)
    return low


def test_rows_become_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    table = [
        {"regime": regime, "method": method, "budget": budget, **row(supernet, seed, 50 + 3 * supernet + seed + bonus)}
        for regime in ("scratch", "fine-tuned")
        for method, bonus in (("autoslim", 2), ("uniform", 0))
        for budget in ("50%", "25%")
        for supernet in ((0, 1) if (regime, method) != ("scratch", "uniform") else (0,))
        for seed in range(3)
    ]
    ranking = [
        {"kind": kind, "network": number, "macs": 100 - number, "params": number % 3, "seed": seed}
        | {"top1": 50 + number + 0.1 * seed}
        for seed in (0, 1)
        for kind in ("random", "trajectory")
        for number in range(8)
    ]
    scores = [
        {"factor": factor, "supernet": supernet, "kind": kind, "network": number, "images": images}
        | {"statistics": "batch", "top1": 40 + number, "nats": 2 - 0.1 * number}
        for factor in ("base", "no distillation")
        for supernet in (0, 1)
        for kind in ("random", "trajectory")
        for number in range(8)
        for images in (512, 2048)
    ]
    factors = [
        {"factor": factor, "budget": budget, **row(supernet, seed, 50 + seed + bonus)}
        for factor, bonus in (("base", 0), ("no distillation", -1))
        for budget in ("50%", "25%")
        for supernet in (0, 1)
        for seed in range(3)
    ]
    for study, rows in (("table", table), ("ranking", ranking), ("scores", scores), ("factors", factors)):
        pd.DataFrame(rows).to_csv(tmp_path / f"{study}-small.csv", index=False)
    summary.main("small")
    for study in ("table", "scores", "factors"):
        assert (tmp_path / f"{study}-small.png").stat().st_size > 5000


def test_ranks_are_those_of_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Top-1 in the supernet ranks as training does, cross-entropy (less is better) the other way; parameters too."""
    trained = [
        {"kind": kind, "network": number, "macs": 1, "params": -number, "seed": seed, "top1": 50 + number + 0.1 * seed}
        for kind in ("random", "trajectory")
        for number in range(8)
        for seed in (0, 1)
    ]
    scores = [
        {"factor": "base", "supernet": supernet, "kind": kind, "network": number, "images": 512, "statistics": "batch"}
        | {"top1": 2 * number + supernet, "nats": number}
        for supernet in (0, 1)
        for kind in ("random", "trajectory")
        for number in range(8)
    ]
    pd.DataFrame(trained).to_csv(tmp_path / "ranking-small.csv")
    summary._ranking(pd.DataFrame(trained), tmp_path / "ranking-small.png")
    summary._scores(pd.DataFrame(scores), tmp_path / "scores-small.png")
    said = capsys.readouterr().out
    same, opposite = "1.00 [1.00, 1.00] | 1.00 [1.00, 1.00]", "-1.00 [-1.00, -1.00] | -1.00 [-1.00, -1.00]"
    assert "| macs | equal | equal |" in said
    assert f"| params | {opposite} |" in said
    assert f"| another seed's training | {same} |" in said
    assert f"| base | 512 | batch | top1 | {same} | 1.00 |" in said
    assert f"| base | 512 | batch | nats | {opposite} | -1.00 |" in said
