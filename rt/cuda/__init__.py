"""GPUs behind one seam: `CudaDevice` on NVIDIA's driver, and `HostDevice`, which does the same in numpy for tests."""

from rt.cuda.device import Device, DeviceArray, Graph, Kernel, Stream, capture
from rt.cuda.library import KernelLibrary

__all__ = ["Device", "DeviceArray", "Graph", "Kernel", "KernelLibrary", "Stream", "capture"]
