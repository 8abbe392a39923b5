"""Runtimes for latency measurements: eager PyTorch, torch.compile, and runtimes that networks are exported to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from autoslim.channels.inputs import Arguments
from autoslim.errors import UserError, first_line
from autoslim.resources.latency import runner
from autoslim.resources.latency.onnx_models import export_reason, write_model
from autoslim.resources.latency.table import Target
from autoslim.training.device import to_channels_last


@dataclass(frozen=True)
class Support:
    """What a runtime other than torch needs.

    Attributes:
        title: its name.
        extra: the extra of autoslim with its packages, if there is one.
        packages: modules that exporting to it and running it need.
        quantiser: further modules that int8 needs.
        device: the type of device that it is supported on.
        precisions: the values of ``latency.precision`` that it is supported with.
    """

    title: str
    extra: str
    packages: tuple[str, ...]
    quantiser: tuple[str, ...]
    device: str
    precisions: tuple[str, ...]


OTHER_RUNTIMES = {
    "onnxruntime": Support("ONNX Runtime", "onnx", ("onnx", "onnxscript", "onnxruntime"), (), "cpu", ("fp32", "int8")),
    "openvino": Support("OpenVINO", "openvino", ("onnx", "onnxscript", "openvino"), ("nncf",), "cpu", ("fp32", "int8")),
    "tensorrt": Support("TensorRT", "", ("onnx", "onnxscript", "tensorrt", "cuda"), (), "cuda", ("fp32",)),
}
"""Runtimes other than torch. TensorRT has not been tested, because no GPU was available."""

TORCH_PRECISIONS = ("fp32", "bf16")


def check_runtime(runtime: str, device: str, precision: str, channels_last: bool, *, packed: bool = False) -> None:
    """Checks that a runtime is installed and supports the settings.

    Args:
        packed: the runtime runs on another machine. Here, models are only exported and quantised.

    Raises:
        UserError: the runtime is not installed, or does not support the device, precision or memory format.
    """
    support = OTHER_RUNTIMES.get(runtime)
    if support is None:
        if precision not in TORCH_PRECISIONS:
            capable = [name for name, other in OTHER_RUNTIMES.items() if precision in other.precisions]
            raise UserError(
                f"latency.precision is {precision}, but {runtime} is supported only with "
                f"{' or '.join(TORCH_PRECISIONS)}; set latency.precision to one of these, or latency.runtime to "
                f"{' or '.join(capable)}"
            )
        return
    layout = str(channels_last).lower()
    for name, value, supported in (
        ("device", device, (support.device,)),
        ("precision", precision, support.precisions),
        ("channels_last", layout, ("false",)),
    ):
        if value not in supported:
            either = " or ".join(supported)
            raise UserError(
                f"latency.{name} is {value}, but {runtime} is supported only with {either}; "
                f"set latency.{name} to {either}, or latency.runtime to eager or compile"
            )
    needed = [*support.packages, *(support.quantiser if precision == "int8" else ())]
    if packed and precision != "int8":  # quantising needs the runtime
        needed = ["onnx", "onnxscript"]
    if missing := [name for name in needed if find_spec(name) is None]:
        extra = (
            f"pip install -e '.[{support.extra}]'" if support.extra else "pip install tensorrt cuda-python onnxscript"
        )
        raise UserError(
            f"latency.runtime is {runtime} and latency.precision {precision}, but {', '.join(missing)} cannot be "
            f"found; install them ({extra}), or set latency.runtime to eager or compile"
        )


def prepare_forward(network: nn.Module, values: Arguments | Sequence[Tensor], target: Target) -> Callable[[], object]:
    """Returns a function that runs ``network`` once on ``values`` (a sequence has one tensor for each positional
    argument) with the target's runtime.

    The network is put into evaluation mode and moved to the target's device, dtype and memory format.

    Raises:
        UserError: the runtime cannot run the network.
    """
    dtype = torch.bfloat16 if target.precision == "bf16" else torch.float32
    layout = torch.channels_last if target.channels_last else torch.contiguous_format

    def moved(value: Tensor) -> Tensor:
        value_dtype = dtype if value.is_floating_point() else value.dtype
        return value.to(
            target.device, value_dtype, memory_format=layout if value.dim() == 4 else torch.contiguous_format
        )

    network = network.eval().to(target.device, dtype)
    if target.channels_last:
        to_channels_last(network)
    inputs = (values if isinstance(values, Arguments) else Arguments.of(tuple(values))).map(moved)
    if target.runtime in OTHER_RUNTIMES:
        return _exported_forward(network, inputs, target)
    module = torch.compile(network) if target.runtime == "compile" else network

    def forward() -> object:
        with torch.inference_mode():
            return inputs.run(module)

    if target.runtime == "compile":
        torch.compiler.reset()  # otherwise many networks would exceed the limit of recompilations
    try:
        forward()
    except Exception as error:
        if target.runtime == "eager":
            raise UserError(
                f"torch cannot run this network on {target.device} in {target.precision} with batch {target.batch} "
                f"({first_line(error)}); change the latency section, or correct the network"
            ) from error
        raise UserError(
            f"torch.compile cannot run this network ({first_line(error)}); install a C++ compiler, "
            "or set latency.runtime to eager"
        ) from error
    return forward


def _exported_forward(network: nn.Module, inputs: Arguments, target: Target) -> Callable[[], object]:
    title = OTHER_RUNTIMES[target.runtime].title
    try:
        with TemporaryDirectory() as folder:
            network, values = network.cpu(), inputs.map(torch.Tensor.cpu)
            file = write_model(network, values, Path(folder, "network"), target.runtime, target.precision, share=False)
            model = runner.RUNTIMES[target.runtime](str(file), target.threads)
        if len(model.inputs) != len(values.tensors):
            raise ValueError(f"the model has {len(model.inputs)} inputs, and the network {len(values.tensors)}")
        run: Callable[[], object] = model.bind([value.numpy() for value in values.tensors])
        run()
    except OSError:
        raise  # such as a full disk
    except Exception as error:  # the exporter, the quantiser and the runtime raise their own exceptions
        raise UserError(
            f"{title} cannot run this network{' in int8' if target.precision == 'int8' else ''} "
            f"({export_reason(error)}); set latency.runtime to eager"
        ) from error
    return run
