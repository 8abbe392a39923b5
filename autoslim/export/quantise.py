"""Post-training quantisation of exported files to int8."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoslim.errors import UserError, first_line
from autoslim.export.formats import write_onnx, write_openvino
from autoslim.export.runtimes import Run
from autoslim.resources.latency.onnx_models import quantise_onnx, quantise_openvino

QUANTISED = (".onnx", ".xml")
"""Suffixes of the files that can be quantised."""


def quantise_file(file: Path, batches: Sequence[np.ndarray], about: str) -> None:
    """Replaces the network in an exported file by one with int8 weights and activations.

    The range of each activation is calibrated on images. Weights have a scale for each output channel. ``.onnx`` is
    quantised by ONNX Runtime (QDQ format, the largest and smallest values as the range), and ``.xml`` by NNCF.

    Args:
        batches: normalised float32 images (N, C, H, W), of which there should be a few hundred.
        about: the description (JSON), which becomes the metadata of the new file.

    Raises:
        UserError: the network cannot be quantised.
    """
    assert file.suffix in QUANTISED
    try:
        (_quantise_onnx if file.suffix == ".onnx" else _quantise_openvino)(file, batches, about)
    except Exception as error:  # both libraries raise exceptions of many classes
        raise UserError(f"the network cannot be quantised ({first_line(error)}); export it without --int8") from error


def _quantise_onnx(file: Path, batches: Sequence[np.ndarray], about: str) -> None:
    write_onnx(quantise_onnx(file, [{"images": batch} for batch in batches]), file, about)


def _quantise_openvino(file: Path, batches: Sequence[np.ndarray], about: str) -> None:
    import openvino

    quantised = quantise_openvino(openvino.Core().read_model(file), batches)
    for mapped in (file, file.with_suffix(".bin")):
        mapped.unlink()  # the model reads its weights from the old file, which is mapped into memory
    write_openvino(quantised, file, about)


class RuntimeNetwork(nn.Module):
    """An exported file as a torch network on the CPU, for code that evaluates networks."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._run(images.numpy()))
