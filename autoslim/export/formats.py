"""Writes a trained network to files for deployment, and compares each with the network on images before it is kept."""

import copy
import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoslim.data.prepared import DataInfo
from autoslim.data.structure import in_words, is_tensor
from autoslim.errors import UserError, first_line
from autoslim.export.runtimes import ABOUT, RUNTIMES, Run, check_installed, network_run, open_exported
from autoslim.files import os_error, write_atomically, write_json
from autoslim.resources.latency.onnx_models import without_output
from autoslim.training.checkpoints import load_weights, save_weights

FORMATS = (".safetensors", *RUNTIMES)
TOLERANCE = 1e-3
"""The largest difference between the outputs of a file and the network, as a share of the largest output."""

Quantise = Callable[[Path, str], None]
"""Replaces the network in a file by a quantised one, given the description for its metadata."""


@dataclass(frozen=True)
class Agreement:
    """How an exported file agrees with the network: on ``images`` images, the largest absolute difference between the
    outputs, and the largest absolute output."""

    images: int
    difference: float
    largest: float

    @property
    def share(self) -> float:
        """The difference as a share of the largest output."""
        return self.difference / self.largest if self.largest else self.difference

    def check(self, name: str) -> None:
        """Raises ``UserError`` if the difference is more than a rounding error."""
        if not self.share <= TOLERANCE:  # also if it is not a number
            raise UserError(
                f"{name} does not compute what the network computes: on {self.images} images the outputs differ by up "
                f"to {self.difference:.2g}, and the largest is {self.largest:.2g}; it was not written: choose another "
                "format"
            )


def export(
    network: nn.Module,
    info: DataInfo,
    target: Path,
    details: Mapping[str, object],
    *,
    images: Iterable[Tensor] = (),
    quantise: Quantise | None = None,
) -> Agreement:
    """Writes ``network`` to ``target``, and its description into the file and to a JSON file of the same name.

    The network's input is a batch of any size of normalised images (N, C, H, W), and its output is that of the network.

    Args:
        network: a network in evaluation mode. It is moved to the CPU.
        info: description of the data that the network was trained on.
        target: file whose suffix is one of ``FORMATS``: ``.pt2`` (torch.export), ``.onnx``, ``.xml`` (OpenVINO, with a
            ``.bin`` file next to it) or ``.safetensors`` (weights only).
        details: further entries of the description.
        images: normalised images (N, C, H, W) on which the file is compared with the network before it is written.
        quantise: quantises the file. The comparison is then returned, but no difference is an error.

    Raises:
        UserError: the format needs a package that is not installed, the network cannot be exported to it, or the
            outputs of the file are not those of the network. Existing files are then unchanged.
    """
    check_installed(target.suffix)
    network = network.to("cpu").to(memory_format=torch.contiguous_format)
    if not check_structure(network, info, target.suffix):
        images = ()  # they are not compared
    about = {**details, **description(info)}
    try:
        with TemporaryDirectory() as folder:
            file = Path(folder, target.name)
            write_file(network, info, file, about)
            if quantise is not None:
                quantise(file, json.dumps(about))
            agreement = compare(network, lambda: _opened(network, file), images)
            if quantise is None:
                agreement.check(target.name)
            for written in sorted(Path(folder).iterdir()):
                size = written.stat().st_size
                write_atomically(target.with_name(written.name), partial(shutil.copyfile, written), needed=size)
    except OSError as error:  # such as a full disk, on which the temporary files are too
        raise os_error(error, target) or error from error
    write_json(target.with_suffix(".json"), about)
    return agreement


def files_of(target: Path) -> list[Path]:
    """Returns the files that ``export`` writes."""
    return [target, *([target.with_suffix(".bin")] if target.suffix == ".xml" else []), target.with_suffix(".json")]


def check_structure(network: nn.Module, info: DataInfo, suffix: str) -> bool:
    """Returns whether the network, which is on the CPU, has one input and one output tensor.

    Raises:
        UserError: it has not, and files with this suffix need it.
    """
    reason = other_structure(network, info)
    if reason and suffix != ".safetensors":
        raise UserError(
            f"the network cannot be exported to {suffix}, because {reason}, and such a file has one input and one "
            "output tensor; use .safetensors"
        )
    return not reason


def other_structure(network: nn.Module, info: DataInfo) -> str:
    """Returns how the network, which is on the CPU, differs from one with one input and one output tensor, or ""."""
    if not is_tensor(info.inputs):
        return f"its inputs are {in_words(info.inputs)}"
    with torch.no_grad():
        output = network(info.example(2))
    return "" if isinstance(output, Tensor) else f"its output is a {type(output).__name__}"


def description(info: DataInfo) -> dict[str, object]:
    """Returns a description of the network's input and classes."""
    if not info.mean:  # data of the user's own
        return {"input": {"structure": info.inputs, "mean": [], "std": []}, "classes": list(info.classes)}
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


def exported_program(network: nn.Module, info: DataInfo) -> torch.export.ExportedProgram:
    """Returns the network as a graph of torch's operators, which runs without the network's class and autoslim."""
    network = network.to("cpu").to(memory_format=torch.contiguous_format)
    # Two images: torch.export treats a size of one as a constant.
    images = info.example(2)
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def write_file(network: nn.Module, info: DataInfo, file: Path, about: Mapping[str, Any]) -> None:
    """Writes the network on the CPU in the format of the file's suffix, with the description ``about`` in its metadata.

    Raises:
        UserError: the network cannot be exported to this format.
    """
    text = json.dumps(about)
    if file.suffix == ".safetensors":
        save_weights(network, file, {ABOUT: text})
        return
    try:
        with without_output():
            program = exported_program(network, info)
            if file.suffix == ".pt2":
                buffer = io.BytesIO()
                torch.export.save(program, buffer, extra_files={f"{ABOUT}.json": text})
                file.write_bytes(buffer.getbuffer())
                return
            model = torch.onnx.export(program, input_names=["images"], output_names=["output"], verbose=False)
            assert model is not None
            if file.suffix == ".onnx":
                write_onnx(model.model_proto, file, text)
            else:
                import openvino

                write_openvino(openvino.Core().read_model(model.model_proto.SerializeToString()), file, text)
    except OSError:
        raise  # such as a full disk
    except Exception as error:  # the exporters raise exceptions of many classes; the reason is in the cause
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"the network cannot be exported to {file.suffix} ({reason}); choose another of {', '.join(FORMATS)}"
        ) from error


def write_onnx(proto: Any, file: Path, about: str) -> None:
    """Writes an ONNX model with the description in its metadata, and without the exporter's traces of source lines."""
    graph = proto.graph
    for described in (proto, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del described.metadata_props[:]
    proto.metadata_props.add(key=ABOUT, value=about)
    file.write_bytes(proto.SerializeToString())


def write_openvino(model: Any, file: Path, about: str) -> None:
    """Writes an OpenVINO model with the description in its runtime information, without rounding weights to fp16."""
    import openvino

    model.set_rt_info(about, [ABOUT])
    openvino.save_model(model, file, compress_to_fp16=False)


def compare(network: nn.Module, opened: Callable[[], Run], images: Iterable[Tensor]) -> Agreement:
    """Compares a file with the network on batches of images, and on the first image alone.

    Args:
        opened: returns the function that computes the file's output. It is not called if there are no images.
    """
    batches = list(images)
    difference = largest = 0.0
    run = opened() if batches else None
    for batch in [*batches, *(batch[:1] for batch in batches[:1])]:
        assert run is not None
        with torch.inference_mode():
            expected = network(batch).numpy()
        difference = float(np.maximum(difference, np.abs(run(batch.numpy()) - expected).max()))  # keeps nan
        largest = max(largest, float(np.abs(expected).max()))
    return Agreement(sum(map(len, batches)), difference, largest)


def _opened(network: nn.Module, file: Path) -> Run:
    if file.suffix != ".safetensors":
        return open_exported(file).run
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()  # so that all weights come from the file
    load_weights(copied, file)
    return network_run(copied)
