"""The runtimes that latency is measured in: torch as it is, compiled by torch, and ONNX Runtime."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from autoslim.errors import UserError, first_line
from autoslim.resources.latency.table import Target

_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def check_runtime(runtime: str, device: str, precision: str, channels_last: bool) -> None:
    """Raises:
    UserError: the runtime is not installed, or does not go with the device, the precision or the layout here.
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
    for name, value, only in (
        ("device", device, "cpu"),
        ("precision", precision, "fp32"),
        ("channels_last", layout, "false"),
    ):
        if value != only:
            raise UserError(
                f"latency.{name} is {value}, but onnxruntime is supported with {only} alone; "
                f"set latency.{name} to {only}, or latency.runtime to eager or compile"
            )


def prepared(network: nn.Module, values: Sequence[Tensor], target: Target) -> Callable[[], object]:
    """A function that runs ``network`` (changed: moved to the device) once on ``values``, on the target's runtime.

    Raises:
        UserError: the runtime cannot run it.
    """
    dtype = torch.bfloat16 if target.precision == "bf16" else torch.float32
    layout = torch.channels_last if target.channels_last else torch.contiguous_format

    def moved(value: Tensor) -> Tensor:
        wanted = dtype if value.is_floating_point() else value.dtype
        return value.to(target.device, wanted, memory_format=layout if value.dim() == 4 else torch.contiguous_format)

    network = network.eval().to(target.device, dtype).to(memory_format=layout)
    inputs = [moved(value) for value in values]
    if target.runtime == "onnxruntime":
        return _in_onnxruntime(network, inputs, target.threads)
    run = torch.compile(network) if target.runtime == "compile" else network

    def once() -> object:
        with torch.inference_mode():
            return run(*inputs)

    if target.runtime == "compile":
        torch.compiler.reset()  # every network is another one: the limit of recompilations is not for these
    try:
        once()
    except Exception as error:
        if target.runtime == "eager":
            raise UserError(
                f"torch cannot run this network here in {target.precision}, batch {target.batch} "
                f"({first_line(error)}); change the section latency, or mend the network"
            ) from error
        raise UserError(
            f"torch.compile cannot run this network here ({first_line(error)}); install a C++ compiler, "
            "or set latency.runtime to eager"
        ) from error
    return once


def _in_onnxruntime(network: nn.Module, inputs: Sequence[Tensor], threads: int) -> Callable[[], object]:
    import onnxruntime

    try:
        with _silence():
            program = torch.onnx.export(network, tuple(inputs), dynamo=True, verbose=False)
        assert program is not None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        fed = {given.name: value.numpy() for given, value in zip(session.get_inputs(), inputs, strict=True)}
        session.run(None, fed)
    except Exception as error:  # the exporter's and the runtime's own kinds
        # The exporter's own message is a banner; what it failed on is the cause.
        reason = _COLOURS.sub("", first_line(error.__cause__ or error))
        raise UserError(f"ONNX Runtime cannot run this network ({reason}); set latency.runtime to eager") from error
    return lambda: session.run(None, fed)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the exporter's report of each step."""
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
