"""TensorRT in both flavours: classic, which tunes for one GPU, and for RTX, which builds on any machine.

https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/

A plan holds its weights and kernels, those of our plugins, too. Engines keep nothing on the device but these and their
own inputs and outputs: what they need while they run, they need one after the other, so they share one block.
"""

from __future__ import annotations

import importlib
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from rt.backends.base import Availability, Form, broken, device_buffers, failure
from rt.backends.views import Alone, HostSide
from rt.config import DType
from rt.cuda import Device, DeviceArray, Stream
from rt.cuda.driver import CudaDevice
from rt.cuda.probe import gpu_problem
from rt.errors import BackendError, BackendUnavailableError
from rt.extras import install_line
from rt.shapes import TensorSpec

logger = logging.getLogger(__name__)

_ARITHMETIC = {DType.FP32: "f32", DType.FP16: "f16", DType.BF16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One of the two libraries, whose Python modules have the same names in them.

    Attributes:
        name: Of the backend, and of the extra that installs it.
        module: What to import.
        packages: Distributions that bring the module, any one of them.
        oldest: The first version whose names are those used here.
        form: What it runs.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    oldest: tuple[int, int]
    form: Form


CLASSIC = Flavour(
    name="tensorrt",
    module="tensorrt",
    packages=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    oldest=(10, 9),  # plugins whose kernels are compiled ahead of time
    form=Form.TENSORRT,
)
RTX = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    packages=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    oldest=(1, 7),
    form=Form.TENSORRT_RTX,
)


class TensorRT:
    """One flavour as a backend."""

    def __init__(self, flavour: Flavour, open_device: Callable[[], Device] = CudaDevice) -> None:
        self.flavour = flavour
        self.name = flavour.name
        self._open_device = open_device
        # An entry lives as long as an engine that uses it; with weak keys it would be its own reason to live.
        self._scratch: weakref.WeakValueDictionary[Device, Scratch] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def available(self) -> Availability:
        """Whether the library is installed and loads, and whether there is a GPU to run on."""
        installed = next(filter(None, map(_version, self.flavour.packages)), None)
        if installed is None:
            return Availability(version=None, problem="not installed; run: " + install_line(self.name))
        if _numbers(installed) < self.flavour.oldest:
            oldest = ".".join(map(str, self.flavour.oldest))
            return Availability(
                version=None,
                problem=f"{installed} is too old, rt needs {oldest}; run: {install_line(self.name)}",
            )
        try:
            library(self.flavour)
        except Exception as error:  # a missing system library, a placeholder package without the libraries
            return broken(installed, error)
        return Availability(version=installed, problem=gpu_problem())

    def refuses(self, dtype: DType) -> str:
        """int8: TensorRT's has no zero points, and our activations have; and fp8, for which no plan has been built."""
        if dtype in _ARITHMETIC:
            return ""
        why = "its int8 has no zero points" if dtype is DType.INT8 else "rt builds no fp8 plans yet"
        return f"{why}; use --fp16 or --bf16, or --backend openvino"

    def arithmetic(self, dtype: DType) -> str:
        """The format of the graph: networks are strongly typed, and TF32 is off."""
        return _ARITHMETIC.get(dtype, "f16")

    def forms(self, dtype: DType) -> tuple[Form, ...]:
        """Plans of the flavour."""
        return (self.flavour.form,)

    def open_device(self) -> Device:
        """The first GPU that CUDA shows."""
        return self._open_device()

    def load_on(
        self,
        device: Device,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
    ) -> TensorRTEngine:
        """Deserialize a plan; see `DeviceBackend`."""
        with self._lock:
            scratch = self._scratch.setdefault(device, Scratch(device))
        return TensorRTEngine(library(self.flavour), path, device, scratch, inputs, outputs)

    def load(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
        threads: int,
    ) -> HostSide:
        """As `load_on` on a device of its own, seen from the host."""
        device = self.open_device()
        return Alone.load(device, lambda: self.load_on(device, path, inputs, outputs, dtype=dtype))


class Scratch:
    """What engines of a device need while they run: one block of the largest size that any of them asks for.

    They run in the order of one stream, so they can share it. It is allocated when an engine runs first: by then the
    others of its pipeline are loaded. Should a larger one come later, it gets a block of its own, because graphs may
    have captured the address of the one before.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._size = 0
        self._users = 0
        self._blocks: list[DeviceArray] = []
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> None:
        """One more engine, which will need `nbytes`."""
        with self._lock:
            self._size = max(self._size, nbytes)
            self._users += 1

    def block(self, nbytes: int) -> DeviceArray:
        """Memory of at least `nbytes`, the same for all engines where that is possible."""
        with self._lock:
            if not self._blocks or self._blocks[-1].nbytes < nbytes:
                self._blocks.append(self._device.allocate((self._size,), "uint8"))
            return self._blocks[-1]

    def release(self) -> None:
        """One engine less; the last one gives the memory back."""
        with self._lock:
            self._users -= 1
            if not self._users:
                while self._blocks:
                    self._device.free(self._blocks.pop())
                self._size = 0


class TensorRTEngine:
    """A plan on a device, its tensors bound once to memory that keeps its address; see `DeviceEngine`.

    Raises:
        BackendError: When the library refuses the plan, or it is not the program that the bundle says it is.
        MemoryError: When the device has no room for it; what it had taken is given back.
    """

    def __init__(
        self,
        library: ModuleType,
        path: Path,
        device: Device,
        scratch: Scratch,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self._path, self._scratch = path, scratch
        self._log = log(library)
        # In this order each needs the one before it for its whole life.
        self._runtime = library.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise failure(f"{library.__name__} cannot load {path}", self._log.error, str(self._log.error))
        for spec in (*inputs, *outputs):
            self._check(library, spec)
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = self._engine.create_execution_context(strategy)
        if self._context is None:
            raise failure(f"{library.__name__} cannot run {path}", self._log.error, str(self._log.error))
        self._needs = int(self._engine.device_memory_size_v2)
        self._bound = False
        with ExitStack() as undo:
            scratch.reserve(self._needs)
            undo.callback(scratch.release)
            self.inputs = device_buffers(device, inputs, undo)
            self.outputs = device_buffers(device, outputs, undo)
            for name, array in (*self.inputs.items(), *self.outputs.items()):
                self._context.set_tensor_address(name, array.pointer)
            self._closing = undo.pop_all()

    def enqueue(self, stream: Stream) -> None:
        """Run once; the first call takes its scratch memory."""
        if not self._bound:
            block = self._scratch.block(self._needs)
            self._context.set_device_memory(block.pointer, block.nbytes)
            self._bound = True
        if not self._context.execute_async_v3(int(stream)):
            raise failure(f"{self._path.name} failed while running", self._log.error, str(self._log.error))

    def close(self) -> None:
        """Give everything back."""
        self._context = self._engine = self._runtime = None
        self._closing.close()

    def _check(self, library: ModuleType, spec: TensorSpec) -> None:
        """A wrong address would be read and written in silence."""
        kind = self._engine.get_tensor_dtype(spec.name)
        shape = tuple(self._engine.get_tensor_shape(spec.name))
        wanted = getattr(library, spec.dtype)
        if kind != wanted or shape != spec.shape:
            raise BackendError(
                f"{self._path} has {spec.name} as {kind} {shape}, the bundle as {spec.dtype} {spec.shape}: "
                f"build it again"
            )


def library(flavour: Flavour) -> ModuleType:
    """The Python module of a flavour.

    Raises:
        BackendUnavailableError: When it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(flavour.module)
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{flavour.name} needs {error.name}, which is not installed; run: {install_line(flavour.name)}"
        ) from error


def log(library: ModuleType) -> Any:
    """A logger for `library` that passes everything on to ours and keeps the last error, which calls do not return."""
    log: Any = _log_class(library)()
    return log


@cache
def _log_class(library: ModuleType) -> type[Any]:
    base: Any = library.ILogger
    levels = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.INFO}

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.error = BackendError("no reason given")

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity.name, logging.DEBUG)
            text = " ".join(message.split())
            if level == logging.ERROR:
                self.error = BackendError(text)
                level = logging.INFO  # it becomes an error of ours, or did not matter
            logger.log(level, "%s: %s", library.__name__, text)

    return Log


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
