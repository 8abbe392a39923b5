"""Writes networks as MLflow models, which need neither autoslim nor the network's code."""

from __future__ import annotations

import copy
import io
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoslim.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autoslim.data.prepared import DataInfo


def save_network(network: nn.Module, example: Any, info: DataInfo, folder: Path, classifies: bool) -> None:
    """Writes ``network`` as an MLflow model of two flavors, for the CPU.

    Without ``info.mean`` or the classes, or if it does not classify, the model has the second flavor only.

    ``python_function`` classifies image files with the code that is copied into the model. ``pytorch`` is the network
    alone, a graph of torch operators in evaluation mode: a pickled network could only be loaded with the code of its
    class.

    Raises:
        UserError: the network has several inputs.
    """
    import mlflow.pyfunc
    import pandas as pd
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Map

    from autoslim.export.formats import description
    from autoslim.export.served import PACKAGE, copy_code

    if not isinstance(example, torch.Tensor):
        raise UserError(f"a logged model needs a single input tensor, but the inputs are a {type(example).__name__}")
    requirements = [f"{name}=={version(name)}" for name in ("torch", "numpy", "pandas", "pillow")]
    requirements = [requirement.partition("+")[0] for requirement in requirements]  # of CPU-only torch
    if not (classifies and info.mean and info.classes):  # data of the user's own are not image files
        _save_graph(network, example, folder, requirements)
        return
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch, "plain")
        _save_graph(network, example, plain, requirements)
        (plain / "data" / "autoslim.json").write_text(json.dumps(description(info)), encoding="utf-8")
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=f"{PACKAGE}.served",
            data_path=str(plain / "data"),
            code_paths=[str(copy_code(Path(scratch)))],
            signature=ModelSignature(
                Schema([ColSpec(DataType.binary, "image")]),
                Schema(
                    [
                        ColSpec(DataType.string, "class"),
                        ColSpec(DataType.double, "probability"),
                        ColSpec(Map(DataType.double), "probabilities"),
                    ]
                ),
                ParamSchema([ParamSpec("top", DataType.long, 5)]),
            ),
            input_example=pd.DataFrame({"image": [_png(example[0], info)]}),
            pip_requirements=requirements,  # set, so that MLflow does not infer them
        )
        model, graph = Model.load(str(folder)), Model.load(str(plain)).flavors["pytorch"]
        model.add_flavor("pytorch", **{**graph, "model_data": model.flavors["python_function"]["data"], "code": "code"})
        model.save(str(folder / "MLmodel"))


def _save_graph(network: nn.Module, example: Tensor, folder: Path, requirements: list[str]) -> None:
    """Writes ``network`` as an MLflow model of the flavor ``pytorch``, in float32 and for any batch size."""
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    plain = copy.deepcopy(network).to("cpu", torch.float32).to(memory_format=torch.contiguous_format).eval()
    # Two images: torch.export treats a size of one as a constant.
    images = (example[:2] if len(example) > 1 else torch.cat([example, example])).detach().to("cpu", torch.float32)
    # Only the signature of the input makes the batch size dynamic.
    signature = ModelSignature(Schema([TensorSpec(np.dtype(np.float32), (-1, *images.shape[1:]))]))
    mlflow.pytorch.save_model(
        plain,
        str(folder),
        serialization_format="pt2",
        signature=signature,
        input_example=images.contiguous().numpy(),
        pip_requirements=requirements,
    )
    model = Model.load(str(folder))
    # An exported graph cannot change its device. Without this setting MLflow would try to move it to CUDA, and fail.
    model.flavors["python_function"]["config"] = {"device": "cpu"}
    model.save(str(folder / "MLmodel"))


def _png(image: Tensor, info: DataInfo) -> bytes:
    """Returns a normalised image (C, H, W) as the contents of a PNG file."""
    import numpy as np
    from PIL import Image

    mean, std = (np.array(values)[:, None, None] for values in (info.mean, info.std))
    pixels = np.rint((image.detach().cpu().numpy() * std + mean) * 255).clip(0, 255).astype(np.uint8)  # (C, H, W)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()
