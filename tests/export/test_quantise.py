"""Networks quantised to int8: accuracy against the float network, and what the file contains."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from test_formats import INFO, small_network
from torch import nn

from autoslim.errors import UserError
from autoslim.export.formats import export
from autoslim.export.quantise import RuntimeNetwork, quantise_file
from autoslim.export.runtimes import open_exported

OPENVINO = pytest.mark.skipif(not find_spec("nncf"), reason="extra openvino")


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".xml", marks=OPENVINO)])
def test_a_quantised_file_is_close_to_the_network_and_has_8_bit_weights(tmp_path: Path, suffix: str) -> None:
    network = small_network()
    network[0] = nn.Conv2d(3, 64, 3, padding=1)
    network[1], network[5] = nn.BatchNorm2d(64).eval(), nn.Linear(64, 3)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(16, 3, 8, 12, generator=generator) for _ in range(4)]
    batches = [batch.numpy() for batch in images]
    agreement = export(
        network,
        INFO,
        tmp_path / f"n{suffix}",
        {"budget": "25%"},
        images=images,
        quantise=lambda file, about: quantise_file(file, batches, about),
    )
    assert 0 < agreement.share < 0.05  # 8 bits: 1/256 of the range for each rounding
    exported = open_exported(tmp_path / f"n{suffix}")
    assert exported.about == json.loads((tmp_path / "n.json").read_text())
    outputs = RuntimeNetwork(exported.run)(images[0])
    with torch.inference_mode():
        expected = network(images[0])
    assert float((outputs - expected).abs().max()) <= agreement.difference + 1e-6
    if suffix == ".onnx":
        model = onnx.load(tmp_path / "n.onnx")
        sizes = {t.data_type: 0 for t in model.graph.initializer}
        for tensor in model.graph.initializer:
            sizes[tensor.data_type] += int(np.prod(tensor.dims))
        weights = network[0].weight.numel() + network[5].weight.numel()
        assert sizes[onnx.TensorProto.INT8] >= weights
        assert sizes.get(onnx.TensorProto.FLOAT, 0) < weights / 4  # scales


def test_a_network_that_cannot_be_quantised(tmp_path: Path) -> None:
    export(small_network(), INFO, tmp_path / "n.onnx", {})
    with pytest.raises(UserError, match=r"the network cannot be quantised \(.+\); export it without --int8"):
        quantise_file(tmp_path / "n.onnx", [np.zeros((2, 3, 9, 9), np.float32)], "{}")
