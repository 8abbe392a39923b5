"""The study of Channel-Bench-Macro: its networks against the benchmark's numbers, a small study, its summary."""

import contextlib
import itertools
import json
import math
from pathlib import Path
from statistics import stdev

import macro
import macro_networks
import pandas as pd
import pytest
import studies
import summary
from independent_counts import counted
from paths import ROOT
from ruamel.yaml import YAML
from small_project import stage
from studies import StageCache, changed, load_yaml

from autoslim import resize
from autoslim.pipeline.assembly import grid_spec
from autoslim.pipeline.params import check_params
from autoslim.resources.budgets import parse_budget

STUDY = load_yaml(ROOT / "evidence/studies.yaml")["macro"]
PUBLISHED = {  # (space, network): multiply-adds and parameters in the benchmark's files
    ("mobilenet", "2413421"): (83_122_688, 802_122),
    ("mobilenet", "4321432"): (122_364_928, 1_081_738),
    ("resnet", "1234123"): (245_810_432, 2_735_050),
}


@pytest.fixture(params=macro.FILES)
def space(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("named", PUBLISHED)
def test_the_networks_are_those_of_the_benchmark(named: tuple[str, str]) -> None:
    """There is no difference of convention: bias and batch norm count as parameters, and not as multiply-adds."""
    space, name = named
    graph = macro.benchmark_graph(space)
    channels = macro.quarters(graph, name)
    assert (graph.macs(channels), graph.params(channels)) == PUBLISHED[named]
    network = resize(getattr(macro_networks, space)(), graph, channels)
    built = counted(network, (3, macro.SIZE, macro.SIZE)), sum(each.numel() for each in network.parameters())
    assert built == PUBLISHED[named]


def test_the_groups_are_in_the_order_of_the_benchmark(space: str) -> None:
    graph = macro.benchmark_graph(space)
    assert tuple(graph.default.values()) == getattr(macro_networks, space.upper())
    assert list(graph.groups) == sorted(graph.groups)  # from the input to the output
    names = list(macro.configurations(graph))
    assert len(set(names)) == 4**7
    assert all(macro.network_name(graph, macro.quarters(graph, name)) == name for name in names[::97])
    with pytest.raises(ValueError, match="are not quarters of"):
        macro.network_name(graph, graph.default | {"features.0.0": 33})


def test_the_study_has_valid_parameters(space: str) -> None:
    """The search, and uniform widths, have only networks of the benchmark; the first two budgets are uniform's."""
    params = load_yaml(ROOT / f"evidence/macro_{space}.yaml")
    for search in STUDY["searches"].values():
        check_params(changed(params, {**STUDY["changes"], **search}), space)
    assert STUDY["scored_as"] in STUDY["searches"]
    checked, graph = check_params(params, space), macro.supernet_graph(params)
    assert list(graph.groups) == list(macro.benchmark_graph(space).groups)
    grid = graph.grid(grid_spec(checked.supernet))
    quarter = {name: full // 4 for name, full in graph.default.items()}
    assert dict(grid) == {name: tuple(n * each for n in (4, 3, 2, 1)) for name, each in quarter.items()}
    assert {name: limits.multiple for name, limits in checked.supernet.grid.groups.items()} == quarter
    for digit, budget in zip("23", STUDY["budgets"][space], strict=False):
        limit = parse_budget(budget).absolute(graph.macs())
        uniform = macro.quarters(graph, 7 * digit)
        assert 0.99 < graph.macs(uniform) / limit <= 1


def test_networks_are_sampled_around_a_share_and_fill_a_budget() -> None:
    """Compared with the definitions, on a space of three groups whose multiply-adds are a product."""
    amounts = {a + b + c: int(a) * int(b) * int(c) for a, b, c in itertools.product("1234", repeat=3)}
    near = {network for network, macs in amounts.items() if 0.45 * 64 <= macs <= 0.55 * 64}
    drawn = macro.sampled(amounts, 0.5, 0.05, len(near) - 1)
    assert set(drawn) < near
    assert len(set(drawn)) == len(near) - 1
    assert drawn == macro.sampled(amounts, 0.5, 0.05, len(near) - 1)
    assert set(macro.sampled(amounts, 0.5, 0.05, 500)) == near
    maximal = {
        network
        for network, macs in amounts.items()
        if macs <= 30
        and not any(
            more <= 30 and other != network and all(map(lambda x, y: x >= y, other, network))
            for other, more in amounts.items()
        )
    }
    assert set(macro.filling(amounts, 30)) == maximal


def test_a_changed_file_with_networks_changes_the_runs(tmp_path: Path) -> None:
    params, file = load_yaml(ROOT / "evidence/macro_resnet.yaml"), tmp_path / "networks.py"
    cache = StageCache(tmp_path, {macro.NETWORKS: file})
    file.write_text("1")
    before = {name: cache.key(name, params) for name in ("prepare", "supernet", "search", "allocate")}
    file.write_text("2")
    same = {name for name, key in before.items() if cache.key(name, params) == key}
    assert same == {"prepare"}


def test_a_small_study_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the stages in this process. The rows do not change when it runs again, and nothing is run twice."""
    ran: list[str] = []

    def run(command: list[str], folder: Path) -> tuple[int, float]:
        name = Path(command[1]).stem
        ran.append(name)
        with contextlib.chdir(folder):
            stage(name, *command[2:])
        return 0, 1.0

    monkeypatch.setattr(studies, "_run", run)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    data = {"data.source": "digits", "data.image_size": 8, "data.train_images": 64, "data.search_images": 32}
    small = {"data.test_images": 32, "supernet.epochs": 1, "search.images": 32, "search.chunk": 16, "search.stop": 0.5}
    study = STUDY | {
        "changes": data | small | {"supernet.precision": "fp32", "search.precision": "fp32", "runtime.workers": 0},
        "supernets": [0],
        "shares": [0.5],
        "networks": 2,
        "budgets": {"mobilenet": ["60%"]},
        "searches": {"growing back": STUDY["searches"]["growing back"]},
        "sampling": ["random"],
    }
    file, rows = tmp_path / "study.yaml", tmp_path / "macro-mobilenet.csv"
    with file.open("w") as opened:
        YAML(typ="safe").dump({"macro": study}, opened)
    macro.macro("mobilenet", 1, tmp_path / "kept", None, file, tmp_path)
    assert sorted(ran) == sorted(["prepare", "resources", "supernet", "search", "allocate", "allocate"])
    whole, first = pd.read_csv(rows, dtype={"network": str}), rows.read_bytes()
    assert list(whole["method"]) == [*["sampled"] * 2, "uniform", "growing back", "random"]
    assert list(whole["network"])[2] == "3333333"
    assert list(whole["choice_seconds"]) == [0, 0, 0, 2, 1]
    assert whole["search_top1"].between(0, 1).all()
    macro.macro("mobilenet", 1, tmp_path / "kept", "0", file, tmp_path)
    assert len(ran) == 6
    assert rows.read_bytes() == first
    params = load_yaml(ROOT / "evidence/macro_mobilenet.yaml")
    graph = macro.supernet_graph(changed(params, study["changes"]))
    limit = parse_budget("60%").absolute(graph.macs())
    assert all(graph.macs(macro.quarters(graph, network)) <= limit for network in whole["network"][2:])


# Summary


def test_other_files_than_the_benchmarks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Results_ResNet\.json does not exist; --truth is the folder with the files"):
        macro.benchmark(tmp_path, "resnet")
    (tmp_path / "Results_ResNet.json").write_text(json.dumps({"1111111": {"acc": [1, 2, 3], "flops": 5, "params": 6}}))
    with pytest.raises(SystemExit, match=r"has \{'flops': 5, 'params': 6\} for the network 1111111, but this network"):
        macro.benchmark(tmp_path, "resnet")


def test_the_best_network_is_judged_on_other_trainings() -> None:
    """Each training makes another network the best; its other trainings are 80 and 82, 70 and 72, 60 and 62 percent."""
    trainings = pd.DataFrame({"a": [99, 80, 82], "b": [70, 99, 72], "c": [60, 62, 99]}, dtype=float).T
    assert summary._best_of_one(trainings) == pytest.approx((81 + 71 + 61) / 3)


def test_the_summary_compares_scores_and_choices_with_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cross-entropy ranks as the benchmark does, the error in reverse; a choice's distances are known."""
    amounts = {a + b: 10 * (int(a) + int(b)) for a, b in itertools.product("1234", repeat=2)}
    quality = pd.Series({name: float(name) for name in amounts})  # 11 to 44 percent
    trainings = pd.DataFrame({n: quality + n for n in range(3)})  # mean: 1 more
    sampled = [
        {
            "budget": "50%",
            "method": "sampled",
            "supernet": supernet,
            "network": name,
            "macs": 5,
            "params": -quality[name],
        }
        | {"search_top1": -quality[name], "nats": -quality[name], "choice_seconds": 0}
        for supernet in (0, 1)
        for name in amounts
    ]
    chosen = [
        {"budget": "50%", "method": method, "supernet": supernet, "network": network, "macs": 2, "choice_seconds": 90}
        for method, networks in (("uniform", ("22", "22")), ("greedy", ("31", "13")))
        for supernet, network in enumerate(networks)
    ]
    space = summary._Space(pd.DataFrame(sampled + chosen), trainings, 5, amounts)
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "RESAMPLES", 50)
    monkeypatch.setattr(summary._Space, "read", lambda *_: space)
    (tmp_path / "macro-resnet.csv").touch()
    summary._macro(tmp_path, tmp_path / "macro.png")
    output = capsys.readouterr().out
    same, opposite = "1.00 [1.00, 1.00]", "-1.00 [-1.00, -1.00]"
    assert f"| resnet | 50% | 16 | {same} | {opposite} | equal | {opposite} | {same} |" in output
    spread = stdev(quality)
    assert f"| resnet | 50% | {spread:.2f} | 1.00 | 0.58 | {math.sqrt(1 - 1 / 3 / spread**2):.2f} |" in output
    # 13, 22 and 31 fill 40 of 80; their means are 14, 23 and 32. Above 31 there is no network within the budget.
    assert "| 50% | a random one | | | 23.00 ± 9.00 (n 3) | | | | 9.00 | 9.00 | |" in output
    assert "| 50% | uniform | 22, 22 | 40.0 | 23.00 |  | +0.00 | 33 | 9.00 | 9.00 | 1.5 |" in output
    assert "| 50% | greedy | 31, 13 | 40.0 | 23.00 | +0.00 | +0.00 | 33 | 9.00 | 9.00 | 1.5 |" in output
    assert (tmp_path / "macro.png").stat().st_size > 5000
