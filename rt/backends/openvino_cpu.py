"""OpenVINO on the CPU: reads the ONNX graphs as they are, computes in bf16 where the processor can.

https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from rt.backends import native
from rt.backends.base import Array, Availability, Form, broken, buffers, failure
from rt.config import DType
from rt.extras import install_line
from rt.process import Calls, library
from rt.processors import lacks_avx2
from rt.shapes import TensorSpec

if TYPE_CHECKING:
    import openvino


class OpenVINO:
    """The CPU default."""

    name = "openvino"

    def available(self) -> Availability:
        """Whether the package is installed and loads, on a processor that it is fast on."""
        try:
            installed = version("openvino")
        except PackageNotFoundError:
            return Availability(version=None, problem="not installed; run: " + install_line(self.name))
        if lacks_avx2():  # and what it would run with less is not tested, nor fast
            problem = "this processor has no AVX2; use --backend onnxruntime, which runs on any"
            return Availability(version=installed, problem=problem)
        try:
            self._core  # noqa: B018  # loads the library
        except Exception as error:  # a missing system library, a package for another processor
            return broken(installed, error)
        return Availability(version=installed)

    def refuses(self, dtype: DType) -> str:
        """Nothing: each format is computed at its own precision or above."""
        return ""

    def arithmetic(self, dtype: DType) -> str:
        """bf16 for bf16 and int8 graphs where the processor has it, else f32 (x86 computes f16 slower than f32)."""
        wanted = dtype in (DType.BF16, DType.INT8)
        return "bf16" if wanted and "BF16" in self._capabilities else "f32"

    def forms(self, dtype: DType) -> tuple[Form, ...]:
        """Fused where our kernels are built, and compute what it computes."""
        fused = self.arithmetic(dtype) == "bf16" and native.kernels()
        return (Form.FUSED, Form.ONNX) if fused else (Form.ONNX,)

    def load(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
        threads: int,
    ) -> OpenVINOEngine:
        """Read and compile the graph."""
        options = {
            # The types in a graph decide, which keeps its islands; only an int8 graph leaves its floats to the engine.
            "INFERENCE_PRECISION_HINT": self.arithmetic(dtype) if dtype is DType.INT8 else "f32",
            "EXECUTION_MODE_HINT": "ACCURACY" if dtype is DType.FP32 else "PERFORMANCE",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            with library:
                model = self._core.compile_model(self._core.read_model(path), "CPU", options)
                return OpenVINOEngine(model, buffers(inputs), buffers(outputs))
        except RuntimeError as error:
            raise failure(f"openvino cannot load {path}", error, _last_line(error)) from error

    @cached_property
    def _core(self) -> openvino.Core:
        # Without its usage statistics, whose import starts a process and may use the network.
        telemetry = sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        try:
            import openvino
        finally:
            if telemetry is None:
                del sys.modules["openvino_telemetry"]
        core = openvino.Core()
        if native.kernels():
            core.add_extension(native.LIBRARY)
        return core

    @cached_property
    def _capabilities(self) -> list[str]:
        return list(self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")) if self.available() else []


class OpenVINOEngine:
    """A compiled model whose tensors share memory with our arrays."""

    def __init__(
        self, model: openvino.CompiledModel, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> None:
        import openvino

        self.inputs, self.outputs = inputs, outputs
        self._calls = Calls(self)
        self._request = model.create_infer_request()
        for name, array in (*inputs.items(), *outputs.items()):
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def enqueue(self) -> None:
        """Run once. `infer()` would build a dictionary of results each time; this does not."""
        try:
            with self._calls:
                try:
                    self._request.start_async()
                finally:  # Ctrl-C between the two would free arrays that are still being written
                    self._request.wait()
        except RuntimeError as error:
            raise failure("openvino failed while running", error, _last_line(error)) from error


def _last_line(error: Exception) -> str:
    """The part of OpenVINO's multi-line messages that says what is wrong."""
    return (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
