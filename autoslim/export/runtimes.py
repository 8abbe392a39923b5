"""Opens exported files, each with the runtime of its format, without the network's code."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from autoslim.errors import UserError, first_line
from autoslim.export.archive_check import check_archive
from autoslim.resources.latency.runner import onnxruntime_session, openvino_model

ABOUT = "autoslim"
"""The key of the description (JSON) in a file's metadata. In ``.pt2`` it is the extra file ``autoslim.json``."""

Run = Callable[[np.ndarray], np.ndarray]
"""Computes the network's output from normalised float32 images (N, C, H, W)."""

EXTRAS = {".onnx": ("onnx", ("onnx", "onnxscript", "onnxruntime")), ".xml": ("openvino", ("openvino", "onnxscript"))}
"""Suffix -> optional extra of autoslim, and the packages of it that are needed."""


@dataclass(frozen=True)
class Exported:
    """An opened file: its description (see ``formats.description``), and its network."""

    about: Mapping[str, Any]
    run: Run


def check_installed(suffix: str, *packages: str) -> None:
    """Checks that the packages for a format, and further ``packages`` of the same extra, are installed.

    Raises:
        UserError: one of them is not. The message names the extra.
    """
    extra, needed = EXTRAS.get(suffix, ("", ()))
    if missing := [name for name in (*needed, *packages) if find_spec(name) is None]:
        raise UserError(
            f"{suffix} files need {', '.join(missing)}, which cannot be found; install autoslim with its extra {extra} "
            f"(pip install -e '.[{extra}]' in a clone), or use .pt2"
        )


def open_exported(file: Path, threads: int | None = None) -> Exported:
    """Opens a file that ``autoslim export`` wrote, on the CPU.

    Args:
        threads: number of threads of ONNX Runtime and OpenVINO. By default, they choose. torch has a global number.

    Raises:
        UserError: the file is missing or damaged, another program wrote it, or its runtime is not installed.
    """
    if file.suffix not in RUNTIMES:
        raise UserError(f"{file} cannot be run; use a file that ends in {' or '.join(RUNTIMES)}")
    check_installed(file.suffix)
    if not file.is_file():
        raise UserError(f"{file} does not exist; write it with `autoslim export`")
    try:
        text, run = RUNTIMES[file.suffix](file, threads)
    except Exception as error:  # runtimes raise their own exceptions
        raise UserError(f"{file} cannot be opened ({first_line(error)}); export the network again") from error
    try:
        about = json.loads(text)
        if not {"input", "classes"} <= about.keys():
            raise ValueError("it lacks the input or the classes")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{file} has no description of its input and classes ({first_line(error)}); use a file that "
            "`autoslim export` wrote"
        ) from error
    return Exported(about, run)


def network_run(network: Callable[..., Any]) -> Run:
    """Returns a function that runs a torch network on the CPU."""
    import torch

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            output: np.ndarray = network(torch.from_numpy(images)).numpy()
        return output

    return run


def _open_pt2(file: Path, threads: int | None) -> tuple[str, Run]:
    import torch

    check_archive(file)
    extra = {f"{ABOUT}.json": ""}
    network = torch.export.load(file, extra_files=extra).module()
    return extra[f"{ABOUT}.json"], network_run(network)


def _open_onnx(file: Path, threads: int | None) -> tuple[str, Run]:
    session = onnxruntime_session(file.read_bytes(), threads)
    [spec] = session.get_inputs()
    text = session.get_modelmeta().custom_metadata_map.get(ABOUT, "")

    def run(images: np.ndarray) -> np.ndarray:
        output: np.ndarray = session.run(None, {spec.name: images})[0]
        return output

    return text, run


def _open_openvino(file: Path, threads: int | None) -> tuple[str, Run]:
    import openvino

    model = openvino.Core().read_model(file)
    compiled = openvino_model(model, threads)
    text = model.get_rt_info([ABOUT]).value if model.has_rt_info([ABOUT]) else ""

    def run(images: np.ndarray) -> np.ndarray:
        return np.array(compiled(images)[0])

    return text, run


RUNTIMES: dict[str, Callable[[Path, int | None], tuple[str, Run]]] = {
    ".pt2": _open_pt2,
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
}
"""Suffix -> function that returns a file's description and its network."""
