"""The runtimes that latency is measured in: torch as it is, compiled by torch, and ONNX Runtime."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from autoslim.algorithms.latency import Target
from autoslim.vocabulary.errors import UserError, first_line


def check_runtime(runtime: str, device: str, precision: str) -> None:
    """Raises:
    UserError: the runtime is not installed, or does not go with the device or the precision here.
    """
    if runtime != "onnxruntime":
        return
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"latency.runtime is onnxruntime, but {', '.join(missing)} cannot be found; "
            "install them (pip install 'autoslim[onnx]'), or set latency.runtime to eager or compile"
        )
    for name, value, only in (("device", device, "cpu"), ("precision", precision, "fp32")):
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
        return value.to(target.device, dtype, memory_format=layout if value.dim() == 4 else torch.contiguous_format)

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
    except Exception as error:  # the exporter's and the runtime's own kinds
        raise UserError(
            f"ONNX Runtime cannot run this network ({first_line(error)}); set latency.runtime to eager"
        ) from error
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
