"""Compares ``autoslim estimate`` with enumeration, the plans of the trainings and the authors' lists."""

import itertools
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from command_line import error_from, facts, printed, table
from paths import ROOT
from PIL import Image
from small_data import SPAN, prepared_digits, run_context, small_network
from small_project import change_params, finished_project, stage, start_project
from tiny import merged, tiny_params
from torch import nn

from autoslim import trace
from autoslim.channels.copying import on_meta
from autoslim.channels.graph import ChannelGraph
from autoslim.data.prepared import DataInfo
from autoslim.models.building import build_network
from autoslim.models.released import FAMILIES, released, released_lists
from autoslim.pipeline import assembly
from autoslim.pipeline import dry_run as dry_run_module
from autoslim.pipeline.dry_run import DryRun
from autoslim.pipeline.estimate import Sizes, Work, even_path, expected_macs, expected_search, plan, proxy_limits
from autoslim.pipeline.params import Params, check_params, load_params
from autoslim.resources.costs import Costs
from autoslim.training.averaging import AveragedWeights

IMAGENET = Sizes(train=1_281_167 - 50_000, search=50_000, test=50_000)


def preset(family: str) -> tuple[Params, ChannelGraph, dict[str, tuple[int, ...]]]:
    params = load_params(ROOT / f"presets/imagenet-{family}.yaml")
    graph = trace(on_meta(build_network(FAMILIES[family], {}, 1000)), torch.empty(1, 3, 224, 224))
    return params, graph, graph.grid(assembly.grid_spec(params.supernet))


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a project in which all stages have run, as the working directory. No test changes it."""
    folder = finished_project(tmp_path_factory.getbasetemp())
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(folder)
    return folder


# In closed form


def test_mean_macs_of_a_random_configuration_are_those_of_all_configurations() -> None:
    graph = small_network()[1]
    levels = {name: options[:2] + options[-1:] for name, options in graph.grid(SPAN).items()}
    every = [dict(zip(levels, choice, strict=True)) for choice in itertools.product(*levels.values())]
    assert len(every) == 3**5
    assert expected_macs(graph, levels) == pytest.approx(fmean(map(graph.macs, every)), rel=1e-12)


def test_mean_macs_of_a_layer_with_one_group_on_both_sides() -> None:
    """It is the mean of squares, not the square of the mean. A concatenation has both kinds of products."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again = (nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8))
            self.other, self.head = nn.Conv2d(3, 6, 1), nn.Linear(14, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.again(self.again(self.stem(images)))
            out: torch.Tensor = self.head(torch.cat([maps, self.other(images)], 1).mean((2, 3)))
            return out

    graph = trace(Twice(), torch.empty(1, 3, 4, 4))
    assert set(graph.groups) == {"stem", "other"}
    levels = {"stem": (8, 5, 1), "other": (6, 2)}
    stem, squares, other = fmean((8, 5, 1)), fmean((64, 25, 1)), fmean((6, 2))
    by_hand = 16 * 9 * (3 * stem + 2 * squares) + 16 * 3 * other + 4 * (stem + other)
    assert expected_macs(graph, levels) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("batch_size", [7, 32, 64, 160, 161, 1000])
def test_steps_equal_the_trainings_plan(tmp_path: Path, batch_size: int) -> None:
    """The 160 training images are divided by some batch sizes but not by others, and one is larger than the split."""
    data = prepared_digits(tmp_path / "prepared")
    sections = {name: {"batch_size": batch_size, "epochs": 3} for name in ("supernet", "retrain")}
    params = check_params(merged(tiny_params(sections), {"retrain": {"seeds": [0, 1, 5]}}), "test")
    _, graph = assembly.traced_network(params.model, data.info)
    counts = data.info.counts
    levels = graph.grid(assembly.grid_spec(params.supernet))
    works = plan(params, Costs(graph), levels, Sizes(counts["train"], counts["search"], 1))
    for name, seeds in (("supernet: training", 1), ("retrain uniform: training", 3), ("retrain autoslim: training", 3)):
        training = params.supernet if seeds == 1 else params.retrain
        recipe = assembly.recipe(training)
        images, _ = next(recipe.batches(data, 0, run_context())(0, 0))
        work = next(work for work in works if work.name == name)
        assert work.passes == seeds * recipe.plan(data, run_context()).steps
        assert work.images == len(images)


def test_the_mobilenet_v2_preset_by_hand() -> None:
    params, graph, levels = preset("mobilenet_v2")
    works = {work.name: work for work in plan(params, Costs(graph), levels, IMAGENET)}
    widest, narrowest = ({name: options[end] for name, options in levels.items()} for end in (0, -1))
    supernet = works["supernet: training"]
    assert (supernet.passes, supernet.images) == (50 * 1202, 1024)  # 1,231,167 // 1024, the last batch dropped
    assert supernet.macs == graph.macs(widest) + graph.macs(narrowest) + 2 * expected_macs(graph, levels)
    assert supernet.petamacs == pytest.approx(50 * 1202 * 1024 * supernet.macs / 1e15, rel=1e-12)
    validation = works["supernet: validation"]
    assert (validation.passes, validation.images, validation.at_once) == (51, 2048, 256)
    assert validation.macs == graph.macs(widest) + graph.macs(narrowest) + graph.macs()
    assert (works["search"].images, works["search"].at_once) == (2048, 256)
    assert graph.macs(narrowest) < works["search"].macs < graph.macs(widest)
    for method in ("uniform", "autoslim"):
        retrain, look, report = (
            works[n] for n in (f"retrain {method}: training", f"retrain {method}: validation", f"report {method}")
        )
        assert (retrain.passes, retrain.images) == (300 * 601, 2048)
        assert (look.passes, look.images) == (300, 50_000)
        assert (report.passes, report.images) == (1, 50_000)
        assert 0.99 * 305e6 < retrain.macs <= 305e6
        assert retrain.macs == look.macs == report.macs == graph.macs(retrain.configurations[0])
    assert len(works) == 9


def test_hours_are_linear_in_the_images() -> None:
    work = Work(
        "search", "search", passes=3600, images=2048, at_once=256, resident_images=0, macs=1.0, configurations=()
    )
    assert work.hours(seconds=0.5, images=256) == 4.0
    assert work.hours(seconds=0.5, images=2048) == 0.5


@pytest.mark.parametrize("family", ["mobilenet_v1", "mobilenet_v2", "mnasnet", "resnet50"])
def test_an_even_search_is_about_as_long_as_the_authors(family: str) -> None:
    """The steps from the widest to the authors' smallest budget are within 15 % of those of their lists."""
    _, graph, levels = preset(family)
    lists = [released(name).channels(graph) for name in released_lists() if released(name).family == family]
    smallest = min(lists, key=graph.macs)
    theirs = sum(levels[name].index(count) for name, count in smallest.items())
    ours = len(even_path(levels, graph.macs, graph.macs(smallest), 0)) - 1
    assert ours == pytest.approx(theirs, rel=0.15)


def test_an_even_search_slims_in_turn_and_counts_its_candidates() -> None:
    """Two groups have three and five levels. The configuration and all candidates of each step are counted."""
    graph = trace(nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)), torch.empty(1, 1, 2, 2))
    levels = dict(zip(graph.groups, [(8, 6, 4), (8, 7, 6, 5, 4)], strict=True))
    path = [tuple(channels.values()) for channels in even_path(levels, graph.macs, 0, 0)]
    assert path == [(8, 8), (6, 8), (6, 7), (6, 6), (4, 6), (4, 5), (4, 4)]
    scored, mean, typical = expected_search(graph, levels, graph.macs, 0, 0)
    tried = [(6, 8), (8, 7), (4, 8), (6, 7), (4, 7), (6, 6), (4, 6), (6, 5), (4, 5), (4, 4)]
    tried += path
    assert scored == len(tried)
    assert mean == fmean(4 * (a + a * b + 2 * b) for a, b in tried)
    assert tuple(typical.values()) in path
    several = [tuple(channels.values()) for channels in even_path(levels, graph.macs, 0, 0.3)]
    assert several == [(8, 8), (6, 7), (4, 6), (4, 5), (4, 4)]
    assert len(even_path(levels, graph.macs, 4 * (6 + 6 * 7 + 2 * 7), 0)) == 3  # at most the requested cost


@pytest.mark.parametrize(
    ("resource", "budget"), [("params", "60%"), ("memory", "70%"), ("macs", {"macs": "60%", "memory": "70%"})]
)
def test_other_resources_are_planned_as_they_are_searched(resource: str, budget: Any) -> None:
    params = check_params(tiny_params({"resource": resource, "budget": budget}), "test")
    graph = trace(build_network(params.model.name, params.model.kwargs, 10), torch.empty(1, 1, 8, 8))
    costs, levels = Costs(graph), graph.grid(assembly.grid_spec(params.supernet))
    works = {work.name: work for work in plan(params, costs, levels, Sizes(100, 64, 50))}
    (chosen,) = works["retrain uniform: training"].configurations
    for name, limit in proxy_limits(params, costs).items():
        assert costs.of(chosen, name) <= limit
    assert works["search"].passes > 10


def test_unknown_latency_is_replaced_by_macs() -> None:
    """A share becomes a share of MACs, and milliseconds all of the default's. With other limits, latency is ignored."""
    params = check_params(tiny_params({"resource": "latency", "budget": "60%"}), "test")
    graph = trace(build_network(params.model.name, params.model.kwargs, 10), torch.empty(1, 1, 8, 8))
    costs, levels = Costs(graph), graph.grid(assembly.grid_spec(params.supernet))

    def limits(budget: Any) -> dict[str, float]:
        return proxy_limits(check_params(tiny_params({"resource": "latency", "budget": budget}), "test"), costs)

    assert limits("60%") == {"macs": 0.6 * graph.macs()}
    assert limits("12ms") == {"macs": graph.macs()}
    assert limits({"latency": "12ms", "params": "1K"}) == {"params": 1000}
    macs = check_params(tiny_params({"budget": "60%"}), "test")
    sizes = Sizes(100, 64, 50)
    assert plan(params, costs, levels, sizes) == plan(macs, costs, levels, sizes)


# Memory


class Small(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.stem(images).relu().mean((2, 3)))
        return out


def small_dry_run(**changes: Any) -> tuple[DryRun, Work]:
    params = check_params(tiny_params(changes), "test")
    network = Small(10)
    graph = trace(network, torch.empty(1, 1, 8, 8))
    info = DataInfo("digits", tuple("0123456789"), 1, (8, 8), (), (), {}, storage="arrays")
    dry_run = DryRun(params, network, graph, graph.grid(SPAN), info, run_context())
    return dry_run, Work("retrain", "retrain", 1, 64, 64, 0, 1.0, (graph.default,))


@pytest.mark.parametrize("images", [5, 64])
def test_least_memory_by_hand(images: int) -> None:
    """It is three times the weights plus images, relu's output, the linear layer's input, log-probabilities, labels."""
    dry_run, work = small_dry_run()
    weights = 6 * 9 + 6 + 6 * 10 + 10
    each = 4 * (8 * 8 + 6 * 6 * 6 + 6 + 10) + 8
    least = dry_run.least_bytes(work, images)
    assert 0 <= least - 4 * 3 * weights - images * each <= 64  # the loss keeps a scalar or two


def test_too_little_memory_is_an_error_before_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    dry_run, work = small_dry_run()
    monkeypatch.setattr(dry_run_module, "device_bytes", lambda device: 50e3)
    with pytest.raises(dry_run_module.UserError, match=r"retrain with 64 images .* 7\d\.\dkB.* 50kB"):
        dry_run.measure(work, 64, 0)
    assert dry_run.measure(work, 16, 0).seconds > 0


@pytest.mark.parametrize("kind", ["supernet", "retrain"])
def test_dry_run_steps_do_not_change_the_weights(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a large learning rate on noise would produce values with other run times than in training."""
    dry_run, work = small_dry_run()
    stepped: list[bool] = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any) -> Any:
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        grown = any(p.grad is not None and bool(p.grad.any()) for group in self.param_groups for p in group["params"])
        result = original(self, *args)
        after = [p for group in self.param_groups for p in group["params"]]
        stepped.append(grown and all(map(torch.equal, before, after)))
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    dry_run.measure(Work(kind, kind, 1, 8, 8, 0, 1.0, work.configurations), 8, 0)
    assert stepped == [True, True]


def test_a_dry_run_does_what_a_step_with_everything_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step also runs the teacher, clips the gradient, and averages the weights."""
    calls: list[str] = []
    retrain = {"teacher": "default", "ema": 0.9, "optimiser": {"name": "adamw", "clip_norm": 0.1}}
    changes = {"model": {"weights": "trained.pt"}, "supernet": {"width": 1.0}, "retrain": retrain}
    dry_run, work = small_dry_run(**changes)

    def recorded(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    recorded(Small, "forward")
    recorded(nn.utils, "clip_grad_norm_")
    recorded(torch.optim.AdamW, "step")
    recorded(AveragedWeights, "update")
    dry_run.measure(work, 64, 0)
    steps = [calls[start:] for start, name in enumerate(calls) if name == "forward"]
    assert steps[-2][:5] == ["forward", "forward", "clip_grad_norm_", "step", "update"]


# The command


def test_table_of_a_project(project: Path) -> None:
    text = printed("estimate", "--seconds", "0")
    rows = {row["work"]: row for row in table(text, "work")}
    assert list(rows) == [
        "supernet: training",
        "supernet: validation",
        "search",
        "refinement",
        "retrain uniform: training",
        "retrain uniform: validation",
        "report uniform",
        "retrain autoslim: training",
        "retrain autoslim: validation",
        "report autoslim",
        "(total)",
    ]
    assert (rows["supernet: training"]["passes"], rows["supernet: training"]["images each"]) == ("1", "64")
    assert (rows["retrain uniform: training"]["passes"], rows["report uniform"]["images each"]) == ("2", "50")
    done = json.loads((project / "outputs/search/metrics.json").read_text())
    guessed = int(rows["search"]["passes"].removeprefix("~"))
    assert guessed == pytest.approx(done["evaluations"], rel=0.35)
    whole = rows.pop("(total)")  # without its empty cells
    for column, next_column in (("hours", "passes"), ("petaMACs", "images each")):
        parts = sum(float(row[column].removeprefix("~")) for row in rows.values())
        assert float(whole[next_column]) == pytest.approx(parts, rel=0.02)
    assert rows["supernet: training"]["memory"].startswith("> ")
    assert facts(text)["measured"] == "with full batches"


def test_estimate_as_json_has_the_numbers_of_the_table(project: Path) -> None:
    shown = json.loads(printed("estimate", "--seconds", "0", "--json"))
    rows = {row["work"]: row for row in table(printed("estimate", "--seconds", "0"), "work")}
    works = {work["work"]: work for work in shown["work"]}
    assert [*works, "(total)"] == list(rows)
    for name, work in works.items():
        assert f"{'~' if work['approximate'] else ''}{work['passes']:,}" == rows[name]["passes"]
        assert f"{work['images']:,}" == rows[name]["images each"]
        assert work["petamacs"] == pytest.approx(float(rows[name]["petaMACs"].removeprefix("~")), rel=0.01)
        assert work["hours"] == pytest.approx(work["passes"] * work["seconds"] / 3600)
        assert ("least_memory" in work) == (rows[name].get("memory", "") != "")
    for total in ("hours", "petamacs"):
        assert shown[total] == pytest.approx(sum(work[total] for work in shown["work"]))
    assert shown["images"] == {"train": 100, "search": 32, "test": 50}
    trajectory = json.loads((project / "outputs/search/trajectory.json").read_text())
    assert shown["costs"]["macs"] == trajectory["default"]["macs"]


def test_each_option_replaces_one_number_of_prepared_images(project: Path, tmp_path: Path) -> None:
    def images(*options: str) -> str:
        return facts(printed("estimate", *options, "--seconds", "0"))["images"]

    change_params(tmp_path, {"data": {"train_images": None}})
    assert images() == "1x8x8, 10 classes; 100 train, 32 search, 50 test"
    assert images("--test-images", "40") == "1x8x8, 10 classes; 100 train, 32 search, 40 test"
    assert images("--images", "1000", str(tmp_path / "params.yaml")) == (
        "1x8x8, 10 classes; 968 train, 32 search, 50 test"
    )


@pytest.mark.parametrize("data", [{"search_images": 40}, {"train_images": 60}, {"test_images": 20}])
def test_data_prepared_for_other_numbers_of_images_are_not_used(
    project: Path, tmp_path: Path, data: dict[str, int]
) -> None:
    change_params(tmp_path, {"data": data})
    assert "is not known; run `dvc repro prepare`" in error_from("estimate", str(tmp_path / "params.yaml"))
    assert "not prepared; run `dvc repro prepare`" in printed("check", str(tmp_path / "params.yaml"))


def test_smaller_batches_are_reported_and_scaled(project: Path) -> None:
    text = printed("estimate", "--seconds", "0", "--batch", "4")
    assert facts(text)["measured"] == "with batches of at most 4, scaled linearly"
    assert next(row for row in table(text, "work") if row["work"] == "supernet: training")["images each"] == "64"


def test_sizes_can_be_options_if_there_are_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start_project(tmp_path / "project", {"data": {"image_size": 8, "channels": 1, "train_images": None}})
    monkeypatch.chdir(folder)
    shown = error_from("estimate")
    assert shown.startswith("the number of images and classes of digits is not known; run `dvc repro prepare`")
    text = printed("estimate", "--images", "1000", "--classes", "10", "--seconds", "0")
    rows = {row["work"]: row for row in table(text, "work")}
    assert rows["supernet: training"]["passes"] == str((1000 - 32) // 64)
    assert not [name for name in rows if name.startswith("report")]  # the number of test images is not known
    assert facts(text)["images"] == "1x8x8, 10 classes; 968 train, 32 search"
    assert list(Path("data").glob("*")) == []

    text = printed("estimate", "--images", "40", "--classes", "10", "--seconds", "0")
    assert facts(text)["images"] == "1x8x8, 10 classes; 20 train, 20 search"  # at most half is held out
    message = error_from("estimate", "--images", "3", "--classes", "10")
    assert message == "--images 3 leaves fewer than 2 search images; raise --images"
    change_params(folder, {"data": {"channels": 1}})
    message = error_from("estimate", "--images", "1000", "--classes", "10")
    assert message.startswith("data.image_size is None and data.channels is 1")
    assert message.endswith("set both, or run `dvc repro prepare`")


def test_the_replacement_of_latency_is_reported(project: Path, tmp_path: Path) -> None:
    change_params(tmp_path, {"resource": "latency", "budget": "50%"})
    shown = facts(printed("estimate", str(tmp_path / "params.yaml"), "--seconds", "0"))["budget"]
    assert shown == "50% (latency is not known before `dvc repro resources`; a budget of 6.1K MACs is assumed instead)"
    change_params(tmp_path, {"budget": {"macs": "50%", "latency": "12ms"}})
    shown = facts(printed("estimate", str(tmp_path / "params.yaml"), "--seconds", "0"))["budget"]
    assert shown.endswith("(latency is not known before `dvc repro resources`; its limit is ignored here)")


def test_a_budget_out_of_reach_is_an_error(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((project / "params.yaml").read_text().replace("budget: 50%", "budget: 1G"))
    assert "budget 1G is above the widest subnet" in error_from("estimate", str(path))


def test_loading_is_measured_if_images_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "val"), ("a", "b"), range(40)):
        path = tmp_path / "images" / part / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (12, 10), np.uint8)).save(path)
    source = {"source": f"folder:{tmp_path / 'images'}", "image_size": 8, "storage": "files", "train_images": None}
    monkeypatch.chdir(start_project(tmp_path / "project", {"data": source | {"test_images": None}}))
    stage("prepare")
    shown = facts(printed("estimate", "--seconds", "0"))["loading"]
    rate = re.fullmatch(
        r"([\d.e+]+) images/s with 0 workers; training the supernet needs ([\d.e+]+) images/s; (.*)", shown
    )
    assert rate
    slow = float(rate[1]) < float(rate[2])
    assert rate[3].startswith("loading is the bottleneck" if slow else "loading is fast enough")
