"""ONNX Runtime on an NVIDIA GPU, by its CUDA provider or by its TensorRT provider: any bundle's plain graphs.

https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html

Two backends, because what may run in which format, what has to be installed, how long a first load takes and what the
self-test compares differ; so a provider is chosen as everything else is, by `--backend`.

Each session runs in a stream of its own, which providers want when a session is made, and has a CUDA graph of its own:
its run cannot be captured by somebody else. Pinned buffers that some kernels read are freed when a run ends, so a
foreign graph would read what came after them; with the provider's graph such a run is refused instead. Recording
sessions into a caller's capture is a proposal so far: https://github.com/microsoft/onnxruntime/pull/32081.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rt.backends.base import Availability, Form, OwnGraph, broken, device_buffers
from rt.backends.engine_cache import compiled
from rt.backends.ort import Memory, Provider, Session, imported
from rt.backends.views import Alone
from rt.config import DType
from rt.cuda import Device, DeviceArray, Stream
from rt.cuda.driver import CudaDevice
from rt.cuda.formats import storage
from rt.cuda.probe import gpu_problem
from rt.extras import install_line
from rt.shapes import TensorSpec

_WHEEL, _CPU_WHEEL = "onnxruntime-gpu", "onnxruntime"
# The host does not wait at the end of a run; releases from before this change do, at each launch of a graph.
# https://github.com/microsoft/onnxruntime/pull/28686
_NO_WAIT = {"disable_synchronize_execution_providers": "1"}


class OnnxRuntimeCuda:
    """The CUDA provider. See `DeviceBackend`.

    Attributes:
        provider: Its name in the library.
        memory: What the library calls the memory of its device.
    """

    name = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"
    memory = "cuda"

    def __init__(self, open_device: Callable[[], Device] = CudaDevice) -> None:
        self._open_device = open_device

    def available(self) -> Availability:
        """Whether the wheel with the provider is installed and finds its libraries, and whether there is a GPU.

        The library is imported only where there is one: that takes a while, and most who ask use another backend.
        """
        installed = _version(_WHEEL)
        if installed is None:
            return Availability(version=None, problem=self._not_installed())
        if missing := gpu_problem():
            return Availability(version=installed, problem=missing)
        try:
            onnxruntime = imported()
        except Exception as error:  # a missing system library, a package for another processor
            return broken(installed, error)
        if self.provider not in onnxruntime.get_available_providers():
            problem = wheels_problem() or f"it has no {self.provider}; run: {install_line(self.name)}"
            return Availability(version=installed, problem=problem)
        return Availability(version=installed, problem=self._missing_library(onnxruntime))

    def refuses(self, dtype: DType) -> str:
        """Formats that its kernels do not have."""
        if dtype in (DType.FP32, DType.FP16):
            return ""
        why = {
            DType.BF16: "its CUDA kernels know bf16 in part",
            DType.INT8: "its CUDA kernels compute int8 graphs in floats",
            DType.FP8: "its CUDA kernels compute fp8 graphs in floats",
        }
        return f"{why[dtype]}; use --fp16, or --backend openvino"

    def arithmetic(self, dtype: DType) -> str:
        """The format of the graph: TF32 is off."""
        return "f16" if dtype is DType.FP16 else "f32"

    def forms(self, dtype: DType) -> tuple[Form, ...]:
        """Plain graphs: it has no kernels for fused operators."""
        return (Form.ONNX,)

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
    ) -> OnnxRuntimeDeviceEngine:
        """Create a session on `device`."""
        self._preload(imported())

        def open_session(stream: Stream) -> Session:
            with self._prepared(device, path, stream, dtype) as provider:
                return Session(path, provider, threads=1, run=_NO_WAIT)

        return OnnxRuntimeDeviceEngine(open_session, device, self.memory, inputs, outputs)

    def load(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        dtype: DType,
        threads: int,
    ) -> Alone:
        """As `load_on`, seen from the host, with a device of its own."""
        device = self.open_device()
        return Alone.load(device, lambda: self.load_on(device, path, inputs, outputs, dtype=dtype))

    @contextmanager
    def _prepared(self, device: Device, path: Path, stream: Stream, dtype: DType) -> Iterator[Provider]:
        """What a session is made with; when the block ends, it has been made."""
        yield self.provider, _cuda_options(stream)

    def _missing_library(self, onnxruntime: Any) -> str:
        """Why a session would not get its provider."""
        self._preload(onnxruntime)
        cuda = _major(onnxruntime)
        of_cuda = [f"libcudart.so.{cuda}", f"libcublasLt.so.{cuda}"] if cuda else []
        for library in (*of_cuda, "libcudnn.so.9"):
            if problem := _unloadable(library):
                return f"{problem}; run: {install_line(self.name)}"
        return ""

    def _preload(self, onnxruntime: Any) -> None:
        """Load CUDA and cuDNN from the packages that bring them, where the system's loader does not look."""
        if hasattr(onnxruntime, "preload_dlls"):  # from 1.21 on
            with redirect_stdout(io.StringIO()):  # it prints what it does not find, where paths are expected
                onnxruntime.preload_dlls()

    def _not_installed(self) -> str:
        for_processors = _version(_CPU_WHEEL)
        if for_processors is None:
            return "not installed; run: " + install_line(self.name)
        return (
            f"{_CPU_WHEEL} {for_processors} is the wheel for processors; run: pip uninstall --yes {_CPU_WHEEL} && "
            f"{install_line(self.name)}"
        )


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """The TensorRT provider, which compiles a graph when it is loaded first: minutes, kept in the bundle's cache."""

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"

    def refuses(self, dtype: DType) -> str:
        """fp32 too: TensorRT would round it to TF32, and the provider has no option against that.

        https://github.com/microsoft/onnxruntime/issues/26029
        """
        if dtype is DType.FP16:
            return ""
        if dtype is DType.FP32:
            return "it would round to TF32; use --fp16, or --backend onnxruntime-cuda"
        return f"rt builds no {dtype.value} engines with it; use --fp16, or --backend openvino"

    @contextmanager
    def _prepared(self, device: Device, path: Path, stream: Stream, dtype: DType) -> Iterator[Provider]:
        if (
            dtype is DType.FP32
        ):  # programs of a half-precision bundle that run once a schedule, exact as they must be
            yield super().provider, _cuda_options(stream)
            return
        key = (_version(_WHEEL), _nvinfer(imported()), _tensorrt(), device.name, device.capability)
        with compiled(path, self.name, key=key, shared="*.timing") as folder:
            yield self.provider, _tensorrt_options(stream, folder)

    def _preload(self, onnxruntime: Any) -> None:
        super()._preload(onnxruntime)
        with suppress(Exception):  # TensorRT may also be the system's
            import_module("tensorrt")

    def _missing_library(self, onnxruntime: Any) -> str:
        if problem := super()._missing_library(onnxruntime):
            return problem
        library = _nvinfer(onnxruntime)
        if library and (problem := _unloadable(library)):
            major, cuda = int(library.rpartition(".")[2]), _major(onnxruntime)
            package = f"tensorrt-cu{cuda}" if cuda else "tensorrt"
            return (
                f'{problem}; run: pip install "{package}>={major},<{major + 1}", the version that this {_WHEEL} was '
                f"built with"
            )
        return ""


class OnnxRuntimeDeviceEngine(OwnGraph):
    """A session on a device, see `DeviceEngine`; its first run captures its graph, the later ones launch that.

    Args:
        open_session: Makes the session, which runs in the stream that is given.
        device: Where.
        memory: What the library calls memory of that device.
        inputs: Of the program.
        outputs: Of the program.

    Raises:
        BackendError: The library refuses the graph.
        MemoryError: There is no room for it; what it had taken is given back.
    """

    def __init__(
        self,
        open_session: Callable[[Stream], Session],
        device: Device,
        memory: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self._device = device
        with ExitStack() as undo:
            self._own = device.create_stream()
            undo.callback(device.destroy_stream, self._own)
            self._called, self._done = device.create_event(), device.create_event()
            for event in (self._called, self._done):
                undo.callback(device.destroy_event, event)
            self.inputs = device_buffers(device, inputs, undo)
            self.outputs = device_buffers(device, outputs, undo)
            self._session: Session | None = open_session(self._own)
            self._session.bind(memory, _memory(self.inputs), _memory(self.outputs))
            self._closing = undo.pop_all()

    def enqueue(self, stream: Stream) -> None:
        """Run once in the session's stream, between what is in `stream` now and what comes after."""
        assert self._session is not None, "an engine is not run after it is closed"
        self._device.record(self._called, stream)
        self._device.follow(self._own, self._called)
        self._session.run()
        self._device.record(self._done, self._own)
        self._device.follow(stream, self._done)

    def close(self) -> None:
        """Give everything back, the session with its weights and graph first."""
        self._session = None
        self._closing.close()


def wheels_problem() -> str:
    """What is wrong where both wheels are installed, which write the same files; "" where one is, or none."""
    gpu, cpu = _version(_WHEEL), _version(_CPU_WHEEL)
    if gpu is None or cpu is None:
        return ""
    return (
        f"{_CPU_WHEEL} {cpu} and {_WHEEL} {gpu} are both installed, and each overwrites files of the other; run: "
        f"pip uninstall --yes {_CPU_WHEEL} {_WHEEL} && {install_line(OnnxRuntimeCuda.name)}"
    )


def _cuda_options(stream: Stream) -> Mapping[str, str]:
    return {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(int(stream)),
        "enable_cuda_graph": "1",  # refuses a graph of which a part would run on the processor
        "use_tf32": "0",
        # Measuring candidates at the first run would choose other kernels, and so another picture, now and then.
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",  # the GPU is shared with other engines and with our own arrays
    }


def _tensorrt_options(stream: Stream, folder: Path) -> Mapping[str, str]:
    """Without `trt_fp16_enable`, which allows f16 for every layer; the network is then typed as the graph is."""
    return {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(int(stream)),
        "trt_cuda_graph_enable": "1",  # as above: all of the graph, or none
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _memory(arrays: Mapping[str, DeviceArray]) -> dict[str, Memory]:
    return {
        name: Memory(storage(array.dtype).type, array.shape, array.pointer) for name, array in arrays.items()
    }


def _unloadable(library: str) -> str:
    """What the loader says, or "" where it loads."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def _nvinfer(onnxruntime: Any) -> str:
    """The name of TensorRT's library that the provider was linked with, such as libnvinfer.so.10; "" if unknown."""
    provider = Path(onnxruntime.__file__).with_name("capi") / "libonnxruntime_providers_tensorrt.so"
    with (
        suppress(OSError, ValueError),  # another wheel; an empty file
        provider.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        if found := re.search(rb"libnvinfer\.so\.\d+", content):
            return found[0].decode()
    return ""


def _tensorrt() -> str:
    """The version of TensorRT, as far as a package says it."""
    found = map(_version, ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"))
    return next(filter(None, found), "")


def _major(onnxruntime: Any) -> str:
    """Of the CUDA that the library was built with; "" if unknown."""
    return str(getattr(onnxruntime, "cuda_version", "")).partition(".")[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
