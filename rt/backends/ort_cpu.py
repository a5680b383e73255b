"""ONNX Runtime on the CPU: exact in fp32, the reference for every other engine.

https://onnxruntime.ai/docs/api/python/api_summary.html
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rt.backends.base import Array, Availability, Form, broken, buffers, failure
from rt.config import DType
from rt.extras import install_line
from rt.process import Calls, library
from rt.shapes import TensorSpec

if TYPE_CHECKING:
    import onnxruntime


class OnnxRuntime:
    """The reference."""

    name = "onnxruntime"

    def available(self) -> Availability:
        """Whether one of the packages that carry `import onnxruntime` is installed, and loads."""
        for package in ("onnxruntime", "onnxruntime-gpu"):
            try:
                installed = version(package)
            except PackageNotFoundError:
                continue
            try:
                _import()
            except Exception as error:  # a missing system library, a package for another processor
                return broken(installed, error)
            return Availability(version=installed)
        return Availability(version=None, problem="not installed; run: " + install_line(self.name))

    def refuses(self, dtype: DType) -> str:
        """bf16: its CPU kernels have no convolution for it."""
        if dtype is not DType.BF16:
            return ""
        return "its CPU kernels do not compute bf16; use --backend openvino or rebuild with --fp16 or --dtype fp32"

    def arithmetic(self, dtype: DType) -> str:
        """The format of the graph's floats, which in an int8 graph is f32."""
        return "f16" if dtype in (DType.FP16, DType.FP8) else "f32"

    def forms(self, dtype: DType) -> tuple[Form, ...]:
        """Plain graphs: it would inline fused operators."""
        return (Form.ONNX,)

    def load(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
        threads: int,
    ) -> OnnxRuntimeEngine:
        """Create a session."""
        onnxruntime = _import()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # fatal only: it raises what it would log
        try:
            with library:
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class but Exception
            raise failure(f"onnxruntime cannot load {path}", error, _one_line(error)) from error
        return OnnxRuntimeEngine(session, buffers(inputs), buffers(outputs))


class OnnxRuntimeEngine:
    """A session with its inputs and outputs bound to our arrays."""

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: dict[str, Array], outputs: dict[str, Array]
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._calls = Calls(self)
        self._session = session
        self._binding = session.io_binding()
        for bind, arrays in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def enqueue(self) -> None:
        """Run once."""
        with self._calls:
            try:
                self._session.run_with_iobinding(self._binding)
            except Exception as error:
                raise failure("onnxruntime failed while running", error, _one_line(error)) from error


def _import() -> Any:
    """The library, without its usage statistics: they use the network, and their threads keep a forked child alive.

    https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_module("onnxruntime")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
