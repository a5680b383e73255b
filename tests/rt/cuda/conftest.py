"""A driver that records, an image of a kernel with every kind of argument, and a device on the host that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from rt.cuda.host import HostDevice
from rt.kernel_image import KernelImage, TensorArgument


@pytest.fixture
def make_image() -> Callable[..., KernelImage]:
    """`y = factor * x`, rows of 4."""

    def make(**changes: Any) -> KernelImage:
        values: dict[str, Any] = {
            "kernel": "scale",
            "name": "scale_float32_sm90",
            "symbol": "scale_kernel",
            "capability": 90,
            "file": "scale.cubin",
            "sizes": {"columns": 4},
            "constants": {"factor": 3, "BLOCK": 2},
            "inputs": (TensorArgument(name="x", shape=("rows", "columns"), dtype="float32"),),
            "scalars": {"count": "rows * columns"},
            "outputs": (TensorArgument(name="y", shape=("rows", "columns"), dtype="float32"),),
            "grid": ("rows", "cdiv(columns, BLOCK)"),
            "threads": 128,
            "shared_bytes": 64,
            "registers": 20,
        }
        return KernelImage(**{**values, **changes})

    return make


def scale(image: KernelImage, sizes: Mapping[str, int], arrays: Mapping[str, Any]) -> None:
    np.multiply(arrays["x"], image.constants["factor"], out=arrays["y"])


@pytest.fixture
def device() -> HostDevice:
    return HostDevice({"scale": scale})
