"""The evidence: its params files, the cache of runs, a small study, and its statistics against closed forms."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest
import run
import studies
import summary
import torch
import trained
from paths import ROOT
from small_project import SMALLER
from studies import StageCache, changed, load_yaml
from tiny import tiny_params

from autoslim import trace
from autoslim.channels.graph import ChannelGraph
from autoslim.models.building import build_network
from autoslim.pipeline.assembly import grid_spec
from autoslim.pipeline.params import check_params
from autoslim.resources.budgets import parse_budget
from autoslim.resources.costs import Costs
from autoslim.search.methods import allocate

NETWORKS = ("mobilenet_v2", "resnet")
STUDIES = load_yaml(ROOT / "evidence/studies.yaml")


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def params(name: str) -> dict[str, Any]:
    return load_yaml(ROOT / f"evidence/{name}.yaml")


def graph_of(params: dict[str, Any]) -> ChannelGraph:
    model = params["model"]
    return trace(build_network(model["name"], model["kwargs"], 10), torch.empty(1, 3, 16, 16))


# Studies


def test_every_study_has_valid_parameters(params: dict[str, Any]) -> None:
    check_params(params, "base")
    table, within = STUDIES["table"], STUDIES["ranking"]["within"]
    for changes in (
        *table["regimes"].values(),
        *table["searches"].values(),
        STUDIES["longer"]["changes"],
    ):
        check_params(changed(params, changes), str(changes))
    assert STUDIES["factors"]["regime"] == table["regimes"]["fine-tuned"]
    for (changes, own), (_, again) in run._screened(STUDIES["factors"], params):
        check_params(own, str(changes))
        assert {**again, "search": None} == {**own, "search": None}  # the same supernet
        assert all(again["search"][name] != own["search"][name] for name in ("score", "images", "per_cost"))
        narrow, supernet = (grid_spec(check_params(each, "").supernet) for each in (changed(params, within), own))
        assert narrow.width <= supernet.width  # every supernet contains the random networks
    with pytest.raises(SystemExit, match=r"there is no parameter search\.scores"):
        changed(params, {"search.scores": "error"})


def test_the_search_benchmark_has_valid_parameters() -> None:
    check_params(load_yaml(ROOT / "benchmarks/search.yaml"), "benchmarks/search.yaml")


def test_uniform_networks_just_fill_the_budgets(name: str, params: dict[str, Any]) -> None:
    """Otherwise a network of the search, which fills them in smaller steps, would be larger."""
    graph = graph_of(params)
    widest = graph.grid(grid_spec(check_params(params, "base").supernet)).widest
    for study in ("table", "longer", "factors"):
        for budget in STUDIES[study]["budgets"][name]:
            limit = parse_budget(budget).absolute(graph.macs())
            uniform = allocate("uniform", Costs(graph), [widest], {"macs": limit})
            assert 0.99 < graph.macs(uniform) / limit <= 1


def test_runs_are_shared_if_their_inputs_are_equal(tmp_path: Path, params: dict[str, Any]) -> None:
    cache = StageCache(tmp_path)

    def same(changes: dict[str, Any], files: dict[str, bytes] | None = None) -> set[str]:
        other = changed(params, changes)
        return {stage for stage in stages if cache.key(stage, params, {}) == cache.key(stage, other, files)}

    stages = {"prepare", "resources", "supernet", "search", "allocate", "retrain"}
    assert same({}) == stages
    assert same({"budget": "31%"}) == stages - {"allocate"}
    assert same({"search.images": 300}) == stages - {"search", "allocate"}
    assert same({"supernet.epochs": 1}) == {"prepare", "resources", "retrain"}
    assert same({"retrain.seeds": [7]}) == stages - {"retrain"}
    assert same({"data.search_images": 300}) == set()
    assert same({}, {"channels": b"1"}) == set()
    params = changed(params, {"budget": {"macs": "50%", "params": "50%"}})
    assert same({"budget": {"macs": "25%", "params": "80%"}}) == {"prepare", "supernet", "retrain"}


def test_files_that_parameters_name_belong_to_the_runs_that_read_them(tmp_path: Path) -> None:
    params = changed(
        load_yaml(ROOT / "evidence/efficientnet_lite0.yaml"),
        {"latency.table": "latency.json", "methods": ["l1"]},
    )
    stages = ("prepare", "resources", "supernet", "allocate", "retrain", *studies.TOOLS)
    weights, table = tmp_path / "weights", tmp_path / "table"
    cache = StageCache(tmp_path, {"trained.safetensors": weights, "latency.json": table})

    def keys(weights_: bytes, table_: bytes, params: dict[str, Any] = params) -> dict[str, str]:
        weights.write_bytes(weights_)
        table.write_bytes(table_)
        return {stage: cache.key(stage, params) for stage in stages}

    def changed_by(other: dict[str, str]) -> set[str]:
        return {stage for stage in stages if before[stage] != other[stage]}

    before = keys(b"1", b"1")
    assert changed_by(keys(b"2", b"1")) == {*stages} - {"prepare"}
    assert changed_by(keys(b"1", b"2")) == {"resources", "allocate", *studies.TOOLS}
    # The supernet depends on whether a method needs it, not on which.
    assert changed_by(keys(b"1", b"1", changed(params, {"methods": ["uniform"]}))) == {"allocate"}
    assert changed_by(keys(b"1", b"1", changed(params, {"methods": ["random"]}))) == {*stages} - {"prepare", "retrain"}


def test_the_study_of_a_trained_network_is_valid() -> None:
    study, params = STUDIES["trained"], load_yaml(ROOT / "evidence/efficientnet_lite0.yaml")
    check_params(changed(params, study["changes"]), "base")
    cells = trained.cells(study)
    assert len(set(cells)) == len(cells)
    of_tools = {*studies.TOOLS, trained.UNIFORM_OF_SUPERNET, trained.TRAINED, trained.DEFAULT}
    for reading, resource, budget, method, seed in cells:
        own = check_params(trained._params(params, resource, budget, method, seed), method)
        assert list(own.budgets) == [resource]
        assert method in own.methods or method in of_tools
        if trained.served(reading):  # its length follows from the other reading and from autoslim's
            for other in (method, "autoslim"):
                assert cells.index(("epochs", resource, budget, other, seed)) < cells.index(
                    (reading, resource, budget, method, seed)
                )


def test_several_budgets_share_the_supernet_and_the_search(tmp_path: Path) -> None:
    took = {"supernet": 600, "search": 90, "allocate": 40}
    (tmp_path / "outputs/channels").mkdir(parents=True)
    for method in ("autoslim", "uniform"):
        (tmp_path / f"outputs/channels/{method}.json").write_text('{"channels": {}}')
        (tmp_path / f"outputs/channels/{method}.safetensors").touch()

    class Cache:
        def run(self, stage: str, params: dict[str, Any]) -> Path:
            return tmp_path

        def done(self, stage: str, params: dict[str, Any]) -> dict[str, int]:
            return {"cpu_seconds": took[stage]}

    def seconds(methods: list[str], method: str, reading: str) -> float:
        chosen = trained._chosen(Cache(), {"methods": methods}, method)  # type: ignore[arg-type]
        return chosen.seconds(trained.served(reading) or 1)

    both, readings = ["uniform", "autoslim"], ("time", "time of 3", "time of 10")
    assert [seconds(both, "autoslim", reading) for reading in readings] == [730, 40 + 230, 40 + 69]
    assert [seconds(both, "uniform_supernet", reading) for reading in readings] == [600, 200, 60]
    assert seconds(["uniform"], "uniform", "time of 10") == 40
    assert trained.served("epochs") is None


def test_the_figure_of_several_budgets_shows_the_time_for_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"resource": "macs", "budget": "50%"}
    rows = pd.DataFrame(
        {**cell, "reading": reading, "method": method, "seed": seed, "top1": top1 + seed, **times}
        for seed in (0, 1)
        for method, reading, top1, times in [
            ("autoslim", "epochs", 76.0, {"choice_seconds": 630, "shared_seconds": 600, "cpu_seconds": 90}),
            ("uniform", "epochs", 72.0, {"choice_seconds": 30, "shared_seconds": 0, "cpu_seconds": 90}),
            ("uniform", "time of 10", 73.0, {"choice_seconds": 30, "shared_seconds": 0, "cpu_seconds": 150}),
            ("uniform", "time", 77.0, {"choice_seconds": 30, "shared_seconds": 0, "cpu_seconds": 690}),
        ]
    )
    drawn = []
    monkeypatch.setattr(summary, "write_figure", lambda path, draw, dpi: drawn.append(draw()))
    summary._several_budgets(rows, Path("unused.png"))
    containers = {str(each.get_label()): each for each in drawn[0].axes[0].containers}
    lines = {name: np.asarray(each.lines[0].get_xydata()).tolist() for name, each in containers.items()}
    assert lines["uniform"] == [[2.0, 72.5], [3.0, 73.5], [12.0, 77.5]]
    assert lines["autoslim"] == [[3.0, 76.5], [12.0, 76.5]]  # ten budgets and one
    summary._several_budgets(rows[rows["reading"] == "epochs"], Path("unused.png"))
    assert len(drawn) == 1  # there is nothing to compare


def test_equal_time_is_rounded_in_favour_of_the_others() -> None:
    assert trained.epochs_in_time(2, 80.0, 100.0) == 2 + 3
    assert trained.epochs_in_time(2, 80.0, 120.0) == 2 + 3
    assert trained.epochs_in_time(2, 80.0, -5.0) == 2


def test_random_networks_fill_the_budget_within_the_supernet(name: str, params: dict[str, Any]) -> None:
    within = changed(params, STUDIES["ranking"]["within"])
    graph, limits = graph_of(params), grid_spec(check_params(within, "base").supernet)
    budget, spread = STUDIES["ranking"]["budget"][name], STUDIES["ranking"]["spread"]
    drawn = [run._random_network(graph, budget, spread, limits, seed) for seed in range(6)]
    assert drawn[0] == run._random_network(graph, budget, spread, limits, 0)
    for channels in drawn:
        graph.check(channels)
        assert 0.98 < graph.macs(channels) / parse_budget(budget).absolute(graph.macs()) <= 1
        assert all(options[-1] <= channels[group] <= options[0] for group, options in graph.grid(limits).items())
    assert len({tuple(channels.values()) for channels in drawn}) == 6


def test_factors_of_a_screening_are_balanced() -> None:
    """The estimate of each effect is then independent of the others, with the least variance."""
    runs = pd.DataFrame(studies.screening({str(number): ("low", "high") for number in range(11)}))
    assert len(runs) == 12
    for one in runs:
        assert set(runs[one].value_counts()) == {6}
        for other in runs.drop(columns=one):
            assert list(runs.value_counts([one, other])) == [3, 3, 3, 3]


def test_an_interrupted_study_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the stages of a tiny network. The second training fails once."""
    ran: list[str] = []
    start = studies._run

    def cut(command: list[str], folder: Path) -> tuple[int, float]:
        ran.append(Path(command[1]).stem)
        return (1, 1000.0) if ran.count("retrain") == 2 else start(command, folder)

    monkeypatch.setattr(studies, "_run", cut)
    params = changed(tiny_params(SMALLER), {"retrain.start": "supernet"})
    study, parts = tmp_path / "study.csv", [("autoslim",), ("uniform",)]

    def rows(method: str) -> Iterable[dict[str, Any]]:
        for row in run._compared(StageCache(tmp_path / "kept"), params, ["50%"], method, [0, 1]):
            yield {"method": method, **row}

    with pytest.raises(SystemExit, match=r"retrain failed in .*retrain-[0-9a-f]{16}; see its log\.txt"):
        studies.collect(rows, parts, study, jobs=1)
    assert ran == ["prepare", "resources", "supernet", "search", "allocate", *["retrain"] * 4]
    rest = pd.read_csv(study)  # a failure ends a part, not the others
    assert list(zip(rest["method"], rest["seed"], strict=True)) == [("autoslim", 0), ("uniform", 0), ("uniform", 1)]
    monkeypatch.setattr("sys.argv", ["evidence/run.py", "study", "--table", str(tmp_path / "latency.json")])
    studies.collect(rows, parts, study, jobs=2)
    assert studies.read(study.with_suffix(".json"))["command"] == "python evidence/run.py study --table latency.json"
    assert ran[9:] == ["retrain"]
    whole = pd.read_csv(study)
    assert list(whole["seed"]) == [0, 1, 0, 1]
    pd.testing.assert_frame_equal(whole.drop(1).reset_index(drop=True), rest)
    assert whole["top1"].between(0, 1).all()
    assert list(whole["cpu_seconds"] > 1000) == [False, True, False, False]  # what was lost counts
    assert (whole["cpu_seconds"] > 0).all()


def test_a_stopped_study_starts_no_further_part(tmp_path: Path) -> None:
    """The operating system may give the signal to any thread, which does not wake the main one."""
    started = []

    def rows(number: int) -> Iterable[dict[str, Any]]:
        started.append(number)
        if number == 0:
            time.sleep(0.5)  # until the main thread waits
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            time.sleep(2)
        yield {"number": number}

    with pytest.raises(KeyboardInterrupt):
        studies.collect(rows, [(0,), (1,)], tmp_path / "study.csv", jobs=1)
    assert started == [0]


def test_the_other_parts_run_if_one_fails(tmp_path: Path) -> None:
    def rows(number: int) -> Iterable[dict[str, Any]]:
        if number < 2:
            raise SystemExit("it failed")
        yield {"number": number}

    with pytest.raises(SystemExit, match="it failed"):
        studies.collect(rows, [(number,) for number in range(20)], tmp_path / "study.csv", jobs=1)
    assert list(pd.read_csv(tmp_path / "study.csv")["number"]) == list(range(2, 20))


# Summaries


def row(supernet: int, seed: int, top1: float) -> dict[str, Any]:
    return {"supernet": supernet, "seed": seed, "macs": 9e5, "params": 1e4, "search_top1": top1, "top1": top1}


def frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))


def half_width(gains: list[float]) -> float:
    return _t_quantile(len(gains) - 1) * stdev(gains) / math.sqrt(len(gains))


def test_each_supernet_contributes_one_value_to_an_interval() -> None:
    found = frame(row(supernet, seed, 60 + supernet + 0.5 * seed) for supernet in range(3) for seed in range(3))
    uniform = frame(row(0, seed, 59 + 0.4 * seed) for seed in range(5))
    gain = summary._gain(found, uniform, paired=False)
    assert gain.by_supernet == pytest.approx([60.5 - 59.8, 61.5 - 59.8, 62.5 - 59.8])
    one, other = [60.5, 61.5, 62.5], [59 + 0.4 * seed for seed in range(5)]
    a, b = stdev(one) ** 2 / 3, stdev(other) ** 2 / 5
    half = _t_quantile((a + b) ** 2 / (a**2 / 2 + b**2 / 4)) * math.sqrt(a + b)
    assert gain.mean == pytest.approx(61.5 - 59.8)
    assert gain.interval == pytest.approx((gain.mean - half, gain.mean + half), rel=1e-4)

    paired = frame(row(supernet, seed, 58 + 2 * supernet + seed) for supernet in range(3) for seed in range(3))
    gain = summary._gain(found, paired, paired=True)
    assert gain.by_supernet == pytest.approx([60.5 - 59, 61.5 - 61, 62.5 - 63])
    half = half_width(gain.by_supernet)
    assert gain.interval == pytest.approx((0.5 - half, 0.5 + half), rel=1e-4)


def test_the_mean_over_networks_uses_the_variance_within_each() -> None:
    """For two networks with equal variances, the interval is that of a sum with both degrees of freedom."""
    one, other = ([start, start + 1, start + 2] for start in (0.0, 10.0))
    gain = summary._mean([summary.Gain(own, [(1, own)]) for own in (one, other)])
    assert gain.by_supernet == one + other
    half = _t_quantile(4) * math.sqrt((1 / 3 + 1 / 3) / 4)
    assert gain.interval == pytest.approx((6 - half, 6 + half), rel=1e-4)
    assert summary._mean([summary.Gain(one, [(1, one)]), summary.Gain([3.0], [(1, [3.0])])]).interval is None


def test_trainings_of_a_trained_network_are_compared_by_seed() -> None:
    def cell(seeds: Iterable[int], gain: float) -> pd.DataFrame:
        return frame({"seed": seed, "top1": 60 + 5 * seed + gain + 0.3 * seed} for seed in seeds)

    own, other = cell(range(3), 1.0), cell(range(1, 4), 0.0)
    own.loc[own["seed"] == 2, "top1"] += 0.6
    assert summary._by_seed(own, other) == "+1.30 (n 2)"
    other = cell(range(3), 0.0)
    half = half_width([1.0, 1.0, 1.6])
    assert summary._by_seed(own, other) == f"+1.20 [{1.2 - half:+.2f}, {1.2 + half:+.2f}] (n 3)"
    assert summary._by_seed(own, other[:0]) == ""


def test_supernets_with_missing_trainings_are_left_out() -> None:
    found = frame(row(supernet, seed, 60 + supernet) for supernet in range(3) for seed in range(3))
    uniform = frame(row(supernet, seed, 59) for supernet in range(3) for seed in range(3) if supernet + seed < 4)
    rows = pd.concat([found.assign(method="autoslim"), uniform.assign(method="uniform")])
    complete = summary._complete(rows, "method")
    assert set(complete[complete["method"] == "uniform"]["supernet"]) == {0, 1}
    assert len(complete[complete["method"] == "autoslim"]) == 9
    assert len(summary._complete(rows[:8], "method")) == 6
    assert summary._gain(found, complete[complete["method"] == "uniform"], paired=True).by_supernet == [1, 2]
    assert summary._gain(found[:6], uniform, paired=True).interval is None  # of two supernets


def _t_quantile(freedom: float) -> float:
    """Returns the 97.5 % quantile, by bisection of the integral of Student's density."""

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


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Iterable[dict[str, Any]]], None]:
    """Returns a function that writes the rows of a study to be summarised."""
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "FIGURES", tmp_path)

    def write(study: str, rows: Iterable[dict[str, Any]], network: str = "small") -> None:
        frame(rows).to_csv(tmp_path / f"{study}-{network}.csv", index=False)

    return write


TOP1 = {("error", 0): 0.62, ("error", 1): 0.595, (None, 0): 0.6, (None, 1): 0.6, ("other", 0): 0.63}


def table_rows(budgets: dict[str, float]) -> list[dict[str, Any]]:
    """Returns rows of two supernets. The second has no rows of the other search; the gain depends on the budget."""
    return [
        {"regime": regime, "start": start, "method": "autoslim" if search else "uniform", "search": search}
        | {"budget": budget, **row(supernet, seed, value + (more if search else 0))}
        for regime, start in (("scratch", "scratch"), ("fine-tuned", "supernet"))
        for budget, more in budgets.items()
        for (search, supernet), value in TOP1.items()
        for seed in range(3)
    ]


def test_gains_within_budgets_of_resources(results: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """The gain is paired by supernet; a supernet without all trainings is left out."""
    gains = {0: 0.01, 1: 0.02, 2: 0.03, 3: 0.5}
    rows = [
        {"resource": "memory", "method": "uniform" if search is None else "autoslim", "search": search}
        | {"budget": "40%", "memory": 104_000, "search_seconds": 50, "allocate_seconds": 7}
        | row(supernet, seed, 0.6 + 0.1 * supernet + (gains[supernet] if search else 0))
        for search in (None, "default")
        for supernet in gains
        for seed in range(3 if supernet < 3 else 1)
    ]
    results("resources-memory", rows)
    summary.main(["small"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "| memory | 40% | default |" in line)
    half = 4.302653 * 1 / math.sqrt(3)  # t with two degrees of freedom; the gains are 1, 2 and 3 points
    assert "| 104k | 57 | 72.00 ± " in line
    assert f"| +2.00 [{2 - half:+.2f}, {2 + half:+.2f}] | +1.00, +2.00, +3.00 |" in line


def test_the_table_has_gains_and_the_gain_of_the_choice(
    results: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second supernet's network has lower accuracy than uniform, also on the search split."""
    results("table", table_rows({"50%": 0, "25%": 0.01}))
    results("table", table_rows({"51%": 0.01, "26%": 0.02}), "large")
    summary.main(["small", "large"])
    output = capsys.readouterr().out.splitlines()
    lines = [line for line in output if " 50% |" in line]
    assert len(lines) == 6
    assert "| 900k / 900k | 10k / 10k | 60.00 ± 0.00 (n 6) | 60.75 ± 1.37 (n 6) | +0.75 |" in lines[0]
    assert lines[0].endswith("| +2.00, -0.50 | +1.00 |")
    assert lines[1] == lines[0].replace("scratch", "fine-tuned")
    assert lines[2].endswith("| 60.00 ± 0.00 (n 6) | 63.00 ± 0.00 (n 3) | +3.00 | +3.00 | +3.00 |")
    assert lines[3].endswith("| 60.00 ± 0.00 (n 3) | 63.00 ± 0.00 (n 3) | +3.00 | +3.00 | +3.00 |")
    assert lines[4:] == [f"| other | error | {regime} | 50% | +1.00 | +1.00 |" for regime in ("scratch", "fine-tuned")]
    assert next(line for line in output if " all |" in line).endswith("| +2.50, +0.00 | +1.25 |")
    lines = output[output.index("| search | over | regime | 50% / 51% | 25% / 26% | all | by supernet |") + 2 :]
    cells = [[cell.split(" [")[0] for cell in line.split(" | ")[3:6]] for line in lines[:6]]
    assert cells == 2 * [["+1.25", "+2.25", "+1.75"]] + 2 * [["+3.50", "+4.50", "+4.00"]] + 2 * [["+1.00"] * 3]
    assert "| +1.25 [" in lines[0]
    assert lines[0].endswith("| +2.50, +0.00, +3.50, +1.00 |")
    assert (tmp_path / "table-small.png").stat().st_size > 5000


def test_networks_are_compared_with_uniform_trained_for_as_long(
    results: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    results("table", table_rows({"50%": 0}))
    longer = [(None, 0, 0.61), (None, 0, 0.615), (None, 0, 0.605), ("other", 0, 0.64), ("other", 1, 0.63)]
    results(
        "longer",
        (
            {"epochs": 250, "search": search, "supernet": supernet, "budget": "50%", "seed": 0, "top1": top1}
            for search, supernet, top1 in longer
        ),
    )
    summary.main(["small"])
    output = capsys.readouterr().out
    assert "uniform, 50%, 250 epochs from scratch: 61.00 ± 0.50 (n 3)" in output
    for regime in ("scratch", "fine-tuned"):
        assert f"| error | {regime} | 60.75 ± 1.37 (n 6) | -0.25 | +1.00, -1.50 |" in output
    assert "| other | scratch | 63.00 ± 0.00 (n 3) | +2.00 | +2.00 |" in output
    assert "| other | scratch, 250 epochs | 63.50 ± 0.71 (n 2) | +2.50 | +3.00, +2.00 |" in output
    assert "| error | scratch, 250 epochs |" not in output


def test_rank_correlations_of_scores(
    results: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Top-1 in the supernet ranks as training does; cross-entropy (lower is better) and parameters rank in reverse."""
    results(
        "ranking",
        [
            {"kind": kind, "network": number, "budget": "50%", "macs": macs * number, "params": -number, "seed": seed}
            | {"top1": 0.5 + 0.01 * number}
            for kind, macs in (("random", 0), ("trajectory", 1))
            for number in range(8)
            for seed in (0, 1)
        ],
    )
    results(
        "scores",
        [
            {"study": "ranking", "supernet": supernet, "kind": kind, "network": number, "images": images}
            | {"statistics": "batch", "top1": sign * 0.02 * number + 0.1 * supernet, "nats": number}
            for images, sign in ((512, -1), (2048, 1))
            for supernet in (0, 1)
            for kind in ("random", "trajectory")
            for number in range(9)  # the last one is not trained yet
        ],
    )
    results("table", table_rows({"50%": 0}))
    summary.main(["small"])
    output = capsys.readouterr().out
    assert "uniform: 60.00 %, above 8 of the random networks" in output
    assert "error, supernet 1: 59.50 %, above 8" in output
    same, opposite = "1.00 [1.00, 1.00] | 1.00 [1.00, 1.00]", "-1.00 [-1.00, -1.00] | -1.00 [-1.00, -1.00]"
    assert "8 random networks, retrained: top-1 50.0 to 57.0 %" in output
    assert "| macs | equal | equal | 1.00 |" in output
    assert f"| params | {opposite} | -1.00 |" in output
    # The trainings have no variance here, so top-1 after retraining has no error.
    assert "standard deviation over networks 2.45 points, of one network's training 0.00" in output
    assert "correlation of about 1.00" in output
    assert f"| 2048 | batch | top1 | {same} | 1.00 |  |" in output
    assert f"| 2048 | batch | nats | {opposite} | -1.00 |  |" in output
    assert f"| 512 | batch | top1 | {opposite} | -1.00 | -2.00 [-2.00, -2.00] |" in output
    assert f"| 512 | batch | nats | {opposite} | -1.00 | 0.00 [0.00, 0.00] |" in output
    assert (tmp_path / "scores-small.png").stat().st_size > 5000


def test_the_partial_correlation() -> None:
    """It is the correlation of the residuals after a linear fit to the ranks of the variable held constant."""
    values = np.random.default_rng(0).normal(size=(3, 15))
    one, other, held = (
        pd.Series(each) for each in (values[0] + values[2], values[1] + values[0], values[2] - values[1])
    )
    ranks = [each.rank().to_numpy() for each in (one, other, held)]
    residuals = [each - np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2]]
    value, _, _ = summary._partial(one, other, held).partition(",")
    assert float(value) == pytest.approx(np.corrcoef(residuals)[0, 1], abs=0.005)
    assert summary._partial(one, other, one) == "undefined"


def test_effects_of_factors_are_estimated(
    results: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracies are sums of effects and of remainders orthogonal to them, which determine the intervals."""
    study = STUDIES["factors"]
    changes = study["supernet"] | study["search"]
    runs = studies.screening(changes | {"remainder": [-1, 1], "of the search": [-1, 1]})
    effects = {"supernet.epochs": 2, "supernet.distillation": -1, "search.score": 0.4, "search.per_cost": -0.2}
    trained = []
    for number, own in enumerate(runs):
        shared = {"supernet": number, "seed": 0, **{name: own[name] for name in study["supernet"]}}
        for budget, macs in (("50%", 1000), ("25%", 500)):
            base = (
                50
                + macs / 100
                + sum(effects.get(name, 0) * (own[name] == two[1]) for name, two in study["supernet"].items())
            )
            base += 0.3 * own["remainder"]
            for sign in (1, -1):  # the second search has the other values
                searched = {n: two[(own[n] == two[1]) == (sign > 0)] for n, two in study["search"].items()}
                more = sum(effects.get(name, 0) * (value == changes[name][1]) for name, value in searched.items())
                more += 1 + 0.1 * sign * own["of the search"]
                took = {"macs": macs * (0.95 if searched["search.per_cost"] else 0.99)}
                found = {"method": "autoslim", "top1": (base + more) / 100}
                trained.append({**shared, **searched, "budget": budget, **took, **found})
            trained.append({**shared, "budget": budget, "macs": macs, "method": "uniform", "top1": base / 100})
    results("factors", trained[:-1])  # the last supernet lacks a training
    summary.main(["small"])
    assert "11 supernets; means" in capsys.readouterr().out
    results("factors", trained[: 6 * 8])
    summary.main(["small"])
    assert capsys.readouterr().out == "factors: 8 supernets are done, too few to estimate the effects\n\n"
    results("factors", trained)
    scores = [
        {"study": "factors", "supernet": number, "kind": "random", "network": n, "images": 4096, "statistics": "batch"}
        | {"top1": n / 9, "nats": -n if own["supernet.width"] == 1.5 else n}
        for number, own in enumerate(runs)
        for n in range(9)
    ]
    results("scores", [scores[0] | {"study": "ranking"}, *scores])
    summary.main(["small"])
    assert "Spearman" not in capsys.readouterr().out  # there are no retrained networks yet
    truth = {"kind": "random", "budget": "50%", "macs": 5, "params": 5, "seed": 0}
    results("ranking", [{**truth, "network": n, "top1": n / 9} for n in range(9)])
    summary.main(["small"])
    output = capsys.readouterr().out.replace("-0.00", "+0.00")

    def half(freedom: int, remainder: float) -> str:
        return f"{_t_quantile(freedom) * 2 * math.sqrt(12 * remainder**2 / freedom) / math.sqrt(12):.2f}"

    of = half(12 - 7, 0.3)
    none = "+0.00 ± 0.00"
    assert f"| supernet.epochs | 10, 20 | +2.00 ± {of} | +2.00 ± {of} | {none} | {none} | {none} |" in output
    assert f"| supernet.distillation | False, True | -1.00 ± {of} | -1.00 ± {of} | {none} | {none} | {none} |" in output
    assert f"| supernet.width | 1.0, 1.5 | +0.00 ± {of} | +0.00 ± {of} | {none} | {none} | +2.00 ± 0.00 |" in output
    of = half(12 - 3, 0.1)
    assert f"| search.score | error, cross_entropy | +0.40 ± {of} | {none} |" in output
    assert f"| search.per_cost | False, True | -0.20 ± {of} | -4.00 ± 0.00 |" in output
    assert (tmp_path / "factors-small.png").stat().st_size > 5000
