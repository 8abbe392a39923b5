"""Exports networks to ONNX and quantises them to int8, for runtimes other than torch."""

import contextlib
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from autoslim.channels.inputs import Arguments
from autoslim.errors import first_line
from autoslim.files import write_bytes

CALIBRATION_BATCHES = 2
"""Random batches on which models are quantised whose latency alone matters."""

_ANSI_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def onnx_model(network: nn.Module, inputs: Arguments) -> Any:
    """Returns the network for inputs of these shapes as an ONNX model (``onnx.ModelProto``).

    Raises:
        Exception: of any class, if the network cannot be exported. See ``export_reason``.
    """
    with without_output():
        program = torch.onnx.export(network, inputs.args, kwargs=inputs.kwargs, dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


def export_reason(error: Exception) -> str:
    """Returns the reason of an exporter's exception, whose own message is a banner."""
    return _ANSI_COLOURS.sub("", first_line(error.__cause__ or error))


def write_model(
    network: nn.Module, inputs: Arguments, stem: Path, runtime: str, precision: str, *, share: bool
) -> Path:
    """Writes the network as a model for a runtime other than torch, and returns its file.

    Args:
        network: a network on the CPU in evaluation mode.
        inputs: inputs of the shapes that the model is for.
        stem: the file without its suffix.
        runtime: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        precision: ``fp32``, or ``int8``: quantised on random inputs, so that its latency alone means something.
        share: see ``share_weights``. The models of OpenVINO in int8 keep their weights.

    Raises:
        Exception: of any class, if the network cannot be exported or quantised. See ``export_reason``.
    """
    model = onnx_model(network, inputs)
    file = stem.with_name(stem.name + ".onnx")
    feeds = random_feeds(inputs, [spec.name for spec in model.graph.input])
    if precision == "int8" and runtime == "openvino":
        import openvino

        file = stem.with_name(stem.name + ".xml")
        quantised = quantise_openvino(openvino.Core().read_model(model.SerializeToString()), feeds)
        with TemporaryDirectory(dir=file.parent) as folder:
            written = Path(folder, file.name)
            openvino.save_model(quantised, written, compress_to_fp16=False)
            for suffix in (".bin", ".xml"):  # a file with this name is complete
                os.replace(written.with_suffix(suffix), file.with_suffix(suffix))
        return file
    if precision == "int8":
        with TemporaryDirectory() as folder:
            plain = Path(folder, "plain.onnx")
            plain.write_bytes(model.SerializeToString())
            model = quantise_onnx(plain, feeds)
    if share:
        share_weights(model, file.parent)
    write_bytes(file, model.SerializeToString())
    return file


def random_feeds(inputs: Arguments, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Returns values for calibration: normal random numbers in place of real numbers, other values as they are."""
    generator = torch.Generator().manual_seed(0)

    def drawn(value: torch.Tensor) -> np.ndarray:
        if not value.is_floating_point():
            return np.asarray(value.numpy())
        return np.asarray(torch.randn(value.shape, generator=generator, dtype=value.dtype).numpy())

    return [dict(zip(names, map(drawn, inputs.tensors), strict=True)) for _ in range(CALIBRATION_BATCHES)]


def quantise_onnx(file: Path, feeds: Sequence[Mapping[str, np.ndarray]]) -> Any:
    """Returns the model of an ONNX file with int8 weights and activations (QDQ), quantised by ONNX Runtime.

    The range of an activation is from its lowest to its highest value on ``feeds``. Weights have a scale for each
    output channel.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Feeds(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.feeds, None)

    with TemporaryDirectory() as folder, without_output():
        prepared, quantised = Path(folder, "prepared.onnx"), Path(folder, "quantised.onnx")
        quant_pre_process(file, prepared)  # merges batch norms into convolutions
        quantization.quantize_static(prepared, quantised, Feeds(), per_channel=True)
        return onnx.load(quantised)


def quantise_openvino(model: Any, feeds: Sequence[Any]) -> Any:
    """Returns an OpenVINO model with int8 weights and activations, quantised by NNCF with ranges found on ``feeds``."""
    import nncf

    nncf.set_log_level("ERROR")
    with without_output():
        return nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds))


def share_weights(model: Any, folder: Path) -> None:
    """Replaces the weights of an ONNX model by random numbers in files that all models in the folder share.

    The latency does not depend on the values, and the weights of many models would be large. The numbers are normal,
    with the variance 2 / inputs of a layer for layers with a similar number of inputs (in powers of two), so that
    activations neither overflow nor vanish. Vectors, such as the statistics of batch norms, keep their values.
    """
    import onnx

    taken: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if len(tensor.dims) < 2 or tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8):
            continue
        whole = tensor.data_type == onnx.TensorProto.INT8
        exponent = round(math.log2(max(1, math.prod(tensor.dims[1:]))))
        name = "weights-int8.bin" if whole else f"weights-{exponent}.bin"
        length = math.prod(tensor.dims) * (1 if whole else 4)
        # Different weights of a model begin at different places: runtimes may merge equal ones.
        offset = _PAGE * (taken.get(name, 0) % _PLACES)
        taken[name] = taken.get(name, 0) + 1
        _extend(folder / name, offset + length, None if whole else math.sqrt(2 / 2**exponent))
        del tensor.external_data[:]
        for field in ("raw_data", "float_data", "int32_data"):
            tensor.ClearField(field)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)


_PAGE, _PLACES = 4096, 64  # offsets of external data are multiples of the page size
_PIECE = 2**20


def _extend(file: Path, length: int, deviation: float | None) -> None:
    """Extends a file by whole pieces of random numbers, up to ``length`` bytes or more."""
    with file.open("ab") as stream:
        for piece in range(stream.tell() // _PIECE, -(-length // _PIECE)):
            generator = np.random.default_rng(piece)
            if deviation is None:
                values = generator.integers(-127, 128, _PIECE, np.int8)
            else:
                values = (deviation * generator.standard_normal(_PIECE // 4)).astype(np.float32)
            stream.write(values.tobytes())


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Suppresses the exporter's warnings, log messages and prints."""
    import logging
    import warnings

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
