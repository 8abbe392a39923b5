"""Exported files compute what the network computes, contain their description, and are not written otherwise."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from autoslim.data.images import evaluation_pixels
from autoslim.data.prepared import DataInfo
from autoslim.data.structure import tensor_structure
from autoslim.errors import UserError
from autoslim.export import formats, runtimes
from autoslim.export.formats import description, export
from autoslim.export.predictor import Predictor
from autoslim.export.runtimes import open_exported

INFO = DataInfo("digits", ("cat", "dog", "owl"), 3, (8, 12), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), {}, "arrays", resize=10)
SUFFIXES = [".pt2", ".onnx", pytest.param(".xml", marks=pytest.mark.skipif(not find_spec("openvino"), reason="extra"))]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(*body, nn.Linear(8, 3))
    network(torch.randn(16, 3, 8, 12))  # changes the running statistics
    return network.eval()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_computes_what_the_network_computes_for_any_batch(tmp_path: Path, suffix: str) -> None:
    network, images = small_network(), torch.randn(7, 3, 8, 12)
    file = tmp_path / f"n{suffix}"
    agreement = export(network, INFO, file, {"budget": "25%", "note": 'ü"<'}, images=[images[:4], images[4:]])
    assert agreement.images == 7
    exported = open_exported(file, threads=1)
    assert (
        exported.about
        == json.loads((tmp_path / "n.json").read_text())
        == {
            "budget": "25%",
            "note": 'ü"<',
            **description(INFO),
        }
    )
    with torch.inference_mode():
        expected = network(images).numpy()
    outputs = exported.run(images.numpy())
    assert agreement.largest == np.abs(expected).max()
    assert np.abs(outputs - expected).max() <= agreement.difference + 1e-7 < 1e-5
    for size in (1, 3):
        np.testing.assert_allclose(exported.run(images[:size].numpy()), expected[:size], atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in formats.files_of(file)}


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
def test_a_file_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    network, images = small_network(), [torch.randn(2, 3, 8, 12)]
    file = tmp_path / f"n{suffix}"
    export(network, INFO, file, {}, images=images)
    before = file.read_bytes()
    write = formats.write_file

    def wrong(network: nn.Module, *rest: object) -> None:
        write(nn.Sequential(*network[:-1], nn.Linear(8, 3)), *rest)  # type: ignore[arg-type,index]

    monkeypatch.setattr(formats, "write_file", wrong)
    with pytest.raises(UserError, match=rf"n{suffix} does not compute what the network computes: on 2 images the outp"):
        export(network, INFO, file, {"changed": True}, images=images)
    assert file.read_bytes() == before
    assert "changed" not in (tmp_path / "n.json").read_text()


def test_a_network_that_cannot_be_exported(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum().item() > 0 else images[:, :1]

    for suffix in (".pt2", ".onnx"):
        with pytest.raises(UserError, match=rf"the network cannot be exported to {suffix} \(.+\); choose another of"):
            export(Branching(), INFO, tmp_path / f"n{suffix}", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "extra"), [(".onnx", "onnx"), (".xml", "openvino")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, extra: str
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    message = rf"{suffix} files need .*, which cannot be found; install autoslim with its extra {extra} \(pip install"
    with pytest.raises(UserError, match=message):
        export(small_network(), INFO, tmp_path / f"n{suffix}", {})
    with pytest.raises(UserError, match=message):
        open_exported(tmp_path / f"n{suffix}")


def test_files_of_other_programs_and_damaged_ones(tmp_path: Path) -> None:
    export(small_network(), INFO, tmp_path / "n.onnx", {})
    model = onnx.load(tmp_path / "n.onnx")
    assert str(Path(__file__).parent) not in str(model)  # the exporter records the lines of the network's source
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=r"other\.onnx has no description of its input and classes"):
        open_exported(tmp_path / "other.onnx")
    for suffix in (".onnx", ".pt2"):
        (tmp_path / f"damaged{suffix}").write_bytes((tmp_path / "n.onnx").read_bytes()[:1000])
        with pytest.raises(UserError, match=rf"damaged{suffix} cannot be opened \("):
            open_exported(tmp_path / f"damaged{suffix}")


def test_predictions_are_the_softmax_of_normalised_pixels(tmp_path: Path) -> None:
    network = small_network()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 40, 3), np.uint8)).save(tmp_path / "a.png")
    predictor = Predictor(description(INFO), runtimes.network_run(network))
    pixels = predictor.pixels(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(pixels, evaluation_pixels(image, 3, 10, (8, 12)))
    assert np.array_equal(pixels, predictor.pixels((tmp_path / "a.png").read_bytes()))
    mean, std = (torch.tensor(values)[:, None, None] for values in (INFO.mean, INFO.std))
    with torch.inference_mode():
        shares = network(((torch.from_numpy(pixels) / 255 - mean) / std)[None]).softmax(1)[0]
    [found] = predictor.predict([pixels])
    assert found.probabilities == pytest.approx(dict(zip(INFO.classes, shares.tolist(), strict=True)))
    assert found.label == INFO.classes[int(shares.argmax())]
    [best] = predictor.predict([pixels], top=1)
    assert best.probabilities == {found.label: found.probability}
    with pytest.raises(UserError, match=r"row 3 is not a readable image \("):
        predictor.pixels(b"no image", "row 3")


def own_data(structure: dict[str, Any]) -> DataInfo:
    return DataInfo("my.py:build", (), 0, (0, 0), (), (), {}, "own", inputs=structure)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_network_with_one_input_of_any_rank_is_exported(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).eval()
    info, sounds = own_data(tensor_structure(1, 8)), torch.randn(5, 1, 8)
    agreement = export(network, info, tmp_path / f"n{suffix}", {}, images=[sounds])
    assert agreement.images == 5
    exported = open_exported(tmp_path / f"n{suffix}", threads=1)
    np.testing.assert_allclose(exported.run(sounds.numpy()), network(sounds).detach().numpy(), atol=1e-5)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, first: torch.Tensor, second: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"out": self.layer(first if second is None else first + second)}


@pytest.mark.parametrize(
    ("structure", "reason"),
    [
        ({"tuple": [tensor_structure(4), tensor_structure(4)]}, "its inputs are (4, 4)"),
        (tensor_structure(4), "its output is a dict"),
    ],
)
def test_a_network_of_another_structure_is_exported_as_weights_only(
    tmp_path: Path, structure: dict[str, Any], reason: str
) -> None:
    info = own_data(structure)
    with pytest.raises(UserError, match=re.escape(f"cannot be exported to .onnx, because {reason}, and such a file")):
        export(Pair().eval(), info, tmp_path / "n.onnx", {})
    assert list(tmp_path.iterdir()) == []
    network = Pair().eval()
    assert export(network, info, tmp_path / "n.safetensors", {}, images=[torch.zeros(2, 4)]).images == 0
    torch.testing.assert_close(load_file(tmp_path / "n.safetensors"), dict(network.state_dict()))


def test_a_network_for_data_of_ones_own_classifies_no_image_files() -> None:
    own = DataInfo("my.py:build", (), 3, (8, 12), (), (), {}, "own")
    with pytest.raises(UserError, match="the network does not classify image files: its data are your own"):
        Predictor(description(own), runtimes.network_run(small_network()))
