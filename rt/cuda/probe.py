"""Whether this machine has an NVIDIA GPU, asked of the driver alone: without a package, and without a context."""

from __future__ import annotations

import ctypes

DRIVER = "libcuda.so.1"
NO_GPU = "needs an NVIDIA GPU; this machine has none"


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
