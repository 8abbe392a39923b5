"""Latency packs: what they contain, that their script needs neither torch nor autoslim, and the table of its times."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autoslim import trace
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import GridSpec
from autoslim.channels.inputs import Arguments
from autoslim.channels.resize import resize
from autoslim.errors import UserError
from autoslim.resources.latency import pack as packing
from autoslim.resources.latency import runner
from autoslim.resources.latency.measure import FITTED_ON, checked_configurations
from autoslim.resources.latency.onnx_models import share_weights, write_model
from autoslim.resources.latency.pack import read_results, write_pack

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def traced() -> tuple[nn.Module, ChannelGraph]:
    network = Net().eval()
    return network, trace(network, torch.empty(1, 3, 8, 8))


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network, graph = traced()
    folder = tmp_path_factory.mktemp("packs") / "pack"
    write(folder, network, graph)
    return folder


def write(folder: Path, network: nn.Module, graph: ChannelGraph, **changes: Any) -> None:
    settings: dict[str, Any] = {
        "name": "net.py:Net",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "threads": 1,
        "batch": 1,
        "points": 2,
        "check_networks": 3,
    }
    write_pack(folder, network, graph, graph.grid(GridSpec(1.0, 0.5, 4, 1)), **(settings | changes))


def run_script(pack: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the pack's script in a process that cannot import torch, onnx or autoslim."""
    script = pack / "measure.py"
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'onnx', 'autoslim'): sys.modules[name] = None\n"
        f"sys.argv = [{str(script)!r}, *{list(arguments)!r}]\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_script_runs_without_torch_and_its_results_make_a_table(pack: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = run_script(pack, "--to", str(results))
    assert done.returncode == 0, done.stderr
    values = json.loads(results.read_text())
    assert all(len(ms) == runner.ROUNDS and min(ms) > 0 for ms in values["ms"].values())
    assert len([name for name in values["ms"] if "network" in name]) == 3  # of the 15 configurations
    table, (_, graph) = read_results(results), traced()
    assert (table.network, table.default, table.input_shape) == ("net.py:Net", graph.default, (3, 8, 8))
    assert (table.target.runtime, table.target.device, table.target.threads) == ("onnxruntime", "cpu", 1)
    assert table.target.machine == runner.processor()
    assert table.check is not None
    assert len(table.check.measured) == 3
    for channels in ({"0": 8}, {"0": 4}):
        assert (
            table.count_weights(channels)
            == graph.params(channels)
            == sum(value.numel() for value in resize(traced()[0], graph, channels).parameters())
        )


def test_the_table_is_that_of_the_times_in_the_results(pack: Path, tmp_path: Path) -> None:
    """Each model takes the median of its times; with times of a closed form, the predictions are exact."""
    plan = json.loads((pack / "plan.json").read_text())
    _, graph = traced()
    configurations = plan["table"]["networks"]
    assert configurations == checked_configurations(graph.grid(GridSpec(1.0, 0.5, 4, 1)), 3, 0)
    assert len(configurations) == FITTED_ON + 3
    kernels = plan["table"]["kernels"].values()
    ms = {
        name: [1 + 0.01 * count, 99.0, 0.0]
        for kernel in kernels
        for name, count in zip(kernel["files"], itertools.chain.from_iterable(kernel["weights"]), strict=True)
    }
    for name, channels in zip(plan["table"]["network_files"], configurations, strict=True):
        ms[name] = [0.5 + len(kernels) + 0.01 * graph.params(channels)] * 3
    target = {"machine": "a phone", "runtime": "onnxruntime", "threads": 4, "versions": "onnxruntime 1"}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"format": 1, "target": target, "plan": plan, "ms": ms}))
    table = read_results(results)
    assert str(table.target) == "a phone, onnxruntime, 4 threads, batch 1, fp32 (onnxruntime 1)"
    assert table.predict(graph.default) == pytest.approx(0.5 + len(kernels) + 0.01 * graph.params())
    del ms[plan["files"]["networks"][0]]
    results.write_text(json.dumps({"format": 1, "target": target, "plan": plan, "ms": ms}))
    with pytest.raises(UserError, match=r"is incomplete: 1 of \d+ models are not measured; run measure\.py"):
        read_results(results)
    results.write_text(json.dumps({"format": 1, "target": {}, "plan": plan, "ms": {}}))
    with pytest.raises(UserError, match=r"is incomplete"):
        read_results(results)
    for text, message in (("{", "cannot be read"), ("{}", "has no results"), ('{"format": 1, "ms": {}}', "damaged")):
        results.write_text(text)
        with pytest.raises(UserError, match=message):
            read_results(results)


def test_an_interrupted_measurement_continues(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads((pack / "plan.json").read_text())
    names = [name for kind in ("kernels", "networks") for name in plan["files"][kind]]
    results, measured = tmp_path / "results.json", []

    def stopping(file: Path, *_: Any) -> float:
        if len(measured) == 5:
            raise ValueError("killed")
        measured.append(file)
        return 1.0

    monkeypatch.setattr(runner, "measure_file", stopping)
    with pytest.raises(SystemExit, match="killed"):
        runner.measure_pack(pack, results)
    monkeypatch.setattr(runner, "measure_file", lambda file, *_: measured.append(file) or 2.0)
    runner.measure_pack(pack, results)
    assert len(measured) == (total := runner.ROUNDS * len(names))
    begun, *_, finished = capsys.readouterr().err.splitlines()  # in the words of the stages
    assert begun == f"latency: continuing at measurement 5 of {total}"
    assert re.fullmatch(rf"latency: {total}/{total} measurements, took 0:\d\d", finished)
    first = {str(file.relative_to(pack)) for file in measured[: len(names)]}
    assert first == set(names)  # each model once, before any of them again
    with pytest.raises(SystemExit, match="another pack, machine or setting"):
        runner.measure_pack(pack, results, threads=2)
    with pytest.raises(SystemExit, match="this pack is for"):
        runner.measure_pack(pack, tmp_path / "other.json", "eager")


def test_a_pack_is_written_once_and_continues_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(network: nn.Module, inputs: Arguments, stem: Path, *_: Any, **__: Any) -> Path:
        stem.with_suffix(".onnx").touch()
        return stem.with_suffix(".onnx")

    monkeypatch.setattr(packing, "write_model", written)
    network, graph = traced()
    folder = tmp_path / "pack"
    write(folder, network, graph)
    with pytest.raises(UserError, match="is a complete pack already"):
        write(folder, network, graph)
    (folder / "measure.py").unlink()
    models = sorted((folder / "models").glob("*.onnx"))
    kept, gone = models[0].stat().st_mtime_ns, models[1]
    gone.unlink()
    capsys.readouterr()
    write(folder, network, graph)
    count = len(models)
    begun, finished = capsys.readouterr().err.splitlines()
    assert begun == f"latency pack: continuing at model {count - 1} of {count}"
    assert finished.startswith(f"latency pack: {count}/{count} models, took ")
    assert gone.exists()
    assert models[0].stat().st_mtime_ns == kept
    with pytest.raises(UserError, match="has other contents"):
        write(folder, network, graph, points=3)


def test_shared_weights_are_small_files_and_keep_the_scale_of_activations(tmp_path: Path) -> None:
    """Models with many weights share one file for each size of a layer's input. Their outputs are finite."""
    network = nn.Sequential(*(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()) for _ in range(20))).eval()
    inputs = Arguments.of((torch.ones(1, 64, 4, 4),))
    files = [write_model(network, inputs, tmp_path / name, "onnxruntime", "fp32", share=True) for name in ("a", "b")]
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sum(sizes.values()) < 0.5 * 4 * sum(value.numel() for value in network.parameters())
    for file in files:
        model = runner.OnnxRuntime(str(file), 1)
        [output] = model.bind([np.ones((1, 64, 4, 4), np.float32)])()
        assert 1e-3 < np.abs(output).max() < 1e3
        stored = onnx.load(file)  # with its weights
        values = [onnx.numpy_helper.to_array(t) for t in stored.graph.initializer if len(t.dims) == 4]
        assert not np.array_equal(values[0], values[1])
        assert np.std(values[0]) == pytest.approx((2 / 512) ** 0.5, rel=0.05)


def test_int8_models_are_quantised(tmp_path: Path) -> None:
    inputs = Arguments.of((torch.ones(1, 3, 8, 8),))
    file = write_model(traced()[0], inputs, tmp_path / "net", "onnxruntime", "int8", share=True)
    model = onnx.load(file, load_external_data=False)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    [output] = runner.OnnxRuntime(str(file), 1).bind([np.ones((1, 3, 8, 8), np.float32)])()
    assert np.isfinite(output).all()
    share_weights(model, tmp_path)  # again
    assert (tmp_path / "weights-int8.bin").stat().st_size == 2**20
