"""Runtimes for latency measurements: eager PyTorch, torch.compile and ONNX Runtime."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from autoslim.channels.inputs import Arguments
from autoslim.errors import UserError, first_line
from autoslim.resources.latency.table import Target
from autoslim.training.device import to_channels_last

_ANSI_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def check_runtime(runtime: str, device: str, precision: str, channels_last: bool) -> None:
    """Checks that a runtime is installed and supports the settings.

    Raises:
        UserError: the runtime is not installed, or does not support the device, precision or memory format.
    """
    if runtime != "onnxruntime":
        return
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"latency.runtime is onnxruntime, but {', '.join(missing)} cannot be found; "
            "install them (pip install -e '.[onnx]'), or set latency.runtime to eager or compile"
        )
    layout = str(channels_last).lower()
    for name, value, supported in (
        ("device", device, "cpu"),
        ("precision", precision, "fp32"),
        ("channels_last", layout, "false"),
    ):
        if value != supported:
            raise UserError(
                f"latency.{name} is {value}, but onnxruntime is supported only with {supported}; "
                f"set latency.{name} to {supported}, or latency.runtime to eager or compile"
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
    if target.runtime == "onnxruntime":
        return _onnxruntime_forward(network, inputs, target.threads)
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


def _onnxruntime_forward(network: nn.Module, inputs: Arguments, threads: int) -> Callable[[], object]:
    import onnxruntime

    try:
        with without_output():
            program = torch.onnx.export(network, inputs.args, kwargs=inputs.kwargs, dynamo=True, verbose=False)
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        feed = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), inputs.tensors, strict=True)}
        session.run(None, feed)
    except Exception as error:  # the exporter and the runtime raise their own exceptions
        # The exporter's message is a banner; the reason is in the cause.
        reason = _ANSI_COLOURS.sub("", first_line(error.__cause__ or error))
        raise UserError(f"ONNX Runtime cannot run this network ({reason}); set latency.runtime to eager") from error
    return lambda: session.run(None, feed)


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
