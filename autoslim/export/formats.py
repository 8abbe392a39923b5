"""Export of a trained network for use without autoslim."""

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from autoslim.data.prepared import DataInfo
from autoslim.files import write_bytes, write_json
from autoslim.training.checkpoints import save_weights

FORMATS = (".pt2", ".safetensors")


def export(network: nn.Module, info: DataInfo, target: Path, details: Mapping[str, object]) -> None:
    """Writes ``network`` to ``target`` and its description to a JSON file of the same name.

    Args:
        network: a network in evaluation mode. It is moved to the CPU.
        info: description of the data that the network was trained on.
        target: file that ends in ``.pt2`` (a graph for any batch size, see ``exported_program``) or ``.safetensors``
            (weights).
        details: further entries of the JSON file.
    """
    if target.suffix == ".pt2":
        buffer = io.BytesIO()
        torch.export.save(exported_program(network, info), buffer)
        write_bytes(target, buffer.getbuffer())
    else:
        save_weights(network, target)
    write_json(target.with_suffix(".json"), {**details, **description(info)})


def exported_program(network: nn.Module, info: DataInfo) -> torch.export.ExportedProgram:
    """Returns the network as a graph of torch's operators, which runs without the network's class and autoslim."""
    network = network.to("cpu").to(memory_format=torch.contiguous_format)
    # Two images: torch.export treats a size of one as a constant.
    images = torch.zeros(2, *info.input_shape)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=({0: batch},))


def description(info: DataInfo) -> dict[str, object]:
    """Returns a description of the network's input and classes."""
    return {
        "input": {
            "shape": list(info.input_shape),
            "range": [0, 1],  # of pixels before they are normalised
            "bits": info.bits,  # grey pixels of more than 8 bits are divided by 2 ** bits
            "shorter_side": info.shorter_side,  # of the box that images are resized to cover before the centre crop
            "mean": list(info.mean),  # of pixels in [0, 1]
            "std": list(info.std),
        },
        "classes": list(info.classes),
    }
