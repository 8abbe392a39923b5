"""The comparison's numbers against closed forms; what the figures show, and that their bytes are reproducible."""

import ast
import csv
import dataclasses
import io
import itertools
import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from paths import ROOT
from rich.console import Console
from scipy import stats

from autoslim.data.structure import tensor_structure
from autoslim.errors import UserError
from autoslim.pipeline.report import _default_score, _warning
from autoslim.report import figures, resource_figures
from autoslim.report.figures import (
    band_over_seeds,
    candidate_increases,
    channels_figure,
    curves_figure,
    draw_candidates,
    draw_trajectory,
    last_by_seed,
    method_styles,
    read_curves,
    side_by_side,
    svg,
    trajectory_figure,
)
from autoslim.report.page import ChannelColumn, ChannelTable, Page, PageFigure, format_seconds, html_page
from autoslim.report.plots import retrained_csv, supernet_csv, trajectory_csv
from autoslim.report.resource_figures import prediction_figure, resources_figure
from autoslim.report.table import (
    Result,
    answer,
    compare,
    csv_table,
    describe_budgets,
    gain,
    markdown_table,
    metrics,
    terminal_table,
)
from autoslim.resources.budgets import parse_budgets
from autoslim.resources.latency.table import Check, LatencyTable, Target
from autoslim.resources.measure import MeasuredCosts
from autoslim.tasks.classification import CLASSIFICATION
from autoslim.tasks.measure import Measure


def result(method: str, macs: float, params: float, top1: dict[int, float], **more: Any) -> Result:
    return Result(method, {"macs": macs, "params": params, "memory": 4 * params + 100_000}, top1, **more)


AUTOSLIM = result("autoslim", 1_410_000, 170_000, {0: 0.921, 1: 0.934, 2: 0.928})
UNIFORM = result("uniform", 1_380_000, 148_000, {0: 0.894, 1: 0.902, 2: 0.886})
BUDGET = {"budgets": parse_budgets("25%", "macs"), "resource": "macs", "limits": {"macs": 1_420_000.0}}

TARGET = Target("a machine", "eager", "cpu", 1, 1, "fp32", False, "torch")
CHECK = Check((1.0, 2.2, 2.9, 4.1), (1.1, 2.0, 3.0, 4.0), 0.03, 0.09, 0.95)
TABLE = LatencyTable("a network", (3, 8, 8), {"stem": 8}, TARGET, {}, 1.0, 0.5, check=CHECK)


def timed(plain: Result, predicted: float | None, measured: float) -> Result:
    """Adds a predicted and a measured latency (ms), with quartiles 0.1 ms below and 0.3 ms above the median."""
    costs = plain.costs if predicted is None else {**plain.costs, "latency": predicted}
    measurement = MeasuredCosts(measured, measured - 0.1, measured + 0.3, 900_000)
    return dataclasses.replace(plain, costs=costs, measured=measurement)


TIMED = [timed(AUTOSLIM, 2.4, 2.5), timed(UNIFORM, 2.45, 2.3)]


def one_seed(plain: Result) -> Result:
    return dataclasses.replace(plain, top1={0: plain.top1[0]})


def test_gain_has_welchs_interval() -> None:
    """Compared with the textbook formula (Welch 1947), also if the seeds of one method do not differ."""
    for other in ({5: 0.7, 6: 0.95, 7: 0.8, 8: 0.81, 9: 0.9}, {0: 0.9, 1: 0.9}, UNIFORM.top1):
        baseline = result("uniform", 1, 1, other)
        n, m = len(AUTOSLIM.top1), len(other)
        a, b = AUTOSLIM.std**2 / n, baseline.std**2 / m  # variances of the two means
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
        half = stats.t.ppf(0.975, freedom) * math.sqrt(a + b)
        found, difference = gain(AUTOSLIM, baseline), AUTOSLIM.mean - baseline.mean
        assert found.top1 == pytest.approx(difference)
        assert found.interval == pytest.approx((difference - half, difference + half), rel=1e-9)


def test_gain_of_equal_spreads_in_closed_form():
    a = result("autoslim", 1, 1, {0: 0.8, 1: 0.9})
    b = result("uniform", 1, 1, {0: 0.6, 1: 0.7})
    # Both variances are 0.005: the standard error is sqrt(0.005 / 2 + 0.005 / 2) with 2 degrees of freedom: t = 4.3027
    half = 4.302653 * math.sqrt(0.005)
    assert gain(a, b).interval == pytest.approx((0.2 - half, 0.2 + half), rel=1e-6)


def test_std_is_the_sample_standard_deviation_and_none_for_one_seed():
    assert result("uniform", 1, 1, {0: 0.8, 1: 0.9}).std == pytest.approx(math.sqrt(0.005))
    assert one_seed(UNIFORM).std is None


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (one_seed(AUTOSLIM), one_seed(UNIFORM)),
        (AUTOSLIM, one_seed(UNIFORM)),
        (result("autoslim", 1, 1, {0: 0.9, 1: 0.9}), result("uniform", 1, 1, {0: 0.8, 1: 0.8})),
    ],
)
def test_no_interval_for_one_seed_or_equal_seeds(a, b):
    difference = gain(a, b)
    assert difference.interval is None
    assert difference.top1 == pytest.approx(a.mean - b.mean)


def test_a_released_list_has_a_gain_only_near_the_baselines_cost():
    near = result("released/mobilenet_v2-305M", 1_440_000, 1, UNIFORM.top1)
    far = result("released/mobilenet_v2-207M", 1_310_000, 1, UNIFORM.top1)
    comparison = compare([far, near, result("autoslim", 1_000_000, 1, UNIFORM.top1), UNIFORM], **BUDGET)
    assert set(comparison.gains) == {"released/mobilenet_v2-305M", "autoslim"}  # autoslim is for the same budget
    assert "within 5% of uniform's MACs" in markdown_table(comparison)


def test_the_caption_names_methods_that_are_larger_than_uniform() -> None:
    """The uniform network cannot always fill the budget, because its widths change in steps."""
    smaller = dataclasses.replace(UNIFORM, costs={**UNIFORM.costs, "macs": AUTOSLIM.costs["macs"] / 1.12})
    text = markdown_table(compare([AUTOSLIM, smaller], **BUDGET))
    assert "autoslim has 12% more MACs than uniform, whose widths change in large steps. Part of its gain" in text
    assert "Part of its gain" not in markdown_table(compare([AUTOSLIM, UNIFORM], **BUDGET))
    larger = {**UNIFORM.costs, "macs": 1.04 * UNIFORM.costs["macs"]}
    listed = dataclasses.replace(UNIFORM, method="released/mobilenet_v2-207M", costs=larger, top1={0: 0.5})
    text = markdown_table(compare([listed, UNIFORM], **BUDGET))
    assert "released/mobilenet_v2-207M has 4% more MACs than uniform." in text
    assert "Part of its gain" not in text


def test_the_search_split_decides_the_choice_and_not_the_test_split():
    lower = dataclasses.replace(AUTOSLIM, search_top1={0: 0.90, 1: 0.91, 2: 0.89})
    higher = dataclasses.replace(UNIFORM, search_top1={0: 0.92, 1: 0.88, 2: 0.93})
    far = dataclasses.replace(result("released/mobilenet_v2-505M", 9_310_000, 1, {3: 0.99}), search_top1={3: 0.99})
    comparison = compare([far, lower, higher], **BUDGET)
    assert comparison.choice == ("uniform", 2)  # the list of 505M exceeds the budget
    assert metrics(comparison)["choice"] == {"method": "uniform", "seed": 2}
    caption = markdown_table(comparison)
    assert "search split: released/mobilenet_v2-505M 99.00, autoslim 90.00, uniform 91.00." in caption
    assert "choice is uniform, seed 2." in caption
    assert compare([lower], **BUDGET).choice == ("autoslim", 1)
    assert compare([far, lower], **BUDGET).choice == ("autoslim", 1)
    assert compare([far, higher], **BUDGET).choice == ("uniform", 2)
    assert compare([far], **BUDGET).choice == ("released/mobilenet_v2-505M", 3)
    assert "fine-tuned" not in caption
    assert "fine-tuned from the supernet" in markdown_table(compare([lower, higher], **BUDGET, from_supernet=True))
    assert compare([AUTOSLIM, UNIFORM], **BUDGET).choice is None
    assert "choice" not in metrics(compare([AUTOSLIM, UNIFORM], **BUDGET))


def test_the_value_of_a_seed_is_that_of_its_last_epoch():
    curves = {"seed": [4, 4, 9, 9], "epoch": [1, 2, 1, 2], "search_top1": [0.5, 0.4, 0.1, 0.6]}
    assert last_by_seed(curves, "search_top1") == {4: 0.4, 9: 0.6}


def test_a_method_without_seeds_raises():
    with pytest.raises(UserError, match=r"uniform.*retrain\.seeds"):
        compare([AUTOSLIM, result("uniform", 1, 1, {})], **BUDGET)


def test_tables_print_percent_and_amounts_with_units():
    comparison = compare([AUTOSLIM, UNIFORM], **BUDGET)
    text = markdown_table(comparison)
    assert "Budget 25% = 1.42M MACs" in text
    assert "| method | MACs | parameters | memory | top-1 on test (%) | gain over uniform (points) |" in text
    assert "| autoslim | 1.41M | 170K | 780kB | 92.77 ± 0.65 | +3.37  [+1.69, +5.05] |" in text
    assert "| uniform | 1.38M | 148K | 692kB | 89.40 ± 0.80 |  |" in text
    assert "3 seeds" in text
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(terminal_table(comparison))
    printed = terminal.file.getvalue()
    for cell in ("parameters", "top-1", "on test (%)", "92.77 ± 0.65", "+3.37  [+1.69, +5.05]", "89.40 ± 0.80"):
        assert cell in printed  # 80 columns are enough


def test_table_of_one_seed_and_of_one_method():
    alone = markdown_table(compare([one_seed(AUTOSLIM)], **BUDGET))
    assert "| autoslim | 1.41M | 170K | 780kB | 92.10 |  |" in alone
    assert "one seed" in alone
    both = markdown_table(compare([one_seed(AUTOSLIM), one_seed(UNIFORM)], **BUDGET))
    assert "| 92.10 | +2.70 |" in both


def test_tables_show_latency_predicted_and_measured():
    comparison = compare(TIMED, **BUDGET)
    text = markdown_table(comparison)
    assert "| memory | latency predicted | latency measured | top-1" in text
    assert "| autoslim | 1.41M | 170K | 780kB | 2.4ms | 2.5ms ± 200us | 92.77" in text
    assert "Latency is the median ± half the interquartile range; the networks were measured in turns." in text
    assert "quartiles" not in text
    noisy = dataclasses.replace(TIMED[0], measured=MeasuredCosts(9.72, 5.5, 14.0, 900_000))
    text = markdown_table(compare([noisy, TIMED[1]], **BUDGET))
    assert "The measured latency varied: its quartiles are autoslim 5.5ms to 14ms." in text
    unpredicted = compare([timed(AUTOSLIM, None, 2.5), timed(UNIFORM, None, 2.3)], **BUDGET)
    assert "predicted" not in markdown_table(unpredicted)
    values = metrics(comparison)["autoslim"]
    assert (values["latency"], values["measured_latency"], values["measured_memory"]) == (2.4, 2.5, 900_000)
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert (rows[0]["latency"], rows[0]["measured_latency_low"], rows[0]["memory"]) == ("2.4", "2.4", "780000")
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(terminal_table(comparison))
    printed = terminal.file.getvalue()
    for cell in ("780kB", "2.5ms", "2.3ms", "92.77 ± 0.65", "+3.37  [+1.69, +5.05]"):
        assert cell in printed


def test_the_terminal_shows_the_main_measure_only() -> None:
    def with_other(plain: Result) -> Result:
        return dataclasses.replace(plain, others={"pixel_accuracy": dict.fromkeys(plain.top1, 0.5)})

    measures = Measure("mean_iou", "mean IoU"), Measure("pixel_accuracy", "pixel accuracy")
    comparison = compare([with_other(each) for each in TIMED], **BUDGET, measures=measures)
    assert "pixel accuracy on test (%)" in markdown_table(comparison)
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(terminal_table(comparison))
    printed = terminal.file.getvalue()
    assert "pixel accuracy" not in printed
    for cell in ("parameters", "2.5ms", "92.77 ± 0.65", "+3.37  [+1.69, +5.05]"):
        assert cell in printed  # 80 columns are enough


def test_csv_and_metrics_have_fractions_and_no_missing_values():
    comparison = compare([AUTOSLIM, UNIFORM], **BUDGET)
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert [row["method"] for row in rows] == ["autoslim", "uniform"]
    assert float(rows[0]["top1"]) == AUTOSLIM.mean
    assert float(rows[0]["gain_low"]) < float(rows[0]["gain"]) < float(rows[0]["gain_high"])
    assert rows[1]["gain"] == ""
    values = metrics(comparison)
    assert (values["budget"], values["budget_macs"]) == ("25%", 1_420_000)
    assert values["uniform"] == {**UNIFORM.costs, "top1": UNIFORM.mean, "top1_std": UNIFORM.std}
    assert set(values["gain"]) == {"autoslim"}
    single = metrics(compare([one_seed(AUTOSLIM)], **BUDGET))
    assert "top1_std" not in single["autoslim"]
    assert single["gain"] == {}


def test_budgets_are_described_with_their_values_if_these_differ():
    def description(budget: Any, resource: str, **limits: float) -> str:
        return describe_budgets(parse_budgets(budget, resource), limits)

    assert description("305M", "macs", macs=305e6) == "305M MACs"
    assert description("0.5G", "macs", macs=5e8) == "0.5G = 500M MACs"
    assert description("50%", "params", params=1.75e6) == "50% = 1.75M parameters"
    several = {"macs": "305M", "memory": "50%", "latency": "12ms"}
    assert description(several, "macs", macs=305e6, memory=7e6, latency=12.0) == "305M MACs, 50% = 7MB, 12ms"


def test_curves_are_read_and_averaged_over_seeds(tmp_path: Path):
    (tmp_path / "curves.csv").write_text("seed,epoch,search_top1\n0,1,0.5\n0,2,\n1,1,0.7\n1,2,0.9\n0,3,\n1,3,\n")
    columns = read_curves(tmp_path / "curves.csv")
    assert columns["seed"] == [0, 0, 1, 1, 0, 1]
    band = band_over_seeds(columns, "search_top1")
    assert band.epochs == [1, 2]
    assert band.mean == pytest.approx([0.6, 0.9])
    assert (band.low, band.high) == ([0.5, 0.9], [0.7, 0.9])


GROUPS = {"stem": 32, "body.1": 64, "body.2": 128, "head": 256}
TRAJECTORY = {
    "resource": "macs",
    "default": {"channels": GROUPS, "macs": 5_680_000, "params": 500_000},
    "steps": [
        {"step": n, "macs": 12_000_000 - 1_000_000 * n, "params": 900_000 - 70_000 * n, "error": 0.1 + 0.02 * n}
        for n in range(11)
    ],
}
SUPERNET = {"epoch": [1, 2, 3], **{f"{w}_top1": [0.2, 0.5, 0.6] for w in ("widest", "default", "narrowest")}}


def retrained(seeds: int) -> dict[str, list[float]]:
    return {
        "seed": [float(seed) for seed in range(seeds) for _ in range(3)],
        "epoch": [1.0, 2.0, 3.0] * seeds,
        "search_top1": [0.1 * epoch + 0.01 * seed for seed in range(seeds) for epoch in range(3)],
    }


def draw_all(folder: Path, results: list[Result], dpi: int = 60) -> list[Path]:
    methods = [result.method for result in results]
    budgets = {"25% = 1.42M MACs": 1_420_000.0}
    halves = {name: size // 2 for name, size in GROUPS.items()}
    return [
        trajectory_figure(folder / "trajectory.png", TRAJECTORY, results, "macs", budgets, dpi),
        channels_figure(folder / "channels.png", GROUPS, dict.fromkeys(methods, halves), dpi),
        curves_figure(folder / "curves.png", SUPERNET, {r.method: retrained(len(r.top1)) for r in results}, dpi),
        resources_figure(folder / "resources.png", [timed(r, 2.0, 2.2) for r in results], TABLE, TARGET, dpi),
        prediction_figure(folder / "prediction.png", TABLE, [timed(r, 2.0, 2.2) for r in results], dpi),
    ]


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_figures_have_the_same_bytes_whatever_the_users_style(tmp_path: Path):
    first = draw_all(tmp_path / "a", [AUTOSLIM, UNIFORM])
    with matplotlib.rc_context({"axes.facecolor": "yellow", "font.size": 20, "lines.linewidth": 9}):
        second = draw_all(tmp_path / "b", [AUTOSLIM, UNIFORM])
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert b"Software" not in first[0].read_bytes()
    other = draw_all(tmp_path / "c", [AUTOSLIM, result("uniform", 1_380_000, 148_000, {0: 0.7, 1: 0.72, 2: 0.71})])
    assert first[0].read_bytes() != other[0].read_bytes()


@pytest.mark.parametrize(
    "results", [[one_seed(AUTOSLIM)], [UNIFORM], [one_seed(AUTOSLIM), one_seed(UNIFORM)]], ids=["a", "u", "one-seed"]
)
def test_figures_of_one_seed_and_of_one_method(tmp_path: Path, results: list[Result]):
    for figure in draw_all(tmp_path, results):
        width, height = size_of(figure)
        assert width > 250
        assert height > 100


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Returns the list of figures that would be written."""
    collected: list[Figure] = []

    def collect(path, draw, dpi):
        collected.append(draw())
        return path

    for module in (figures, resource_figures):
        monkeypatch.setattr(module, "write_figure", collect)
    return collected


def test_the_trajectory_shows_budgets_default_and_retrained_networks() -> None:
    budgets = {"25% = 1.42M MACs": 1_420_000.0, "26% = 1.48M MACs": 1_476_800.0}
    figure = draw_trajectory(TRAJECTORY, [AUTOSLIM, UNIFORM], "macs", budgets)
    retrained, subnets = figure.axes
    names = {text.get_text(): text for text in retrained.texts}
    assert set(names) == {"budget 25% = 1.42M MACs", "budget 26% = 1.48M MACs", "default 5.68M MACs"}
    assert [text.xy[0] for text in names.values()] == [1_420_000.0, 1_476_800.0, 5_680_000]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in names.values()]
    boxes.append(retrained._left_title.get_window_extent())
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))  # labels that are close are stacked
    line = subnets.lines[0]
    assert list(line.get_xdata()) == [step["macs"] for step in TRAJECTORY["steps"]]
    assert line.get_ydata()[0] == pytest.approx(90)
    assert retrained._left_title.get_text() == "retrained networks, test split, mean ± std over 3 seeds"
    points = {c.get_label(): c.lines[0] for c in retrained.containers}
    point = points["autoslim: 92.77 ± 0.65"]
    assert list(point.get_xydata()[0]) == pytest.approx([1_410_000, 92.7667])
    assert all(point.get_markerfacecolor() == "none" for point in points.values())
    low, high = retrained.get_ylim()
    assert low < 89.4 - 0.8
    assert high > 92.77 + 0.66  # with the error bars


def test_networks_of_the_same_cost_are_drawn_side_by_side() -> None:
    """Their markers, which would cover each other, do not overlap on the canvas."""
    same = dataclasses.replace(AUTOSLIM, top1=UNIFORM.top1, costs=UNIFORM.costs)
    figure = draw_trajectory(TRAJECTORY, [same, UNIFORM, DEFAULT], "macs", {})
    figure.draw_without_rendering()
    lines = [container.lines[0] for container in figure.axes[0].containers]
    x = [float(line.get_transform().transform(line.get_xydata())[0, 0]) for line in lines]
    assert x[1] - x[0] > lines[0].get_markersize() * figure.dpi / 72
    assert x[2] == pytest.approx(figure.axes[0].transData.transform((5_680_000, 0))[0])
    assert side_by_side([5.0, 1.0, 5.1, 9.0, 5.2], 0.15) == [-2, 0, -1, 0, 0]
    assert side_by_side([], 1) == []


def test_the_default_networks_point_in_the_supernet() -> None:
    _, subnets = draw_trajectory(TRAJECTORY, [UNIFORM], "macs", {}, default_score=0.88).axes
    assert subnets.lines[1].get_xydata().tolist() == [[5_680_000, 88]]
    curves = {"epoch": [1, 2], "default_top1": [0.5, 0.88]}
    wide, narrow = (TRAJECTORY | {"widest": {"channels": dict.fromkeys(GROUPS, size)}} for size in (256, 128))
    assert _default_score(wide, curves, CLASSIFICATION) == 0.88
    assert _default_score(narrow, curves, CLASSIFICATION) is None  # the supernet does not contain it


def test_a_trajectory_is_drawn_over_any_recorded_resource() -> None:
    axes, subnets = draw_trajectory(TRAJECTORY, [UNIFORM], "params", {"150K parameters": 150_000.0}).axes
    assert subnets.get_xlabel() == "parameters"
    assert [text.get_text() for text in axes.texts] == ["budget 150K parameters", "default 500K parameters"]
    assert axes.containers[0].lines[0].get_xdata()[0] == 148_000


def test_measured_and_predicted_resources_are_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shown = drawn(monkeypatch)
    resources_figure(tmp_path / "r.png", TIMED, TABLE, TARGET)
    latency, memory, scatter = shown[0].axes
    assert [bar.get_width() for bar in latency.patches] == [2.5, 2.3]
    assert [text.get_text() for text in latency.texts] == ["2.5ms, predicted 2.4ms", "2.3ms, predicted 2.45ms"]
    assert [text.get_text() for text in memory.texts] == ["900kB, predicted 780kB", "900kB, predicted 692kB"]
    assert [label.get_text() for label in latency.get_yticklabels()] == ["autoslim", "uniform"]
    points = [line.get_xydata().tolist() for line in scatter.lines]
    assert points[1] == [list(pair) for pair in zip(CHECK.measured, CHECK.predicted, strict=True)]
    assert points[2:] == [[[2.5, 2.4]], [[2.3, 2.45]]]
    assert scatter.get_title() == "median error 3.0%, rank correlation 0.950"
    shown[0].draw_without_rendering()
    for axes, right in ((latency, memory), (memory, scatter)):
        edge = right.get_tightbbox().x0
        assert all(text.get_window_extent().x1 < edge for text in axes.texts)  # labels do not reach the next panel


def test_the_legend_states_that_predictions_are_for_another_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shown = drawn(monkeypatch)
    resources_figure(tmp_path / "r.png", TIMED, TABLE, dataclasses.replace(TARGET, machine="another", batch=8))
    latency, _, scatter = shown[0].axes
    assert latency.get_title() == "latency of a forward pass, 8 images"
    assert len(scatter.lines) == 2  # the diagonal and the random networks, no method
    (legend,) = shown[0].legends
    assert legend.get_texts()[-1].get_text() == "predicted (latency on another target)"


def test_resources_without_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shown = drawn(monkeypatch)
    resources_figure(tmp_path / "r.png", [timed(UNIFORM, None, 2.3)], None, TARGET)
    resources_figure(tmp_path / "r.png", [UNIFORM], None, TARGET)
    assert [text.get_text() for axes in shown[0].axes for text in axes.texts] == ["2.3ms", "900kB, predicted 692kB"]
    assert [text.get_text() for axes in shown[1].axes for text in axes.texts] == ["", "predicted 692kB"]


@pytest.mark.parametrize("count", [14, 54])
def test_group_names_do_not_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int):
    shown = drawn(monkeypatch)
    default = {f"stages.{n}.blocks.0.conv": 8 * (n + 1) for n in range(count)}
    configurations = {
        "autoslim": dict.fromkeys(default, 8),
        "uniform": {name: size // 2 for name, size in default.items()},
    }
    channels_figure(tmp_path / "c.png", default, configurations)
    shown[0].draw_without_rendering()
    bars, shares = shown[0].axes
    labels = bars.get_yticklabels()
    assert [label.get_text() for label in labels] == list(default)  # in the network's order
    boxes = [label.get_window_extent() for label in labels]
    assert all(above.y0 > below.y1 for above, below in itertools.pairwise(boxes))
    assert list(shares.lines[1].get_xdata()) == pytest.approx([50.0] * count)
    numbers = [text.get_text() for text in shares.texts]
    assert numbers[:count] == [str(size) for size in default.values()]


def test_the_style_of_a_method_does_not_depend_on_the_other_methods():
    assert method_styles(["uniform"])["uniform"] == method_styles(["autoslim", "uniform", "other"])["uniform"]
    many = method_styles(["autoslim", "uniform", "a", "b", "c", "d"])
    assert len(set(many.values())) == 6


def test_the_caption_names_methods_whose_measured_latency_exceeds_the_budget():
    budget = {"budgets": parse_budgets("2.45ms", "latency"), "resource": "latency", "limits": {"latency": 2.45}}
    text = markdown_table(compare(TIMED, **budget))  # measured 2.5 and 2.3, quartiles from 0.1 below
    assert "exceeds" not in text
    slower = dataclasses.replace(TIMED[0], measured=MeasuredCosts(5.2, 5.0, 5.4, 900_000))
    text = markdown_table(compare([slower, TIMED[1]], **budget))
    assert "measured latency of autoslim exceeds the budget of 2.45ms" in text
    text = markdown_table(compare([slower, TIMED[1]], **budget, predicted_on="a phone"))
    assert "exceeds" not in text
    assert "a phone" in text


DEFAULT = result("default", 5_680_000, 500_000, {0: 0.950, 1: 0.958, 2: 0.953}, search_top1={0: 0.99}, start="supernet")
KEPT = dataclasses.replace(DEFAULT, top1={0: 0.95}, start="trained")


def test_differences_from_the_default_network() -> None:
    comparison = compare([DEFAULT, AUTOSLIM, UNIFORM], **BUDGET, from_supernet=True)
    assert set(comparison.gains) == {"autoslim"}  # the default network has another budget
    assert comparison.choice is None  # and is never chosen
    assert comparison.differences == {"autoslim": gain(AUTOSLIM, DEFAULT), "uniform": gain(UNIFORM, DEFAULT)}
    text = markdown_table(comparison)
    assert "| top-1 on test (%) | difference from default (points) | gain over uniform (points) |" in text
    assert "| default | 5.68M | 500K | 2.1MB | 95.37 ± 0.40 |  |  |" in text
    assert "| uniform | 1.38M | 148K | 692kB | 89.40 ± 0.80 | -5.97  [-7.63, -4.31] |  |" in text
    assert "interval of the gain and of the difference over seeds (Welch). All networks were fine-tuned" in text
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(csv_table(comparison)))}
    low, high = gain(UNIFORM, DEFAULT).interval
    difference = metrics(comparison)["difference"]["uniform"]
    assert difference == {"top1": UNIFORM.mean - DEFAULT.mean, "top1_low": low, "top1_high": high}
    assert [float(rows["uniform"][f"difference{end}"]) for end in ("", "_low", "_high")] == [*difference.values()]
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(terminal_table(comparison))
    printed = " ".join(terminal.file.getvalue().split())
    assert "+3.37 [+1.69, +5.05]" in printed  # there is room for one column of differences
    assert "Difference from default in points: autoslim -2.60 [-3.93, -1.27], uniform -5.97 [-7.63, -4.31]." in printed
    scratch = compare([dataclasses.replace(DEFAULT, start="scratch"), UNIFORM], **BUDGET, from_supernet=True)
    assert "All other networks were fine-tuned" in markdown_table(scratch)
    assert "default was trained from scratch, because the supernet has fewer channels." in markdown_table(scratch)


def test_a_default_network_that_was_not_retrained_is_a_constant() -> None:
    """The interval is that of the other method's mean: Student's, in closed form. It has no spread over seeds."""
    comparison = compare([KEPT, AUTOSLIM, UNIFORM], **BUDGET, from_supernet=True)
    half = stats.t.ppf(0.975, 2) * UNIFORM.std / math.sqrt(3)
    centre = UNIFORM.mean - 0.95
    assert comparison.differences["uniform"].interval == pytest.approx((centre - half, centre + half), rel=1e-9)
    text = markdown_table(comparison)
    assert "| default | 5.68M | 500K | 2.1MB | 95.00 |  |  |" in text
    assert "Mean ± standard deviation over 3 seeds." in text
    assert "of the gain and of the difference over seeds (Welch, Student)." in text
    assert "default is the network of model.weights as it is, without retraining. All other networks were fine" in text
    alone = markdown_table(compare([KEPT], **BUDGET, from_supernet=True))
    assert "seed" not in alone
    assert "fine-tuned" not in alone
    budget = {"budgets": parse_budgets("2.45ms", "latency"), "resource": "latency", "limits": {"latency": 2.45}}
    assert "exceeds" not in markdown_table(compare([timed(KEPT, 9.0, 9.0)], **budget))


def test_the_answer_in_words() -> None:
    """It names gain and loss with their intervals, and says so if nothing was found."""
    text = answer(compare([DEFAULT, AUTOSLIM, UNIFORM], **BUDGET))
    assert text == (
        "The network of autoslim has a top-1 of 92.77 % on the test split. It is 3.37 points better than uniform (95 % "
        "confidence interval +1.69 to +5.05 points). It is 2.60 points worse than default (95 % confidence interval "
        "-3.93 to -1.27 points)."
    )
    nothing = dataclasses.replace(AUTOSLIM, top1={0: 0.893, 1: 0.904, 2: 0.887})
    text = answer(compare([nothing, UNIFORM], **BUDGET))
    assert "No difference from uniform was found: +0.07 points, 95 % confidence interval -1.8" in text
    text = answer(compare([one_seed(AUTOSLIM), one_seed(UNIFORM)], **BUDGET))
    assert text.endswith("It is 2.70 points better than uniform; without an interval, this may be chance.")
    assert "There is no comparison with uniform, which is not among the methods." in answer(
        compare([AUTOSLIM], **BUDGET)
    )
    assert answer(compare([UNIFORM], **BUDGET)) == "There is no answer: the methods are uniform."
    years = Measure("mae", "MAE", "years", higher_is_better=False)
    older = compare([AUTOSLIM, UNIFORM], **BUDGET, measures=(years,))
    assert "has a MAE of 0.9277 years on the test split. It is 0.03367 years worse than uniform" in answer(older)


def searched(per_cost: bool, score: str = "cross_entropy") -> dict[str, Any]:
    """A trajectory of two steps, in which some groups are no candidates, and the last configuration."""

    def option(saved: float, error: float, loss: float) -> dict[str, Any]:
        return {"saved": saved, "increase": {"error": error, "cross_entropy": loss}}

    options: list[dict[str, Any]] = [
        {"stem": option(56_800, 0.01, 0.1), "head": option(113_600, 0.02, -0.1)},
        {"body.1": option(568_000, 0.03, 0.5)},
        {},
    ]
    steps = [
        {**step, "options": candidates, "taken": list(candidates)[:1]}
        for step, candidates in zip(TRAJECTORY["steps"], options, strict=False)
    ]
    return TRAJECTORY | {"limits": {}, "per_cost": per_cost, "score": score, "steps": steps}


def test_the_candidates_scores_are_those_that_the_search_ranked() -> None:
    nan = math.nan
    expected = [[0.1, nan], [nan, 0.05], [nan, nan], [-0.05, nan]]  # 5.68M MACs: 1 % is 56,800
    np.testing.assert_allclose(candidate_increases(searched(per_cost=True)), expected)
    expected = [[1, nan], [nan, 3], [nan, nan], [2, nan]]  # points
    np.testing.assert_allclose(candidate_increases(searched(per_cost=False, score="error")), expected)
    trajectory = searched(per_cost=True)
    axes = draw_candidates(trajectory, candidate_increases(trajectory)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(GROUPS)
    assert axes.collections[0].get_offsets().tolist() == [[0, 0], [1, 1]]  # (step, group) of those that were taken
    for step in trajectory["steps"]:
        for option in step["options"].values():
            del option["increase"]  # as an earlier version wrote it
    assert candidate_increases(trajectory) is None


def test_curves_as_data_have_the_same_columns_for_every_task() -> None:
    years = Measure("mae", "MAE", "years", higher_is_better=False)
    curves = {"epoch": [1.0, 2.0], **{f"{w}_mae": [4.0, 3.5] for w in ("widest", "default", "narrowest")}}
    assert supernet_csv(curves, years) == "epoch,widest,default,narrowest\n1,4.0,4.0,4.0\n2,3.5,3.5,3.5\n"
    means = {"default": {0.0: 0.9}, "released/a-1.4x": {1.0: 0.5, 2.0: 0.755}}
    text = retrained_csv(means, Measure("top1", "top-1"))
    assert text == "epoch,default,released/a-1.4x\n1,90.0,50.0\n2,90.0,75.5\n"
    assert retrained_csv({"default": {0.0: 0.9}}, Measure("top1", "top-1")) == "epoch,default\n0,90.0\n"
    assert trajectory_csv(TRAJECTORY, "macs").splitlines()[:2] == ["step,cost,score", "0,12000000,90.0"]


HOSTILE = '<script>alert("1")</script> & {{ 1 }} \'"--></svg>'


def page(name: str = HOSTILE) -> Page:
    groups = {name: 8, "b": 4}
    trajectory = searched(per_cost=True)
    trajectory["default"] = trajectory["default"] | {"channels": {name: 1, **GROUPS}}
    figure = svg("candidates", lambda: draw_candidates(trajectory, candidate_increases(trajectory)))
    columns = [ChannelColumn("default", groups), ChannelColumn(name, {name: 2, "b": 4}, "#D55E00")]
    return Page(
        title=name,
        question=name,
        answer=name,
        warning=name,
        header=["method", name],
        rows=[["autoslim", name]],
        caption=name,
        figures=[PageFigure(name, figure, name)],
        channels=ChannelTable(columns),
        times=[(name, "1 s")],
        command=name,
        versions=name,
        parameters=name,
    )


class Elements(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_escapes_what_users_name() -> None:
    text = html_page(page())
    found = Elements(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {*found.tags} - {"img"}
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action"):
            assert value is not None
            assert value.startswith(("#", "data:image/png;base64,"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert found.text.count(HOSTILE) >= 12  # each place, among them the name of a group in the figure
    assert "autoslim" in found.text
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len({*ids})
    assert "prefers-color-scheme: dark" in style
    assert ("name", "viewport") in found.attributes


def test_a_figure_of_the_page_follows_its_colour_scheme() -> None:
    text = svg("t", lambda: draw_trajectory(TRAJECTORY, [DEFAULT, UNIFORM], "macs", {}, 0.9))
    assert text.startswith('<svg viewBox="')
    assert text.endswith("</svg>")
    for variable in ("ink", "line", "grid", "edge"):
        assert f"var(--{variable})" in text
    for colour in ("#000000", "#333333", "#666666", "#ffffff"):  # invisible on a dark or on a light page
        assert not re.search(rf': {colour}[;"]', text, re.I)
    assert re.search(r': #0072b2[;"]', text, re.I)  # that of uniform
    assert text == svg("t", lambda: draw_trajectory(TRAJECTORY, [DEFAULT, UNIFORM], "macs", {}, 0.9))


def test_durations() -> None:
    seconds = (0.44, 9.94, 42.4, 59.6, 185, 3599.6, 7530)
    expected = "0.4 s, 9.9 s, 42 s, 1 min 00 s, 3 min 05 s, 1 h 00 min, 2 h 06 min"
    assert ", ".join(map(format_seconds, seconds)) == expected


def test_a_warning_is_above_the_table() -> None:
    assert markdown_table(compare([UNIFORM], **BUDGET, warning="noise")).startswith("**Warning:** noise\n\nBudget 25%")


def test_the_trained_network_is_compared_with_chance_by_the_score_of_the_task() -> None:
    """The score is not always the main measure, in which this network is as good as a guess."""
    kept = result("default", 1.0, 1.0, {0: 0.5}, search_top1={0: 0.5}, start="trained")
    data = SimpleNamespace(
        info=SimpleNamespace(counts={"search": 100}, targets=tensor_structure(dtype="int64")),
        labels=lambda _: np.arange(100) % 2,
    )

    def warning(top1: float) -> str:
        curves = {"default": {"seed": [0.0], "epoch": [0.0], "search_map": [0.5], "search_top1": [top1]}}
        return _warning({"steps": []}, [kept], curves, data, CLASSIFICATION)  # type: ignore[arg-type]

    assert warning(0.9) == ""
    assert warning(0.5).startswith("the network of model.weights has a top-1 of 50.0% on the search split, not above")


def test_figures_of_a_network_that_was_not_retrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = drawn(monkeypatch)
    retrained_axes, _ = draw_trajectory(TRAJECTORY, [KEPT, UNIFORM], "macs", {}).axes
    channels_figure(tmp_path / "c.png", GROUPS, {})
    once = {"seed": [0.0], "epoch": [0.0], "search_top1": [0.9]}
    curves_figure(tmp_path / "r.png", SUPERNET, {"default": once, "uniform": retrained(2)})
    (point,) = (c for c in retrained_axes.containers if c.get_label() == "default, as it is: 95.00")
    assert point.lines[0].get_xydata()[0].tolist() == pytest.approx([5_680_000, 95])
    default, uniform = shown[1].axes[1].lines
    assert (default.get_marker(), uniform.get_marker()) == (method_styles(["default"])["default"][1], "")


def test_only_what_draws_imports_matplotlib() -> None:
    """The modules that draw import matplotlib, so only the stage and functions of commands import these."""
    drawing = {f"autoslim.report.{name}" for name in ("figures", "resource_figures", "experiments_figure")}
    importers = set()
    for file in sorted((ROOT / "autoslim").rglob("*.py")):
        for node in ast.parse(file.read_text()).body:  # imports inside functions do not count
            if isinstance(node, ast.ImportFrom) and (node.module in drawing or node.module.startswith("matplotlib")):
                importers.add(".".join(file.relative_to(ROOT).with_suffix("").parts))
    assert importers <= {*drawing, "autoslim.pipeline.report"}
