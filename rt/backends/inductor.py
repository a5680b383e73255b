"""Packages of AOTInductor, on an NVIDIA GPU or on the processor: the one part of a run that needs torch.

https://docs.pytorch.org/docs/stable/torch.compiler_aot_inductor.html

A package holds code alone. Its weights are tensors of the component's file, which every package of the component reads;
`rt.json` inside says which, what the code was compiled with, and what it needs of a machine.
"""

from __future__ import annotations

import json
import platform
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rt.backends.base import Array, Availability, Engine, Form, broken, buffers, device_buffers, failure
from rt.backends.views import Alone
from rt.config import DType
from rt.cuda import Device, Stream
from rt.cuda.driver import CudaDevice
from rt.cuda.probe import gpu_problem
from rt.decode import decode
from rt.errors import BackendError, IncompatibleBundleError
from rt.extras import install_line
from rt.json_file import LIMIT, parse_json
from rt.process import Calls, library
from rt.processors import processor_flags
from rt.shapes import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ABOUT = "rt.json"
_ARITHMETIC = {DType.FP32: "f32", DType.FP16: "f16", DType.BF16: "bf16", DType.FP8: "f16"}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the component's file.

    Attributes:
        offset: Of its first byte; the elements follow in the order of `shape`.
        dtype: As torch names it.
        shape: In elements.
        stride: That the code was compiled for, in elements. Filters are channels last.
    """

    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a package says of itself.

    Attributes:
        torch: The version that compiled it; the code calls into the library, whose interface changes between releases.
        machine: The processor's architecture.
        instructions: That the processor must have, as /proc/cpuinfo names them.
        capability: Compute capability of the GPU, such as 90; 0 for a processor.
        file: The component's weights, beside the package.
        weights: By the name that the code knows them by.
    """

    torch: str
    machine: str
    instructions: tuple[str, ...]
    capability: int
    file: str
    weights: Mapping[str, Weight]

    def to_json(self) -> str:
        """`read` is the inverse."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def read(cls, package: Path) -> About:
        """Of a package.

        Raises:
            BackendError: When the file is damaged.
        """
        try:
            with zipfile.ZipFile(package) as archive:
                [name] = [name for name in archive.namelist() if name.endswith(f"/{ABOUT}")]
                with archive.open(name) as file:
                    return decode(cls, parse_json(file.read(LIMIT)), ABOUT)
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise BackendError(
                f"inductor cannot load {package}: not a package of rt ({error}); build or copy the bundle again"
            ) from error


class InductorCpu:
    """On the processor: for tests of what runs on a GPU, slower than OpenVINO."""

    name = "inductor-cpu"
    form = Form.INDUCTOR_CPU

    def available(self) -> Availability:
        """Whether torch is installed. It is not imported: that takes seconds, and most who ask use another backend."""
        try:
            return Availability(version=f"torch {version('torch')}")
        except PackageNotFoundError:
            return Availability(
                version=None, problem="torch is not installed; run: " + install_line(self.name)
            )

    def refuses(self, dtype: DType) -> str:
        """int8: torch computes what the graph says of it in floats, slower than without."""
        if dtype in _ARITHMETIC:
            return ""
        return f"it has no {dtype.value} products; use --fp16, --bf16 or --backend openvino"

    def arithmetic(self, dtype: DType) -> str:
        """The format of the graph's floats."""
        return _ARITHMETIC.get(dtype, "f32")

    def forms(self, dtype: DType) -> tuple[Form, ...]:
        """Packages."""
        return (self.form,)

    def load(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
        threads: int,
    ) -> Engine:
        """Load a package and map its weights."""
        about = About.read(path)
        check_torch(about, path)
        check_processor(about, path, processor())
        if _openmp().calls.forked:
            raise BackendError(
                f"{self.name} cannot run here: it was used before this process was forked, and torch's threads did not "
                f"follow; start processes by multiprocessing's spawn, or use --backend openvino"
            )
        with library:
            program = _Program(path, about, "cpu")
        return InductorEngine(program, buffers(inputs), buffers(outputs), threads)


class Inductor(InductorCpu):
    """On an NVIDIA GPU, without TensorRT. See `DeviceBackend`."""

    name = "inductor"
    form = Form.INDUCTOR

    def __init__(self, open_device: Callable[[], Device] = CudaDevice) -> None:
        self._open_device = open_device

    def available(self) -> Availability:
        """Whether torch is installed, and whether there is a GPU that it can use, for which alone it is imported."""
        found = super().available()
        if found.problem or (missing := gpu_problem()):
            return found if found.problem else Availability(version=found.version, problem=missing)
        try:
            import torch
        except Exception as error:  # a missing system library, a package for another processor
            return broken(str(found.version), error)
        if torch.cuda.is_available():
            return found
        if torch.version.cuda is None:
            problem = "this torch is built without CUDA; install one with it"
        else:
            problem = (
                f"the driver is older than this torch needs, which is built for CUDA {torch.version.cuda}; "
                f"update the driver, or install a torch for an older CUDA"
            )
        return Availability(version=found.version, problem=problem)

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
    ) -> InductorDeviceEngine:
        """Load a package and upload its weights, unless another package of the component did."""
        about = About.read(path)
        check_torch(about, path)
        check_processor(about, path, processor())
        check_gpu(about, path, device)
        program = _Program(path, about, "cuda")
        return InductorDeviceEngine(program, device, inputs, outputs, exact=dtype is DType.FP32)

    def load(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
        threads: int,
    ) -> Engine:
        """As `load_on`, seen from the host, with a device of its own."""
        device = self.open_device()
        return Alone.load(device, lambda: self.load_on(device, path, inputs, outputs, dtype=dtype))


class InductorEngine:
    """A package whose inputs are our arrays; its outputs are copied into ours."""

    def __init__(
        self, program: _Program, inputs: dict[str, Array], outputs: dict[str, Array], threads: int
    ) -> None:
        import torch

        self.inputs, self.outputs = inputs, outputs
        self._calls = Calls(self)
        self._program, self._threads = program, threads
        self._reads = [torch.from_numpy(array) for array in inputs.values()]
        self._writes = [torch.from_numpy(array) for array in outputs.values()]

    def enqueue(self) -> None:
        """Run once."""
        import torch

        with self._calls:
            if torch.get_num_threads() != self._threads:  # each thread of Python has a number of its own
                torch.set_num_threads(self._threads)
            self._program.run(self._reads, self._writes)


class InductorDeviceEngine:
    """A package on a GPU, see `DeviceEngine`.

    What it allocates while it runs comes from a pool of its own, so that a graph that captured a run can be launched
    again: nobody else is ever given that memory.

    Args:
        program: On the GPU.
        device: The same GPU.
        inputs: Of the program.
        outputs: Of the program.
        exact: Whether convolutions of float32 are computed in float32, see `convolutions`.

    Raises:
        MemoryError: When the device has no room for it; what it had taken is given back.
    """

    def __init__(
        self,
        program: _Program,
        device: Device,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        exact: bool,
    ) -> None:
        import torch

        self._program: _Program | None = program
        self._exact = exact
        with ExitStack() as undo:
            self.inputs = device_buffers(device, inputs, undo)
            self.outputs = device_buffers(device, outputs, undo)
            self._reads = [torch.as_tensor(array, device="cuda") for array in self.inputs.values()]
            self._writes = [torch.as_tensor(array, device="cuda") for array in self.outputs.values()]
            # While memory comes from a pool torch does not give back what it has cached elsewhere to make room.
            torch.cuda.empty_cache()
            self._pool: Any = torch.cuda.MemPool()
            self._closing = undo.pop_all()

    def enqueue(self, stream: Stream) -> None:
        """Run once in the order of `stream`; the first call allocates, later ones find the same blocks."""
        import torch

        assert self._program is not None, "an engine is not run after it is closed"
        external = torch.cuda.ExternalStream(int(stream))  # type: ignore[no-untyped-call]
        with (
            torch.cuda.stream(external),
            torch.cuda.use_mem_pool(self._pool),
            convolutions(exact=self._exact),
        ):
            self._program.run(self._reads, self._writes)

    def close(self) -> None:
        """Give everything back, the weights too, where no other engine uses them.

        cuBLAS keeps a workspace a stream, in the pool of the engine that ran first there: engines of one stream are
        closed together, as `rt.engines.Engines.close` does.
        """
        import torch

        self._program, self._reads, self._writes, self._pool = None, [], [], None
        self._closing.close()
        torch.cuda.empty_cache()  # torch keeps what its tensors leave, where TensorRT and our own arrays cannot use it


_CUDNN = threading.Lock()


@contextmanager
def convolutions(*, exact: bool) -> Iterator[None]:
    """How cuDNN computes convolutions on a GPU while this lasts.

    It chooses an algorithm by its heuristics, whatever the process has set for others: to try them out, as
    `torch.backends.cudnn.benchmark` asks for, takes seconds at each start, and takes another one now and then.

    Where they are to be `exact`, those of float32 are in float32, as products of matrices are anyway. By torch's
    default cuDNN rounds their operands to TF32, which has the ten bits of float16. The settings are the process's, so
    one thread at a time changes them, and puts them back.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
    """
    import torch

    cudnn: Any = torch.backends.cudnn  # its module makes `conv` where no type checker sees it
    with _CUDNN:
        tried, precision = cudnn.benchmark, cudnn.conv.fp32_precision
        cudnn.benchmark = False
        if exact:
            cudnn.conv.fp32_precision = "ieee"
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.conv.fp32_precision = tried, precision


class _Program:
    """The code of a package, with its weights."""

    def __init__(self, path: Path, about: About, device: str) -> None:
        import torch

        self._path = path
        self._file = _Weights.of(path.parent / about.file, device)
        try:
            # One runner: an engine is run by one thread at a time.
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
            # The code keeps addresses alone: the tensors must live as long.
            # What has up to eight elements is written into the code.
            self._weights = {
                name: self._file.get(about.weights[name]) for name in self._loader.get_constant_fqns()
            }
            self._loader.load_constants(self._weights, False, True, True)
            if (
                device == "cuda"
            ):  # uploads may go on in torch's stream, which those that run the code do not wait for
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise failure(f"inductor cannot load {path}", error, _first_line(error)) from error

    def run(self, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Once."""
        try:
            for result, target in zip(self._loader.run(reads), writes, strict=True):
                target.copy_(result)
        except RuntimeError as error:
            raise failure(f"{self._path.name} failed while running", error, _first_line(error)) from error


class _Weights:
    """One file of weights on one device, each tensor once for all engines that are loaded."""

    _open: ClassVar[weakref.WeakValueDictionary[tuple[Path, float, str], _Weights]] = (
        weakref.WeakValueDictionary()
    )
    _lock = threading.Lock()

    def __init__(self, path: Path, device: str) -> None:
        self._bytes = np.memmap(path, mode="c")  # pages that nobody writes stay those of the file
        self._device = device
        self._tensors: weakref.WeakValueDictionary[Weight, Tensor] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, path: Path, device: str) -> _Weights:
        """The file, opened once."""
        key = (path, path.stat().st_mtime, device)
        with cls._lock:
            opened = cls._open.get(key)
            if opened is None:
                opened = cls._open[key] = cls(path, device)
            return opened

    def get(self, weight: Weight) -> Tensor:
        """A tensor where and how the code wants it: the file's own pages, unless it must be moved."""
        with self._lock:
            tensor = self._tensors.get(weight)
            if tensor is None:
                tensor = self._tensors[weight] = self._load(weight)
            return tensor

    def _load(self, weight: Weight) -> Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, weight.dtype)
        size = torch.Size(weight.shape).numel()
        part = torch.from_numpy(self._bytes[weight.offset : weight.offset + size * dtype.itemsize])
        stored = part.view(dtype).view(weight.shape)
        if self._device == "cpu" and _same_order(weight, stored.stride()):
            return stored.as_strided(weight.shape, weight.stride)
        moved = torch.empty_strided(weight.shape, weight.stride, dtype=dtype, device=self._device)
        return moved.copy_(stored)


def _same_order(weight: Weight, stride: tuple[int, ...]) -> bool:
    """Whether two strides mean the same; what there is one of has no order."""
    return all(
        size == 1 or wanted == has
        for size, wanted, has in zip(weight.shape, weight.stride, stride, strict=True)
    )


def check_torch(about: About, path: Path) -> None:
    """Raises IncompatibleBundleError where another release of torch compiled a package."""
    built, here = (text.split("+")[0].split(".") for text in (about.torch, version("torch")))
    if built[:2] != here[:2]:
        release = ".".join(built[:2])
        raise IncompatibleBundleError(
            f"{path.name} was compiled by torch {about.torch} and calls into it, and here is {'.'.join(here)}; "
            f'build it again, or run: pip install "torch=={release}.*"'
        )


def check_processor(about: About, path: Path, has: frozenset[str]) -> None:
    """Raises IncompatibleBundleError where the code would stop at an instruction that the processor lacks."""
    if about.machine != platform.machine():
        raise IncompatibleBundleError(
            f"{path.name} was compiled for {about.machine}, and this is {platform.machine()}; build it again here"
        )
    if missing := [name for name in about.instructions if name not in has]:
        raise IncompatibleBundleError(
            f"{path.name} was compiled for a processor with {', '.join(missing)}, which this one lacks; "
            f"build it again here, or use --backend openvino"
        )


def check_gpu(about: About, path: Path, device: Device) -> None:
    """Raises IncompatibleBundleError where the kernels are another GPU's."""
    if about.capability != device.capability:
        raise IncompatibleBundleError(
            f"{path.name} was compiled for compute capability {about.capability}, and {device.name} has "
            f"{device.capability}; build it again here"
        )


class _OpenMP:
    """The threads that all packages share; one that is loaded in a child waits for those of the parent."""

    def __init__(self) -> None:
        self.calls = Calls(self)


@cache
def _openmp() -> _OpenMP:
    """From the first package on."""
    return _OpenMP()


@cache
def processor() -> frozenset[str]:
    """The instructions that this processor has, as Linux names them."""
    return processor_flags()


def _first_line(error: Exception) -> str:
    """Torch appends a trace of its own code."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]
