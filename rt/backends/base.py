"""The seam between the runtime and whatever executes a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rt.config import DType
from rt.cuda import Device, DeviceArray, Stream
from rt.cuda.memory import side_by_side
from rt.errors import BackendError
from rt.shapes import TensorSpec

Array = NDArray[Any]


class Form(str, Enum):
    """What a program is kept as in a bundle; a backend runs some of them."""

    ONNX = "onnx"
    """A graph of standard operators: every backend that reads ONNX runs it."""
    FUSED = "fused.onnx"
    """The same with the operators `rt::…`, for a backend that has kernels for them."""
    TENSORRT = "tensorrt.plan"
    """TensorRT's serialized engine, weights and kernels inside; good for its version and the GPUs it was built for."""
    TENSORRT_RTX = "tensorrt-rtx.plan"
    """The same of TensorRT for RTX, which finishes it for the GPU when it loads."""
    INDUCTOR = "inductor.pt2"
    """AOTInductor's package for a GPU: host code and kernels, without weights; good for its version of torch."""
    INDUCTOR_CPU = "inductor-cpu.pt2"
    """The same for a processor with the instructions that it was compiled for."""

    @property
    def holds_weights(self) -> bool:
        """Whether it is complete; other forms refer to the weights of their component."""
        return self in (Form.TENSORRT, Form.TENSORRT_RTX)

    @property
    def is_compiled(self) -> bool:
        """Whether it is for one release of its library, and for machines like that of the build."""
        return self not in (Form.ONNX, Form.FUSED)


class Engine(Protocol):
    """A loaded program with its buffers.

    `inputs` and `outputs` map names to arrays that the engine owns and that keep their address for its
    life: write into the inputs in place, call `enqueue`, read the outputs before the next `enqueue`.
    """

    @property
    def inputs(self) -> Mapping[str, Array]:
        """By name."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """By name."""

    def enqueue(self) -> None:
        """Run the program once; on a CPU the outputs are ready on return."""


class DeviceEngine(Protocol):
    """A loaded program whose buffers are memory of a device, and keep their address for its life; see `OwnGraph`."""

    @property
    def inputs(self) -> Mapping[str, DeviceArray]:
        """By name."""

    @property
    def outputs(self) -> Mapping[str, DeviceArray]:
        """By name."""

    def enqueue(self, stream: Stream) -> None:
        """Run the program once in the order of `stream`, without waiting.

        The first call may allocate and choose kernels. From the second on it does neither and never waits for the
        device, so that it can be captured into a graph.
        """

    def close(self) -> None:
        """Give its memory back, once nothing that uses it is under way."""


class OwnGraph:
    """Base of engines of a device that launch a graph of their own, which CUDA refuses in a stream that is captured.

    Neither do they allocate or wait from the second call on. Whoever captures enqueues them between graphs instead.
    """


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether a backend can be used here: its version, or the reason why not and what would help.

    Attributes:
        version: Of the library, None where it is not installed or does not load.
        problem: Why nothing runs here. With a version it is the device that is missing: plans can still be built.
    """

    version: str | None
    problem: str = ""

    def __bool__(self) -> bool:
        return not self.problem


def broken(version: str, error: Exception) -> Availability:
    """Of a library that is installed and cannot be imported."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return Availability(version=None, problem=f"{version} is installed but does not load: {reason[-1]}")


class Backend(Protocol):
    """A library that runs graphs. Instances hold no state but caches."""

    name: str
    """Also the name of the extra that installs it."""

    def available(self) -> Availability:
        """Whether it can be used here; never raises."""

    def refuses(self, dtype: DType) -> str:
        """Why it cannot run graphs of this format, or "" when it can."""

    def arithmetic(self, dtype: DType) -> str:
        """The format of its floats for graphs of `dtype`: f32, bf16 or f16, as its library names it."""

    def forms(self, dtype: DType) -> tuple[Form, ...]:
        """What it can load here of a program in `dtype`, the fastest first."""

    def load(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
        threads: int,
    ) -> Engine:
        """Load one of its forms and bind a buffer to each of its inputs and outputs.

        Raises:
            BackendError: When the library refuses the file.
        """


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose engines live on a device; `load` gives the same engines seen from the host."""

    def open_device(self) -> Device:
        """The device that its engines run on.

        Raises:
            BackendUnavailableError: There is none.
        """

    def load_on(
        self,
        device: Device,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
    ) -> DeviceEngine:
        """Load a graph, and bind memory of `device` to each of its inputs and outputs.

        Raises:
            BackendError: When the library refuses the file.
        """


_OUT_OF_MEMORY = (
    "bad_alloc",  # C++
    "can't alloc",  # torch on a processor
    "allocate memory",  # ONNX Runtime
    "alloc_failed",  # cuBLAS and cuDNN
    "out of memory",  # torch on a GPU, CUDA
    "outofmemory",  # TensorRT
)


def failure(what: str, error: Exception, reason: str) -> Exception:
    """A library's error as one of ours: MemoryError where memory ran out, whatever the library calls it."""
    said = str(error).lower()
    if any(sign in said for sign in _OUT_OF_MEMORY):
        return MemoryError(what)
    return BackendError(f"{what}: {reason}")


def buffers(specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """One array of zeros a tensor, allocated once for the life of an engine."""
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}


def device_buffers(device: Device, specs: Sequence[TensorSpec], undo: ExitStack) -> dict[str, DeviceArray]:
    """One array a tensor in the memory of `device`, all in one allocation, which `undo` gives back.

    They start at multiples of 256 bytes, as if each had been allocated, and mostly follow each other without a gap, so
    that the loop fills all time features of a U-Net in one launch.
    """
    wanted = {spec.name: (spec.shape, spec.dtype) for spec in specs}
    block, arrays = side_by_side(device, wanted, alignment=256)
    undo.callback(device.free, block)
    return arrays
