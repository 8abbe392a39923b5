"""An input that is not square, through the stages: the network's shape, its costs, and the exported file."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_project import stage, start_project
from torch.utils.flop_counter import FlopCounterMode

from autoslim.cli.check import check
from autoslim.data.prepared import PreparedData
from autoslim.export.formats import description
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.params import load_params


def test_an_input_that_is_not_square(tmp_path: Path, capsys: object) -> None:
    augment = {"pad": 1, "flip": True, "area": [0.3, 1.0], "jitter": 0.1}
    folder = start_project(tmp_path, {"data": {"image_size": [8, 12]}, "supernet": {"augment": augment}})
    with contextlib.chdir(folder):
        stage("prepare")
        stage("resources")
        stage("supernet")
        check(Path("params.yaml"), folder)
        params, data = load_params(), PreparedData.open(Path("data/prepared"))
        network, graph = traced_network(params.model, data.info)
        supernet = json.loads(Path("outputs/supernet/supernet.json").read_text())
        weights = load_file("outputs/supernet/weights.safetensors")
        assert data.images("test").shape == (50, 1, 8, 12)
    assert supernet["input_shape"] == list(graph.input_shape) == [1, 8, 12]
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 1, 8, 12))
    assert graph.macs() == counter.get_total_flops() // 2
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert description(data.info)["input"] == {
        "shape": [1, 8, 12],
        "range": [0, 1],
        "bits": 16,
        "shorter_side": 8,
        "mean": list(data.info.mean),
        "std": list(data.info.std),
    }
