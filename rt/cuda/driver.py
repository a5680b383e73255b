"""NVIDIA's driver API: https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/driver.html.

The context is the device's primary one, which torch, TensorRT and cuda-python share: pointers and streams of ours are
valid in theirs and the other way round.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from rt.cuda.device import DeviceArray, Event, Kernel, Stream, check_launch
from rt.cuda.formats import Array, storage
from rt.errors import BackendError, BackendUnavailableError
from rt.extras import needs
from rt.kernel_image import KernelImage

SHARED_WITHOUT_ASKING = 48 << 10
"""Bytes of dynamic shared memory that a kernel may use without the opt-in attribute."""


class CudaDevice:
    """See `Device`.

    Args:
        ordinal: Which GPU, in the order of CUDA_VISIBLE_DEVICES.

    Raises:
        BackendUnavailableError: No cuda-bindings, no driver, or no such GPU.
    """

    def __init__(self, ordinal: int = 0) -> None:
        with needs("cuda", "a GPU"):
            self._cuda = import_module("cuda.bindings.driver")
        cuda = self._cuda
        try:
            [code] = cuda.cuInit(0)
        except RuntimeError as error:  # cuda-pathfinder's, when it finds no libcuda
            raise BackendUnavailableError(
                f"no NVIDIA driver: {_one_line(error)}; install the driver"
            ) from error
        if code != cuda.CUresult.CUDA_SUCCESS:
            raise BackendUnavailableError(f"the NVIDIA driver does not start: {self._describe(code)}")
        count = self._call("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            raise BackendUnavailableError(
                f"GPU {ordinal} is not there; this process sees {count}, counted from 0"
            )
        self._device = self._call("cuDeviceGet", ordinal)
        attributes = cuda.CUdevice_attribute
        major = self._call(
            "cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self._device
        )
        minor = self._call(
            "cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self._device
        )
        self.name = self._call("cuDeviceGetName", 256, self._device).partition(b"\0")[0].decode()
        self.capability = 10 * major + minor
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._modules: list[Any] = []
        self._pinned: dict[int, int] = {}
        self.activate()

    def activate(self) -> None:
        """See `Device`."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """See `Device`."""
        array = DeviceArray(0, tuple(shape), dtype)
        # An allocation of no bytes is refused.
        pointer = self._call("cuMemAlloc", max(array.nbytes, 1))
        return DeviceArray(int(pointer), array.shape, dtype)

    def free(self, array: DeviceArray) -> None:
        """See `Device`."""
        self._call("cuMemFree", array.pointer)

    def pinned(self, shape: Sequence[int], dtype: str) -> Array:
        """See `Device`."""
        kind = storage(dtype)
        nbytes = max(int(np.prod(shape)) * kind.itemsize, 1)
        address = int(self._call("cuMemHostAlloc", nbytes, 0))
        memory = memoryview((ctypes.c_byte * nbytes).from_address(address)).cast("B")
        array: Array = np.frombuffer(memory, kind, int(np.prod(shape))).reshape(shape)
        self._pinned[array.ctypes.data] = address
        return array

    def unpin(self, array: Array) -> None:
        """See `Device`."""
        self._call("cuMemFreeHost", self._pinned.pop(array.ctypes.data))

    def create_stream(self) -> Stream:
        """See `Device`."""
        return Stream(
            int(self._call("cuStreamCreate", int(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        )

    def destroy_stream(self, stream: Stream) -> None:
        """See `Device`."""
        self._call("cuStreamDestroy", stream)

    def upload(self, target: DeviceArray, source: Array, stream: Stream) -> None:
        """See `Device`."""
        self._call("cuMemcpyHtoDAsync", target.pointer, source.ctypes.data, target.nbytes, stream)

    def download(self, target: Array, source: DeviceArray, stream: Stream) -> None:
        """See `Device`."""
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, source.pointer, source.nbytes, stream)

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """See `Device`."""
        self._call("cuMemcpyDtoDAsync", target.pointer, source.pointer, target.nbytes, stream)

    def clear(self, target: DeviceArray, stream: Stream) -> None:
        """See `Device`."""
        self._call("cuMemsetD8Async", target.pointer, 0, target.nbytes, stream)

    def load(self, image: KernelImage, code: bytes) -> Kernel:
        """See `Device`."""
        if image.is_ptx:
            code += b"\0"  # a cubin knows how long it is, a text does not
        module = self._call("cuModuleLoadData", code, subject=f"loading kernel {image.name}")
        self._modules.append(module)
        function = self._call("cuModuleGetFunction", module, image.symbol.encode())
        if image.shared_bytes > SHARED_WITHOUT_ASKING:
            attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, image.shared_bytes)
        return CudaKernel(self, image, function)

    def create_event(self) -> Event:
        """See `Device`: blocking, so that a host that waits for seconds does not burn a processor."""
        flags = self._cuda.CUevent_flags
        wanted = int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING)
        return Event(int(self._call("cuEventCreate", wanted)))

    def destroy_event(self, event: Event) -> None:
        """See `Device`."""
        self._call("cuEventDestroy", event)

    def record(self, event: Event, stream: Stream) -> None:
        """See `Device`."""
        self._call("cuEventRecord", event, stream)

    def wait(self, event: Event) -> None:
        """See `Device`."""
        self._call("cuEventSynchronize", event)

    def follow(self, stream: Stream, event: Event) -> None:
        """See `Device`."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronise(self, stream: Stream) -> None:
        """See `Device`."""
        self._call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: Stream) -> None:
        """See `Device`: of this thread alone, so that other threads may allocate meanwhile."""
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: Stream) -> CudaGraph:
        """See `Device`."""
        return CudaGraph(self, self._call("cuStreamEndCapture", stream))

    def chain(self, graphs: Sequence[Any]) -> CudaGraph:
        """See `Device`."""
        whole = self._call("cuGraphCreate", 0)
        try:
            before: list[Any] = []
            for graph in graphs:
                node = self._call(
                    "cuGraphAddChildGraphNode", whole, before or None, len(before), graph.handle
                )
                before = [node]
        except BaseException:
            self._call("cuGraphDestroy", whole)
            raise
        return CudaGraph(self, whole)

    def close(self) -> None:
        """See `Device`."""
        for module in self._modules:
            self._call("cuModuleUnload", module)
        self._modules.clear()
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, function: str, *arguments: Any, subject: str = "") -> Any:
        """Call the driver; its first result is a code, the second, where there is one, what was asked for."""
        code, *results = getattr(self._cuda, function)(*arguments)
        if code == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            size = f" of {arguments[0]} bytes" if function in ("cuMemAlloc", "cuMemHostAlloc") else ""
            where = "page-locked host memory" if function == "cuMemHostAlloc" else f"memory of {self.name}"
            raise MemoryError(f"{subject or function}{size}: {where} is full")
        if code != self._cuda.CUresult.CUDA_SUCCESS:
            raise BackendError(f"{subject or function} failed: {self._describe(code)}")
        return results[0] if results else None

    def _describe(self, code: Any) -> str:
        """Name and text of an error, without `_call`, which would come back here if these two fail."""
        parts = [getattr(self._cuda, get)(code) for get in ("cuGetErrorName", "cuGetErrorString")]
        if any(status != self._cuda.CUresult.CUDA_SUCCESS for status, _ in parts):
            return f"error {int(code)}, which this driver has no name for"
        return ": ".join(text.decode() for _, text in parts)


class CudaKernel:
    """See `Kernel`."""

    def __init__(self, device: CudaDevice, image: KernelImage, function: Any) -> None:
        self.image = image
        self._device, self._function = device, function
        pointers = (ctypes.c_void_p,)
        self._types = (
            *pointers * len(image.inputs),
            *(ctypes.c_int32,) * len(image.scalars),
            *pointers * len(image.outputs),
        )

    def launch(
        self,
        stream: Stream,
        sizes: Mapping[str, int],
        inputs: Sequence[DeviceArray],
        outputs: Sequence[DeviceArray],
    ) -> None:
        """See `Kernel`."""
        image = self.image
        check_launch(image, sizes, inputs, outputs)
        values = (
            *(array.pointer for array in inputs),
            *image.scalar_values(sizes),
            *(array.pointer for array in outputs),
        )
        self._device._call(
            "cuLaunchKernel",
            self._function,
            *image.launch_grid(sizes),
            *(image.threads, 1, 1),
            image.shared_bytes,
            stream,
            (values, self._types),
            0,
            subject=f"launching kernel {image.name}",
        )


class CudaGraph:
    """See `Graph`. The graph itself is kept beside its executable form: chains copy it.

    Attributes:
        handle: Of the graph, which is destroyed with this object, also where it cannot be made executable.
    """

    def __init__(self, device: CudaDevice, handle: Any) -> None:
        self.handle = handle
        self._device = device
        try:
            self._executable = device._call("cuGraphInstantiate", handle, 0)
        except BaseException:
            device._call("cuGraphDestroy", handle)
            raise

    def launch(self, stream: Stream) -> None:
        """See `Graph`."""
        self._device._call("cuGraphLaunch", self._executable, stream)

    def close(self) -> None:
        """See `Graph`."""
        self._device._call("cuGraphExecDestroy", self._executable)
        self._device._call("cuGraphDestroy", self.handle)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
