"""``autoslim latency``, and other commands with a latency table, tested with tables whose times are closed forms."""

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import error_from, facts, printed, table
from safetensors.torch import load_file
from small_project import change_params, error_of, finished_project, stage, start_project
from tiny import tiny_params
from torch import Tensor, nn

from autoslim import trace
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.inputs import Arguments
from autoslim.models.building import build_network
from autoslim.resources.budgets import format_amount
from autoslim.resources.latency import measure as measuring
from autoslim.resources.latency import pack as packing
from autoslim.resources.latency.kernels import find_kernels
from autoslim.resources.latency.measure import current_target
from autoslim.resources.latency.table import Check, KernelTimes, LatencyTable, Target

TARGET = Target("a phone", "onnxruntime", "cpu", 4, 1, "fp32", False, "torch 3")
CHECK = Check(tuple(range(5, 25)), tuple(n + 0.5 for n in range(5, 25)), 0.03, 0.09, 0.995)


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a copy of a project in which all stages have run, as the working directory."""
    folder = shutil.copytree(finished_project(tmp_path_factory.getbasetemp()), tmp_path / "project")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(folder)
    return folder


def tiny_network() -> nn.Module:
    model = tiny_params()["model"]
    return build_network(model["name"], model["kwargs"], 10)


def tiny_graph() -> ChannelGraph:
    return trace(tiny_network(), torch.empty(1, 1, 8, 8))


def made(graph: ChannelGraph, network: nn.Module | None = None, **changes: Any) -> LatencyTable:
    """Returns a table with 0.1 ms per channel of each group and 1 ms in addition, for the kernels of ``network``."""
    kernels = {
        f"kernel_{number}": KernelTimes((), (name,), (0,), (0, 1000), ((0.0, 100.0),), "work")
        for number, name in enumerate(graph.groups)
    }
    if network is not None:
        times = itertools.chain(kernels.values(), itertools.repeat(KernelTimes((), (), (0,), (0,), ((0.0,),), "work")))
        found = find_kernels(network, graph)
        kernels = {k.name: dataclasses.replace(t, work=k.work) for k, t in zip(found, times, strict=False)}
    values = {"check": CHECK, "slope": 1.0, "intercept": 1.0, "target": TARGET} | changes
    return LatencyTable("a network", graph.input_shape, graph.default, kernels=kernels, **values)


def write(path: Path, made_table: LatencyTable) -> Path:
    path.write_text(json.dumps(made_table.to_dict()))
    return path


def watch(file: str) -> None:
    """Adds a table's file to the deps of the stage ``resources``, as check_table requires."""
    dep = "autoslim/pipeline/resources.py,"
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace(dep, f"{dep} {file},"))


def latency(channels: Sequence[int]) -> float:
    return 1 + 0.1 * sum(channels)


# show


def test_show_prints_the_time_of_each_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # outside a project
    graph = tiny_graph()
    path = write(tmp_path / "phone.json", made(graph, slope=2.0))
    text = printed("latency", "show", str(path), "--figure", "phone.png")
    shown = facts(text)
    total = 1 + 0.2 * sum(graph.default.values())
    assert shown["measured on"] == "a phone, onnxruntime, 4 threads, batch 1, fp32 (torch 3)"
    assert shown["network"] == f"a network on 1x8x8 images, {len(graph.groups)} kernels"
    assert shown["default"] == f"{format_amount(total, 'latency')} predicted"
    assert shown["checked on"] == "20 random networks, 5.5ms to 24.5ms"
    assert shown["error"] == "3.0% (median); 95 % are within 9.0%"
    assert shown["rank correlation"] == "0.995"
    *kernels, between, whole = table(text, "kernel")
    times = [float(row["ms"]) for row in kernels]
    assert times == sorted(times, reverse=True)
    assert sorted(times) == pytest.approx(sorted(0.2 * size for size in graph.default.values()), abs=1e-3)
    assert (between["kernel"], float(between["ms"])) == ("(between the kernels)", 1)
    assert float(whole["ms"]) == pytest.approx(total)
    assert sum(float(row["% of total"]) for row in (*kernels, between)) == pytest.approx(100, abs=0.1)
    assert Path("phone.png").read_bytes()[:4] == b"\x89PNG"


def test_show_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph = tiny_graph()
    path = write(tmp_path / "phone.json", made(graph, slope=2.0))
    shown = json.loads(printed("latency", "show", str(path), "--json", "--figure", "phone.png"))
    assert shown["predicted_ms"] == pytest.approx(1 + 0.2 * sum(graph.default.values()))
    times = list(shown["kernels_ms"].values())
    assert times == sorted(times, reverse=True)
    assert sum(times) + shown["weights_ms"] + shown["between_kernels_ms"] == pytest.approx(shown["predicted_ms"])
    assert (shown["target"]["runtime"], shown["target"]["threads"]) == ("onnxruntime", 4)
    assert shown["check"]["rank_correlation"] == 0.995
    assert len(shown["check"]["measured_ms"]) == len(shown["check"]["predicted_ms"]) == 20
    write(path, made(graph, check=None))
    assert json.loads(printed("latency", "show", str(path), "--json"))["check"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no latency table at t.json; make one with `autoslim latency measure --to t.json`"),
        ("{", "t.json is not a latency table ("),
        ("[1]", "t.json is not a latency table; make one with"),
        ("{}", "t.json is not a latency table of format 1; make one with"),
        ('{"format": 1}', "t.json is damaged ("),
    ],
)
def test_show_of_files_that_are_not_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("t.json").write_text(text)
    assert error_from("latency", "show", "t.json").startswith(message)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("kernels", "kernel_0", "ms"), [["slow", 1.0]]),
        (("kernels", "kernel_0", "ms"), []),
        (("kernels", "kernel_0", "outputs"), ["nosuch"]),
        (("kernels", "kernel_0", "output_sizes"), [8, 8]),
        (("kernels",), [1, 2]),
        (("default",), {}),
        (("default",), None),
        (("slope",), "steep"),
        (("target", "threads"), "many"),
        (("target",), {"machine": "a phone"}),
        (("check", "median_error"), "small"),
        (("check",), {"measured": []}),
        (("input_shape",), 3),
    ],
)
def test_a_damaged_table_is_reported_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...], value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    values = json.loads(json.dumps(made(tiny_graph()).to_dict()))
    part = values
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    Path("t.json").write_text(json.dumps(values))
    assert error_from("latency", "show", "t.json").startswith("t.json is damaged (")


def test_errors_of_show_with_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.json", made(tiny_graph(), check=None))
    assert "rank correlation" not in printed("latency", "show", "t.json")
    for arguments, message in (
        (["t.json", "--figure", "t.svg"], "--figure t.svg does not end in .png"),
        (["t.json", "--figure", "gone/t.png"], f"--figure gone/t.png: the folder {tmp_path / 'gone'}"),
        (["t.json", "--figure", "t.png"], "t.json contains no comparison to plot"),
    ):
        assert error_from("latency", "show", *arguments).startswith(message)


# measure


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens all measurements."""
    monkeypatch.setattr(measuring, "KERNEL_SECONDS", 0.0)
    monkeypatch.setattr(measuring, "NETWORK_SECONDS", 0.0)


def test_a_table_is_measured_without_data(hasty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start_project(tmp_path / "project", {"latency": {"check_networks": 10}})
    monkeypatch.delenv("DVC_ROOT", raising=False)
    command = "latency", "measure", "--to", "here.json"
    monkeypatch.chdir(folder / "stages")  # file names are relative to this folder; the command changes into the project
    message = error_from(*command)
    assert message.startswith("the number of classes of digits is not known; run `dvc repro prepare`, or set --classes")
    message = error_from(*command, "--classes", "10")
    assert message.startswith("data.image_size is None and data.channels is None")
    sizes = "--classes", "10", "--size", "8", "--channels", "1"
    monkeypatch.chdir(folder / "stages")
    text = printed(*command, *sizes, "--points", "2", "--batch", "3", "--device", "cpu")
    assert "latency on " in text
    assert "over 10 random networks the prediction is off by " in text
    assert "wrote here.json " in text
    assert "latency.table: stages/here.json in params.yaml" in text
    values = json.loads((folder / "stages/here.json").read_text())
    graph = tiny_graph()
    assert (values["default"], values["input_shape"]) == (graph.default, [1, 8, 8])
    assert (values["target"]["batch"], values["target"]["device"], values["target"]["runtime"]) == (3, "cpu", "eager")
    times = [ms for kernel in values["kernels"].values() for ms in itertools.chain.from_iterable(kernel["ms"])]
    assert all(ms > 0 for ms in (*times, *values["check"]["measured"]))
    assert all(len(kernel["input_sizes"]) <= 2 >= len(kernel["output_sizes"]) for kernel in values["kernels"].values())
    assert not (folder / "data").exists()

    monkeypatch.chdir(folder / "stages")
    assert error_from(*command, *sizes) == "--to here.json exists; choose another file, or replace it with --force"
    printed(
        *command, *sizes, "--points", "2", "--batch", "3", "--device", "cpu", "--force"
    )  # measured again, not read from the checkpoint
    again = json.loads((folder / "stages/here.json").read_text())
    assert again["check"]["measured"] != values["check"]["measured"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gone/t.json"], "--to gone/t.json: the folder "),
        (["--to", "stages"], "--to stages is a folder"),
        (["--to", "t.json", "gone.yaml"], "gone.yaml does not exist in "),
        (["--to", "t.json", "--device", "gpu"], 'the options device: latency.device is "gpu"; '),
        (["--to", "t.json", "--device", "cuda:40"], "latency.device 'cuda:40' is not available here ("),
        (
            ["--to", "t.json", "--runtime", "onnxruntime", "--precision", "bf16"],
            "latency.precision is bf16, but onnxruntime is supported only with fp32 or int8; set ",
        ),
    ],
)
def test_errors_of_measure_are_raised_before_it_measures(project: Path, arguments: list[str], message: str) -> None:
    assert error_from("latency", "measure", *arguments).startswith(message)
    assert not Path("t.json").exists()


# pack and read


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gone/pack"], "--to gone/pack: the folder "),
        (["--to", "params.yaml"], "--to params.yaml is a file; choose a new folder"),
        (["--to", "pack"], "latency.runtime is eager, but the runtime of a pack is one of onnxruntime, openvino, "),
        (
            ["--to", "pack", "--runtime", "openvino", "--precision", "bf16"],
            "latency.precision is bf16, but openvino is supported only with fp32 or int8; set ",
        ),
    ],
)
def test_errors_of_pack_are_raised_before_it_exports(project: Path, arguments: list[str], message: str) -> None:
    assert error_from("latency", "pack", *arguments).startswith(message)
    assert not Path("pack").exists()


def test_a_pack_is_written_and_its_results_are_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table serves a search. Times are made up here; tests/resources/test_latency_pack.py measures a pack."""
    pytest.importorskip("onnxscript")

    def written(network: nn.Module, inputs: Arguments, stem: Path, *_: Any, **__: Any) -> Path:
        stem.with_suffix(".onnx").touch()
        return stem.with_suffix(".onnx")

    monkeypatch.setattr(packing, "write_model", written)
    options = "--runtime", "onnxruntime", "--threads", "2", "--points", "2"
    assert "run `python measure.py` in it" in printed("latency", "pack", "--to", "pack", *options)
    assert {path.name for path in Path("pack").iterdir()} == {"README.md", "measure.py", "models", "plan.json"}
    plan = json.loads(Path("pack/plan.json").read_text())
    assert plan["threads"] == 2
    kernels, networks = plan["table"]["kernels"].values(), plan["table"]["networks"]
    ms = {
        name: [1 + 0.01 * count] * 3
        for kernel in kernels
        for name, count in zip(kernel["files"], itertools.chain.from_iterable(kernel["weights"]), strict=True)
    }
    ms |= {
        name: [float(sum(channels.values()))] * 3
        for name, channels in zip(plan["table"]["network_files"], networks, strict=True)
    }
    target = {"machine": "a phone", "runtime": "onnxruntime", "threads": 2, "versions": "onnxruntime 1"}
    results = {"format": 1, "target": target, "plan": plan, "ms": ms}
    assert error_from("latency", "read", "pack", "--to", "phone.json").startswith("pack/results.json cannot be read")
    Path("pack/results.json").write_text(json.dumps(results))
    text = printed("latency", "read", "pack", "--to", "phone.json")
    assert text.startswith("latency on a phone, onnxruntime, 2 threads, batch 1, fp32 (onnxruntime 1): over ")
    assert "set latency.table: phone.json" in text
    assert error_from("latency", "read", "pack", "--to", "phone.json").startswith("--to phone.json exists")
    watch("phone.json")
    change_params(project, {"resource": "latency", "budget": "99%", "latency": {"table": "phone.json"}})
    assert facts(printed("check"))["latency"].startswith("latency on a phone, onnxruntime, 2 threads")


# Other commands with a table


def test_check_and_estimate_use_a_table_from_another_machine(project: Path) -> None:
    graph = tiny_graph()
    write(project / "phone.json", made(graph, tiny_network()))
    change_params(project, {"resource": "latency", "budget": "60%", "latency": {"table": "phone.json"}})
    message = error_from("check")
    assert "latency.table is the file phone.json" in message
    watch("phone.json")
    shown = facts(printed("check"))
    default = latency(list(graph.default.values()))
    assert shown["budget"] == f"60%: at most {format_amount(0.6 * default, 'latency')}, 60 % of the default network's"
    assert shown["network"].endswith(f", {format_amount(default, 'latency')}")
    narrowest = shown["supernet"].removeprefix("from ").partition(" to ")[0]  # more than search.stop, 40 %
    assert shown["search"] == f"from the widest down to {narrowest}"
    assert shown["latency"].startswith("latency on a phone, onnxruntime, 4 threads")
    shown = facts(printed("estimate", "--seconds", "0"))
    assert shown["budget"] == "60%"
    write(
        project / "phone.json",
        made(trace(build_network("autoslim.models.architectures:mobilenet_v2", {}, 10), torch.empty(1, 3, 32, 32))),
    )
    assert error_from("check").startswith("the latency table was measured for another network (a network, ")
    other = made(graph, tiny_network())
    first, *_ = other.kernels
    times = dataclasses.replace(other.kernels[first], work="Conv2d 8x1x5x5 of 1x1x8x8")
    write(project / "phone.json", dataclasses.replace(other, kernels={**other.kernels, first: times}))
    message = error_from("check")  # the same groups, but other operations
    assert message.startswith(f"the latency table belongs to another network (a network): at {first} it has Conv2d")
    assert "8x1x3x3 of 1x1x8x8" in message
    narrow = dataclasses.replace(other.kernels[first], output_sizes=(2, 3))
    write(project / "phone.json", dataclasses.replace(other, kernels={**other.kernels, first: narrow}))
    message = error_from("check")
    assert message.startswith(
        "the latency table was measured at 2 to 3 channels of features.0.0, but the search needs 4 to "
    )
    assert "supernet.width and supernet.grid" in message
    Path("phone.json").unlink()
    assert error_from("check").startswith(
        "latency.table 'phone.json' does not exist; make it with `autoslim latency measure"
    )


def test_check_uses_the_stages_table_unless_it_is_outdated(project: Path) -> None:
    graph = tiny_graph()
    here = current_target(
        device=torch.device("cpu"), runtime="eager", threads=1, batch=1, precision="fp32", channels_last=False
    )
    here = dataclasses.replace(here, versions="torch 1")  # an upgrade of torch does not make the table outdated
    write(project / "outputs/resources/latency.json", made(graph, tiny_network(), target=here))
    change_params(project, {"resource": "latency", "budget": "60%"})
    assert facts(printed("check"))["budget"].startswith("60%: at most ")
    for changes in ({"threads": 2}, {"batch": 4}, {"channels_last": True}):
        change_params(project, {"resource": "latency", "budget": "60%", "latency": changes})
        assert facts(printed("check"))["budget"].startswith("60%: not checked: latency is not measured yet")
    elsewhere = dataclasses.replace(here, machine="a phone")
    write(project / "outputs/resources/latency.json", made(graph, tiny_network(), target=elsewhere))
    change_params(project, {"resource": "latency", "budget": "60%"})
    assert facts(printed("check"))["budget"].startswith("60%: not checked: latency is not measured yet")
    model = {"kwargs": {"in_channels": 1, "stem": 8, "stages": [[1, 8, 1, 2]], "tail": 16}}
    change_params(project, {"resource": "latency", "budget": "60%", "model": model})
    assert facts(printed("check"))["budget"].startswith("60%: not checked: latency is not measured yet")


def test_a_search_with_a_table_also_records_latency(project: Path) -> None:
    """A search for MACs also covers budgets of latency, and the report compares prediction and measurement."""
    write(project / "phone.json", made(tiny_graph(), tiny_network()))
    watch("phone.json")
    change_params(project, {"latency": {"table": "phone.json"}})
    for arguments in (["resources"], ["search"], ["allocate"], ["report"]):
        stage(*arguments)
    steps = json.loads(Path("outputs/search/trajectory.json").read_text())["steps"]
    found = json.loads(printed("trajectory", "--budget", "70%", "--resource", "latency", "--json"))["70%"]
    limit = 0.7 * latency(list(tiny_graph().default.values()))
    first = next(step for step in steps if latency(list(step["channels"].values())) <= limit + 1e-9)
    assert (found["step"], found["latency"]) == (
        first["step"],
        pytest.approx(latency(list(first["channels"].values()))),
    )
    rows = table(printed("trajectory"), "step")
    assert [row["latency"] for row in rows if len(row) > 2] == [
        format_amount(step["latency"], "latency") for step in steps
    ]
    compared = table(printed("compare"), "method")
    chosen = {name: json.loads(Path(f"outputs/channels/{name}.json").read_text()) for name in ("autoslim", "uniform")}
    for row in compared:
        predicted = latency(list(chosen[row["method"]]["channels"].values()))
        assert row["latency predicted"] == format_amount(predicted, "latency")
    assert Path("outputs/report/resources.png").exists()


def test_check_prints_no_search_end_below_the_narrowest(project: Path) -> None:
    """Most of the time may not depend on the channels: then search.stop is out of reach."""
    graph = tiny_graph()
    write(project / "phone.json", made(graph, tiny_network(), intercept=100.0))
    watch("phone.json")
    change_params(project, {"resource": "latency", "budget": "99%", "latency": {"table": "phone.json"}})
    shown = facts(printed("check"))
    low = shown["supernet"].removeprefix("from ").partition(" to ")[0]
    assert shown["search"] == f"from the widest down to {low}"
    assert float(low.removesuffix("ms")) > 100


def test_outputs_of_another_machine_are_errors(project: Path) -> None:
    """DVC may have pulled them. Without latency.table, the latency must be that of this machine."""
    written = Path("outputs/resources/latency.json")
    write(written, made(tiny_graph(), tiny_network()))
    change_params(project, {"resource": "latency", "budget": "60%"})
    for name in ("search", "allocate"):
        message = error_of(name)
        assert message.startswith("latency.table is null, but outputs/resources/latency.json was measured on a phone")
        assert "latency.table" in message


def test_an_unreliable_measurement_stops_the_stage_and_is_not_stored(
    hasty: None, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_params(project, {"resource": "latency", "budget": "60%", "latency": {"points": 2, "check_networks": 10}})
    draw = random.Random(0)
    noise = lambda *_: measuring.Latency(1 + draw.random(), 1, 2)  # noqa: E731
    monkeypatch.setattr(measuring, "measure_latency", noise)
    message = error_of("resources")
    assert "too low" in message
    assert "write it with `autoslim latency measure --to FILE`" in message
    assert not list(Path("checkpoints").glob("latency-*/*"))
    assert json.loads(Path("outputs/resources/latency.json").read_text()).keys() == {
        "digest"
    }  # as the previous run wrote it

    def work(network: nn.Module, values: Sequence[Tensor], target: Target, seconds: float = 0) -> measuring.Latency:
        return measuring.Latency(sum(value.numel() for value in network.parameters()) + 1.0, 0, 0)

    monkeypatch.setattr(measuring, "measure_latency", work)
    stage("resources")
    assert json.loads(Path("outputs/resources/latency.json").read_text())["check"]["rank_correlation"] > 0.9


def test_a_runtime_that_cannot_run_the_network_is_reported_before_training(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(network: nn.Module) -> Callable[..., Any]:
        def run(*_: Any) -> None:
            raise RuntimeError("no such operator")

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    change_params(project, {"latency": {"runtime": "compile"}})
    assert error_from("check").startswith("torch.compile cannot run this network (no such operator)")
    assert error_of("resources").startswith("torch.compile cannot run this network (no such operator)")


def test_check_reports_networks_that_cannot_be_divided_into_kernels(project: Path) -> None:
    Path("net.py").write_text(
        """from safetensors.torch import load_file
from torch import Tensor, nn
class Net(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, num_classes))
    def forward(self, x):
        return super().forward(x if x.shape[2] > 4 else -x)
"""
    )
    change_params(project, {"model": {"name": "net.py:Net", "kwargs": {}}})
    printed("check")
    change_params(project, {"model": {"name": "net.py:Net", "kwargs": {}}, "resource": "latency", "budget": "60%"})
    assert error_from("check").startswith("latency requires a network that can be divided into kernels: ")


def test_the_same_channels_for_another_budget_are_the_same_file(project: Path) -> None:
    """Retraining depends on it."""
    before = Path("outputs/channels/uniform.json").read_bytes()
    macs = json.loads(before)["costs"]["macs"]
    change_params(project, {"budget": macs})
    stage("allocate")
    assert Path("outputs/channels/uniform.json").read_bytes() == before
    assert json.loads(Path("outputs/channels/budgets.json").read_text())["uniform"]["budget"] == str(macs)


def test_retraining_starts_from_the_supernet_through_the_stages(project: Path) -> None:
    """With a negligible learning rate, the results are the networks that allocate extracted from the supernet."""
    retrain = {"start": "supernet", "seeds": [0], "optimiser": {"learning_rate": 1e-30}}
    change_params(project, {"retrain": retrain})
    stage("allocate")
    wide = load_file("outputs/supernet/weights.safetensors")
    for method in ("uniform", "autoslim"):
        stage("retrain", method)
        start = load_file(f"outputs/channels/{method}.safetensors")
        end = load_file(f"outputs/retrain/{method}/weights/seed-0.safetensors")
        assert start.keys() == end.keys()
        for name, value in start.items():
            if "running" not in name and "num_batches" not in name:
                assert torch.allclose(value, end[name], rtol=0, atol=1e-20)
                assert torch.equal(value, wide[name][tuple(slice(size) for size in value.shape)])
    Path("outputs/channels/uniform.safetensors").unlink()
    message = error_of("retrain", "uniform")
    assert message.startswith(
        "the initial weights of method 'uniform' do not exist (outputs/channels/uniform.safetensors)"
    )
    change_params(project, {"retrain": {"start": "scratch"}})
    stage("allocate")
    assert load_file("outputs/channels/uniform.safetensors") == {}
