"""The method ``default``: a row for the network that the user has, and what the other networks lose against it."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import printed
from safetensors.torch import load_file
from small_project import change_params, stage

from autoslim.data.prepared import PreparedData, read_info
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import PREPARED
from autoslim.pipeline.retrain import load_retrained, seeds_of
from autoslim.resources.budgets import format_amount

TRAINED = "outputs/supernet/trained.safetensors"
METHODS = {"methods": ["default", "uniform", "autoslim"]}


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def trained(changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Adds trained weights of the default network to the project, and returns them."""
    change_params(Path(), {})
    network, _ = traced_network(load_params().model, read_info(PREPARED))
    torch.save(network.state_dict(), "trained.pt")
    watched = Path("dvc.yaml").read_text().replace("autoslim/models, net.py,", "autoslim/models, net.py, trained.pt,")
    Path("dvc.yaml").write_text(watched)
    change_params(Path(), {"model": {"weights": "trained.pt"}, "supernet": {"width": 1.0, "sort": "l1"}, **changes})
    return network.state_dict()


def test_the_default_network_is_cut_out_of_a_wider_supernet(done: Path) -> None:
    change_params(done, METHODS)
    stage("allocate")
    graph = traced_network(load_params().model, read_info(PREPARED))[1]
    chosen = read("outputs/channels/default.json")
    assert (chosen["channels"], chosen["start"]) == (graph.default, "supernet")
    assert chosen["costs"]["macs"] == graph.macs() > read("outputs/channels/uniform.json")["costs"]["macs"]
    assert read("outputs/channels/budgets.json")["default"]["budget"] == format_amount(graph.macs())
    initial, wide = load_file("outputs/channels/default.safetensors"), load_file("outputs/supernet/weights.safetensors")
    for name, tensor in initial.items():
        if "running" not in name and tensor.dim():  # batch statistics are estimated again
            assert torch.equal(tensor, wide[name][tuple(slice(size) for size in tensor.shape)]), name

    stage("retrain", "default")
    output = stage("report")
    table = Path("outputs/report/comparison.csv").read_text()
    rows = {row["method"]: row for row in csv.DictReader(table.splitlines())}
    assert list(rows) == METHODS["methods"]
    for method in ("uniform", "autoslim"):
        expected = float(rows[method]["top1"]) - float(rows["default"]["top1"])
        assert float(rows[method]["difference"]) == pytest.approx(expected)
        assert read("outputs/report/metrics.json")["difference"][method]["top1"] == pytest.approx(expected)
    assert (rows["default"]["difference"], rows["default"]["gain"]) == ("", "")
    assert "Difference from default in points: uniform " in output
    assert "difference from default (points)" in Path("outputs/report/table.md").read_text()
    assert read("outputs/report/metrics.json")["choice"]["method"] != "default"


def test_the_users_trained_network_is_evaluated_as_it_is(done: Path) -> None:
    """Its top-1 is that of the weights in the file, also if the supernet's channels were sorted."""
    tensors = trained({"methods": ["default", "autoslim"], "retrain": {"seeds": [3, 4]}})
    stage("supernet")
    stage("search")
    stage("allocate")
    assert read("outputs/channels/default.json")["start"] == "trained"
    stage("retrain", "autoslim")
    assert "retrain default: the network of model.weights is not retrained" in stage("retrain", "default")
    kept = load_file("outputs/retrain/default/weights/seed-3.safetensors")
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in tensors.items())
    assert seeds_of("default") == [3]
    assert set(read("outputs/retrain/default/metrics.json")["search_top1"]) == {"mean"}

    output = stage("report")
    data = PreparedData.open(PREPARED)
    network, _ = traced_network(load_params().model, data.info)
    network.load_state_dict(tensors)
    images = torch.from_numpy(np.asarray(data.images("test"))).float() / 255
    images = (images - torch.tensor(data.info.mean)[:, None, None]) / torch.tensor(data.info.std)[:, None, None]
    with torch.no_grad():
        right = network.eval()(images).argmax(1).numpy() == data.labels("test")
    assert read("outputs/report/metrics.json")["default"]["top1"] == pytest.approx(right.mean())
    text = Path("outputs/report/table.md").read_text()
    assert "default is the network of model.weights as it is, without retraining. All other networks were" in text
    assert "Mean ± standard deviation over 2 seeds." in text
    assert text.startswith("**Warning:** ")  # its weights are random
    assert "the network of model.weights has a top-1 of " in text
    assert "Warning: " in output
    assert load_retrained(load_params(), "default", 3).allocation.start == "trained"


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"supernet": {"width": 0.8}}, "scratch"),  # it does not have all channels
        ({"supernet": {"width": 1.0}}, "supernet"),
    ],
)
def test_without_trained_weights_the_default_network_is_trained(
    done: Path, changes: dict[str, Any], start: str
) -> None:
    change_params(done, {"methods": ["default", "autoslim"], **changes})
    stage("supernet")
    stage("search")
    stage("allocate")
    assert read("outputs/channels/default.json")["start"] == start
    assert bool(load_file("outputs/channels/default.safetensors")) == (start == "supernet")


def test_trained_weights_for_other_classes_or_a_start_from_scratch_are_trained(done: Path) -> None:
    tensors = trained({"methods": ["default"]})
    head = list(tensors)[-2:]
    torch.save({name: tensor[:7] if name in head else tensor for name, tensor in tensors.items()}, "trained.pt")
    stage("supernet")
    stage("allocate")
    assert read("outputs/channels/default.json")["start"] == "weights"
    assert torch.equal(load_file("outputs/channels/default.safetensors")[head[0]], load_file(TRAINED)[head[0]])
    assert "retrain default: training" in printed("estimate", "--seconds", "0")
    trained({"methods": ["default"], "retrain": {"start": "scratch"}})
    stage("supernet")
    stage("allocate")
    assert read("outputs/channels/default.json")["start"] == "scratch"
