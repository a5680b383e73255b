"""`cuda.bindings.driver` for tests: checks number and types of arguments, records each call, and fails where told to.

`SIGNATURES` is compared with the real module's own in `test_driver.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from itertools import count
from typing import Any

HANDLE = int
Params = tuple[tuple[int, ...], tuple[type, ...]]
Address = int


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUfunction_attribute(IntEnum):
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class CUstream_flags(IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(IntEnum):
    CU_EVENT_BLOCKING_SYNC = 1
    CU_EVENT_DISABLE_TIMING = 2


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


ENUMS = (
    CUresult,
    CUdevice_attribute,
    CUfunction_attribute,
    CUstream_flags,
    CUevent_flags,
    CUstreamCaptureMode,
)

# Function to the names of its parameters, as the real module has them, and what we pass for each.
SIGNATURES: dict[str, dict[str, type]] = {
    "cuInit": {"Flags": int},
    "cuDeviceGetCount": {},
    "cuDeviceGet": {"ordinal": int},
    "cuDeviceGetAttribute": {"attrib": CUdevice_attribute, "dev": HANDLE},
    "cuDeviceGetName": {"length": int, "dev": HANDLE},
    "cuDevicePrimaryCtxRetain": {"dev": HANDLE},
    "cuDevicePrimaryCtxRelease": {"dev": HANDLE},
    "cuCtxSetCurrent": {"ctx": HANDLE},
    "cuMemAlloc": {"bytesize": int},
    "cuMemFree": {"dptr": HANDLE},
    "cuMemHostAlloc": {"bytesize": int, "Flags": int},
    "cuMemFreeHost": {"p": Address},
    "cuStreamCreate": {"Flags": int},
    "cuStreamDestroy": {"hStream": HANDLE},
    "cuStreamSynchronize": {"hStream": HANDLE},
    "cuStreamWaitEvent": {"hStream": HANDLE, "hEvent": HANDLE, "Flags": int},
    "cuMemcpyHtoDAsync": {"dstDevice": HANDLE, "srcHost": Address, "ByteCount": int, "hStream": HANDLE},
    "cuMemcpyDtoHAsync": {"dstHost": Address, "srcDevice": HANDLE, "ByteCount": int, "hStream": HANDLE},
    "cuMemcpyDtoDAsync": {"dstDevice": HANDLE, "srcDevice": HANDLE, "ByteCount": int, "hStream": HANDLE},
    "cuMemsetD8Async": {"dstDevice": HANDLE, "uc": int, "N": int, "hStream": HANDLE},
    "cuModuleLoadData": {"image": bytes},
    "cuModuleUnload": {"hmod": HANDLE},
    "cuModuleGetFunction": {"hmod": HANDLE, "name": bytes},
    "cuFuncSetAttribute": {"hfunc": HANDLE, "attrib": CUfunction_attribute, "value": int},
    "cuLaunchKernel": {
        "f": HANDLE,
        **{f"{kind}Dim{axis}": int for kind in ("grid", "block") for axis in "XYZ"},
        "sharedMemBytes": int,
        "hStream": HANDLE,
        "kernelParams": tuple,
        "extra": int,
    },
    "cuEventCreate": {"Flags": int},
    "cuEventDestroy": {"hEvent": HANDLE},
    "cuEventRecord": {"hEvent": HANDLE, "hStream": HANDLE},
    "cuEventSynchronize": {"hEvent": HANDLE},
    "cuStreamBeginCapture": {"hStream": HANDLE, "mode": CUstreamCaptureMode},
    "cuStreamEndCapture": {"hStream": HANDLE},
    "cuGraphCreate": {"flags": int},
    "cuGraphAddChildGraphNode": {
        "hGraph": HANDLE,
        "dependencies": object,  # a list of nodes or None
        "numDependencies": int,
        "childGraph": HANDLE,
    },
    "cuGraphInstantiate": {"hGraph": HANDLE, "flags": int},
    "cuGraphLaunch": {"hGraphExec": HANDLE, "hStream": HANDLE},
    "cuGraphExecDestroy": {"hGraphExec": HANDLE},
    "cuGraphDestroy": {"hGraph": HANDLE},
    "cuGetErrorName": {"error": CUresult},
    "cuGetErrorString": {"error": CUresult},
}
GIVES_A_HANDLE = {
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuMemAlloc",
    "cuStreamCreate",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuEventCreate",
    "cuStreamEndCapture",
    "cuGraphCreate",
    "cuGraphAddChildGraphNode",
    "cuGraphInstantiate",
}


class FakeDriver:
    """The module.

    Attributes:
        calls: Each as (name, arguments), the questions about errors left out.
        failing: Function to what it returns instead of success.
    """

    def __init__(self) -> None:
        for enum in ENUMS:
            setattr(self, enum.__name__, enum)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failing: dict[str, CUresult] = {}
        self._handles = count(0x1000, 0x100)
        self._host: dict[int, Any] = {}

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of that function."""
        return [arguments for called, arguments in self.calls if called == name]

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if name not in SIGNATURES:
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            parameters = SIGNATURES[name]
            assert len(arguments) == len(parameters), f"{name}{arguments}"
            for (parameter, kind), argument in zip(parameters.items(), arguments, strict=True):
                assert isinstance(argument, kind), f"{name}: {parameter} is {argument!r}, not {kind.__name__}"
            if name == "cuGetErrorName":
                return CUresult.CUDA_SUCCESS, arguments[0].name.encode()
            if name == "cuGetErrorString":
                return CUresult.CUDA_SUCCESS, b"a text of the driver"
            self.calls.append((name, arguments))
            return self._answer(name, arguments)

        return call

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name in self.failing:
            failed = self.failing[name]
            return (failed,) if name not in GIVES_A_HANDLE else (failed, None)
        success = CUresult.CUDA_SUCCESS
        if name in GIVES_A_HANDLE:
            return success, next(self._handles)
        if name == "cuDeviceGetCount":
            return success, 1
        if name == "cuDeviceGetName":
            return success, b"A GPU\0".ljust(arguments[0])  # whatever is behind the end is left over
        if name == "cuDeviceGetAttribute":
            return success, 9 if arguments[0].name.endswith("MAJOR") else 0
        if name == "cuMemHostAlloc":
            memory = (ctypes.c_byte * arguments[0])()
            self._host[ctypes.addressof(memory)] = memory
            return success, ctypes.addressof(memory)
        if name == "cuMemFreeHost":
            del self._host[arguments[0]]
        return (success,)
