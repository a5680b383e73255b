"""ONNX Runtime on the CPU: exact in fp32, the reference for every other engine.

https://onnxruntime.ai/docs/api/python/api_summary.html
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rt.backends.base import Array, Availability, Form, broken, buffers
from rt.backends.ort import Memory, Session, imported
from rt.config import DType
from rt.extras import install_line
from rt.process import Calls
from rt.shapes import TensorSpec


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
                imported()
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
        session = Session(path, ("CPUExecutionProvider", {}), threads=threads)
        return OnnxRuntimeEngine(session, buffers(inputs), buffers(outputs))


class OnnxRuntimeEngine:
    """A session with its inputs and outputs bound to our arrays."""

    def __init__(self, session: Session, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._calls = Calls(self)
        self._session = session
        session.bind("cpu", _memory(inputs), _memory(outputs))

    def enqueue(self) -> None:
        """Run once."""
        with self._calls:
            self._session.run()


def _memory(arrays: dict[str, Array]) -> dict[str, Memory]:
    return {name: Memory(array.dtype.type, array.shape, array.ctypes.data) for name, array in arrays.items()}
