"""Whether this machine has an NVIDIA GPU, asked of the driver alone: without a package, and without a context."""

from __future__ import annotations

import ctypes

DRIVER = "libcuda.so.1"
NO_GPU = "needs an NVIDIA GPU; this machine has none"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


def gpu_problem(driver: str = DRIVER) -> str:
    """Why no GPU can be used here, or "" when one can. Never raises.

    https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html
    """
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return NO_GPU
    if code := cuda.cuInit(0):
        return f"needs an NVIDIA GPU, and the driver does not start (CUresult {code})"
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return NO_GPU
    return ""


def gpu_capability(driver: str = DRIVER) -> int:
    """Compute capability of the first GPU, such as 90 for 9.0, or 0 where none can be used. Never raises."""
    if gpu_problem(driver):
        return 0
    cuda = ctypes.CDLL(driver)
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    for number, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return 10 * major.value + minor.value
