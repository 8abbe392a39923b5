"""Measures the models of a latency pack. Needs numpy and the pack's runtime only.

`autoslim latency pack` copies this file into the pack. Run it there, on the machine that will run the network:

    python measure.py

It writes results.json, which `autoslim latency read` turns into a latency table. An interrupted run continues where it
stopped. Leave the machine otherwise idle in the meantime.
"""

from __future__ import annotations  # for versions of Python that autoslim itself does not support

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np

FORMAT = 1
"""Format of packs and results."""

PLAN = "plan.json"
RESULTS = "results.json"
ROUNDS = 3
"""Every model is measured once in each round, so that a disturbance affects one of its measurements only."""

SECONDS = {"kernels": 0.02, "networks": 0.2}
"""Time for a measurement of a model in a round."""

BLOCK_SECONDS = 0.001
MIN_BLOCKS = 5
WARM_UP = 5
SAVE_SECONDS = 10.0


class OnnxRuntime:
    """An ONNX model (a file or its contents), opened with ONNX Runtime on the CPU.

    Attributes:
        inputs: name, shape and dtype of each input.
    """

    def __init__(self, model: str | bytes, threads: int) -> None:
        self._session = onnxruntime_session(model, threads)
        self.inputs = [(spec.name, tuple(spec.shape), _ONNX_DTYPES[spec.type]) for spec in self._session.get_inputs()]

    def bind(self, values: list[np.ndarray]) -> Callable[[], list[np.ndarray]]:
        """Returns a function that runs the model on ``values`` and returns its outputs."""
        feed = {name: value for (name, _, _), value in zip(self.inputs, values)}  # noqa: B905 (Python 3.9)
        return lambda: self._session.run(None, feed)


def onnxruntime_session(model: str | bytes, threads: int | None = None) -> Any:
    """Returns a session of ONNX Runtime on the CPU. By default, the runtime chooses the number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OpenVino:
    """An ONNX or OpenVINO (.xml) model, opened with OpenVINO on the CPU. For methods, see ``OnnxRuntime``."""

    def __init__(self, model: str | bytes, threads: int) -> None:
        import openvino

        compiled = openvino_model(openvino.Core().read_model(model), threads)
        self.inputs = [(port.any_name, tuple(port.shape), port.element_type.to_dtype()) for port in compiled.inputs]
        self._request = compiled.create_infer_request()

    def bind(self, values: list[np.ndarray]) -> Callable[[], list[np.ndarray]]:
        import openvino

        for index, value in enumerate(values):
            self._request.set_input_tensor(index, openvino.Tensor(np.ascontiguousarray(value)))
        return lambda: list(self._request.infer(share_outputs=True).values())


def openvino_model(model: Any, threads: int | None = None) -> Any:
    """Compiles a model for the CPU. By default, OpenVINO chooses the number of threads."""
    import openvino

    # By default, OpenVINO computes in bf16 or fp16 on processors that support it.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    return openvino.Core().compile_model(model, "CPU", settings)


class TensorRt:
    """An ONNX model file, opened with TensorRT on the first CUDA device. For methods, see ``OnnxRuntime``.

    It has not been tested, because no GPU was available.
    """

    def __init__(self, model: str, threads: int) -> None:
        import tensorrt

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        network = builder.create_network(0)
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse_from_file(model):
            raise ValueError("; ".join(str(parser.get_error(index)) for index in range(parser.num_errors)))
        engine = builder.build_serialized_network(network, builder.create_builder_config())
        self._engine = tensorrt.Runtime(logger).deserialize_cuda_engine(engine)
        self._context = self._engine.create_execution_context()
        tensors = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        specs = [
            (name, tuple(self._engine.get_tensor_shape(name)), tensorrt.nptype(self._engine.get_tensor_dtype(name)))
            for name in tensors
        ]
        is_input = [self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT for name in tensors]
        self.inputs = [(name, shape, np.dtype(kind)) for (name, shape, kind), of in zip(specs, is_input) if of]  # noqa: B905
        self._outputs = [spec for spec, of in zip(specs, is_input) if not of]  # noqa: B905

    def bind(self, values: list[np.ndarray]) -> Callable[[], list[np.ndarray]]:
        from cuda.bindings import runtime as cuda

        def checked(result: Any) -> Any:
            if result[0] != cuda.cudaError_t.cudaSuccess:
                raise RuntimeError(str(result[0]))
            return result[1] if len(result) > 1 else None

        arrays = [np.ascontiguousarray(value) for value in values]
        outputs = [np.empty(shape, kind) for _, shape, kind in self._outputs]
        names = [name for name, *_ in (*self.inputs, *self._outputs)]
        pointers = [checked(cuda.cudaMalloc(max(1, array.nbytes))) for array in (*arrays, *outputs)]
        for name, pointer in zip(names, pointers):  # noqa: B905
            self._context.set_tensor_address(name, pointer)
        kinds = cuda.cudaMemcpyKind
        for array, pointer in zip(arrays, pointers):  # noqa: B905
            checked(cuda.cudaMemcpy(pointer, array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice))
        stream = checked(cuda.cudaStreamCreate())

        def run() -> list[np.ndarray]:
            self._context.execute_async_v3(stream)
            checked(cuda.cudaStreamSynchronize(stream))
            return outputs

        run()
        for array, pointer in zip(outputs, pointers[len(arrays) :]):  # noqa: B905
            checked(cuda.cudaMemcpy(array.ctypes.data, pointer, array.nbytes, kinds.cudaMemcpyDeviceToHost))
        finalize(self, _free, pointers)
        return run


def _free(pointers: list[int]) -> None:
    from cuda.bindings import runtime as cuda

    for pointer in pointers:
        cuda.cudaFree(pointer)


RUNTIMES: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "tensorrt": TensorRt}

_ONNX_DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}


def version(runtime: str) -> str:
    """Returns the name and the version of a runtime."""
    return f"{runtime} {str(__import__(runtime).__version__).partition('-')[0]}"


def machine(runtime: str) -> str:
    """Returns the name of the processor or GPU on which a runtime runs."""
    if runtime != "tensorrt":
        return processor()
    from cuda.bindings import runtime as cuda

    _, properties = cuda.cudaGetDeviceProperties(0)
    return str(properties.name.decode())


def processor() -> str:
    """Returns the name of this machine's processor."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model"))]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def time_blocks(run: Callable[[], Any], seconds: float) -> list[float]:
    """Runs a function for ``seconds`` after a warm-up, and returns the milliseconds of a run in each block of runs."""
    for _ in range(WARM_UP):
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
    count = max(1, round(BLOCK_SECONDS / max(once, 1e-7)))
    end = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < MIN_BLOCKS or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(count):
            run()
        times.append(1e3 * (time.perf_counter() - start) / count)
    return times


def measure_file(file: Path, runtime: str, threads: int, seconds: float) -> float:
    """Returns the median milliseconds of a model, whose inputs are ones."""
    model = RUNTIMES[runtime](str(file), threads)
    run = model.bind([np.ones(shape, dtype) for _, shape, dtype in model.inputs])
    return statistics.median(time_blocks(run, seconds))


def measure_pack(folder: Path, results: Path, runtime: str | None = None, threads: int | None = None) -> None:
    """Measures all models of a pack in rounds, and writes the results, which contain the plan of the pack.

    Args:
        folder: the pack.
        results: file for the results. If it exists, the measurement continues from it.
        runtime: one of the pack's runtimes; by default its first.
        threads: number of threads; by default that of the pack.

    Raises:
        SystemExit: the pack or the results cannot be used.
    """
    plan = _read(folder / PLAN, "run this script in a folder that `autoslim latency pack` wrote")
    if plan.get("format") != FORMAT:
        raise SystemExit(f"{folder / PLAN} has format {plan.get('format')}, not {FORMAT}; use the pack's own script")
    runtime = runtime or plan["runtimes"][0]
    if runtime not in plan["runtimes"]:
        raise SystemExit(f"this pack is for {' and '.join(plan['runtimes'])}, not for {runtime}; write another one")
    try:
        versions = version(runtime)
    except ImportError as error:
        raise SystemExit(f"{runtime} cannot be imported ({error}); run pip install {runtime} numpy") from error
    threads = threads or int(plan["threads"])
    target = {"machine": machine(runtime), "runtime": runtime, "threads": threads, "versions": versions}
    values: dict[str, Any] = {"format": FORMAT, "target": target, "plan": plan, "ms": {}}
    if results.exists():
        found = _read(results, "delete it, or choose another file with --to")
        if any(found.get(name) != values[name] for name in ("format", "target", "plan")):
            raise SystemExit(f"{results} belongs to another pack, machine or setting; choose another file with --to")
        values["ms"] = found["ms"]
    ms: dict[str, list[float]] = values["ms"]
    jobs = [
        (number, name, SECONDS[kind])
        for number in range(ROUNDS)
        for kind in ("kernels", "networks")
        for name in plan["files"][kind]
        if len(ms.get(name, ())) <= number
    ]
    order = random.Random(0)
    jobs.sort(key=lambda job: (job[0], order.random()))  # disturbances affect networks and kernels alike
    total, first = ROUNDS * sum(map(len, plan["files"].values())), time.perf_counter()
    done = total - len(jobs)
    if done:
        print(f"latency: continuing at measurement {done} of {total}", file=sys.stderr, flush=True)
    saved = first
    for index, (_, name, seconds) in enumerate(jobs):
        try:
            found_ms = measure_file(folder / name, runtime, threads, seconds)
        except Exception as error:  # runtimes raise their own exceptions
            _write(results, values)
            raise SystemExit(f"{runtime} cannot run {folder / name} ({error})") from error
        ms.setdefault(name, []).append(found_ms)
        if time.perf_counter() - saved > SAVE_SECONDS:
            _write(results, values)
            saved = time.perf_counter()
            left = (saved - first) / (index + 1) * (len(jobs) - index - 1)
            state = f"{done + index + 1}/{total} measurements, {_minutes(left)} left"
            print(f"latency: {state}", file=sys.stderr, flush=True)
    _write(results, values)
    took = _minutes(time.perf_counter() - first)
    print(f"latency: {total}/{total} measurements, took {took}", file=sys.stderr, flush=True)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _read(path: Path, remedy: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); {remedy}") from error
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the models of this latency pack.")
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), help="default: the first one of the pack")
    parser.add_argument("--threads", type=int, help="number of threads; default: that of the pack")
    parser.add_argument("--to", type=Path, default=Path(RESULTS), help=f"file for the results; default: {RESULTS}")
    arguments = parser.parse_args()
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads is {arguments.threads}; choose 1 or more")
    measure_pack(Path(__file__).resolve().parent, arguments.to, arguments.runtime, arguments.threads)
    print(f"wrote {arguments.to}; make the table with: autoslim latency read {arguments.to} --to FILE.json")


if __name__ == "__main__":
    main()
