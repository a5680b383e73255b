"""`rt` where the only GPU is a stand-in: `python on_stand_in.py build …`, `python on_stand_in.py run …`.

It builds as on a GPU. What it built is opened and held against this torch and this GPU; then the graph of the program,
which is in the bundle, too, runs on the processor in its place, as late as CUDA allows, between the references of the
loop's kernels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "rt"))

import device_fakes

import rt.backends.inductor as backend
from rt.backends import Form, get
from rt.backends.views import DeviceSide
from rt.bench.stand_in_gpu.gpu import H200, install
from rt.bench.stand_in_gpu.launches import counting
from rt.cli import main
from rt.config import DType
from rt.cuda.host import HostDevice
from rt.shapes import TensorSpec


def load_on(
    self: backend.Inductor,
    device: HostDevice,
    path: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    dtype: DType,
) -> DeviceSide:
    """In place of `Inductor.load_on`."""
    about = backend.About.read(path)
    backend.check_torch(about, path)
    backend.check_gpu(about, path, device)
    graph = path.with_name(path.name.replace(Form.INDUCTOR.value, Form.ONNX.value))
    engine = get("openvino").load(graph, inputs, outputs, dtype=dtype, threads=2)
    return DeviceSide(path.stem, engine, device)


def stand_in() -> None:
    """For all of the process."""
    install()
    library: Any = backend
    library.gpu_problem = lambda: ""
    library.CudaDevice = lambda: device_fakes.host_device(capability=H200.capability)
    inductor: Any = backend.Inductor
    inductor.load_on = load_on
    inductor.open_device = lambda self: library.CudaDevice()


if __name__ == "__main__":
    stand_in()
    with counting() as counted:
        try:
            main()
        finally:
            print(json.dumps({"launches": dict(counted.launches)}))
