"""The loop's kernels on a `HostDevice`: their references in torch, and images as the compiler would give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rt.backends import OwnGraph
from rt.backends.views import DeviceSide, HostSide
from rt.cuda import KernelLibrary, Stream
from rt.cuda.formats import Array
from rt.cuda.host import HostDevice, Implementation
from rt.engines import Place
from rt.kernel_image import KernelImage, TensorArgument
from rt.kernels import feed, guidance_rescale, guide_and_step, select_rows, to_pixels
from rt.kernels.spec import KernelSpec
from rt.model import Component
from rt.shapes import ShapeProfile

SPECS = {
    kernel.SPEC.name: kernel.SPEC
    for kernel in (feed, guidance_rescale, guide_and_step, select_rows, to_pixels)
}
FORMATS = ("float32", "float16", "bfloat16")


def implementation(spec: KernelSpec) -> Implementation:
    """The reference, on the device's own memory."""

    def run(image: KernelImage, sizes: Mapping[str, int], arrays: Mapping[str, Array]) -> None:
        tensors = {
            argument.name: _tensor(arrays[argument.name], argument.dtype)
            for argument in (*image.inputs, *image.outputs)
        }
        read = [tensors[argument.name] for argument in spec.read]
        made = spec.reference(*(value.float() if value.is_floating_point() else value for value in read))
        for argument, value in zip(spec.outputs, made, strict=True):
            tensors[argument.name].copy_(value)
        if (
            spec is feed.SPEC
        ):  # its reference is in fp32, and so does not know what is Inf in the format of `out`
            wrong = ~tensors["out"].isfinite().all(1) & (tensors["broken"] == 0)
            tensors["broken"].copy_(torch.where(wrong, tensors["position"] + 1, tensors["broken"]))

    return run


def image(spec: KernelSpec, dtype: str) -> KernelImage:
    """Of `spec` with "T" = `dtype`."""
    case = next(iter(spec.workloads.values()))
    resolved = [
        tuple(
            TensorArgument(name=each.name, shape=each.shape, dtype=dtype if each.dtype == "T" else each.dtype)
            for each in arguments
        )
        for arguments in (spec.inputs, spec.outputs)
    ]
    return KernelImage(
        kernel=spec.name,
        name=f"{spec.name}-{dtype}",
        symbol=spec.name,
        capability=90,
        file=f"{spec.name}-{dtype}.cubin",
        sizes={},
        constants=spec.constants(case),
        inputs=resolved[0],
        scalars=dict(spec.scalars),
        outputs=resolved[1],
        grid=spec.grid,
        threads=128,
        shared_bytes=0,
        registers=32,
    )


def host_device(**options: Any) -> HostDevice:
    """A device that has the loop's kernels."""
    return HostDevice({name: implementation(spec) for name, spec in SPECS.items()}, **options)


def library(device: HostDevice, folder: Path) -> KernelLibrary:
    """All of them, as files without code."""
    images = [image(spec, dtype) for spec in SPECS.values() for dtype in FORMATS]
    for each in images:
        (folder / each.file).write_bytes(b"no code")
    return KernelLibrary(device, images, folder)


class OwnGraphSide(DeviceSide, OwnGraph):
    """One that launches a graph, as far as CUDA sees."""

    def enqueue(self, stream: Stream) -> None:
        self._device._outside_capture("a graph of an engine")
        super().enqueue(stream)


class DeviceEngines:
    """`rt.engines.Engines` of a device, over engines of the host: `get(component, profile, guided=...)`."""

    def __init__(
        self, get: Callable[..., Any], device: HostDevice, side: type[DeviceSide] = DeviceSide
    ) -> None:
        self.place = Place(device, device.create_stream())
        self._get, self._device, self._side = get, device, side
        self._sides: dict[Any, HostSide] = {}

    def get(
        self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False
    ) -> HostSide:
        key = component, profile, guided
        if key not in self._sides:
            engine = self._get(component, profile, guided=guided)
            side = self._side(component.value, engine, self._device)
            self._sides[key] = HostSide(side, self._device, self.place.stream)
        return self._sides[key]

    def close(self) -> None:
        for side in self._sides.values():
            side.close()
        self._device.destroy_stream(self.place.stream)

    def on_device(self, *key: Any, **more: Any) -> Any:
        return self.get(*key, **more).engine


def _tensor(array: Array, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
