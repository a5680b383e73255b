"""What TensorRT plugins and our loop carry: code compiled ahead of time, launched through the driver alone.

Each kernel is compiled for this GPU without Triton's launcher, loaded from its bytes, and called with the arguments of
a plugin, inputs, then 32-bit integers, then outputs, in memory of the driver's that begins as NaN. So is the cubin that
the loop loads, and the PTX that a plan embeds. Two cases of each: the smallest of its tests and the first workload. In
a dry run kernels are compiled for an H100, and the stand-in for the driver runs the reference in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rt.bench.gpu_parts.part import Context, Figures
from rt.cuda import Device, DeviceArray
from rt.cuda.driver import CudaDevice
from rt.cuda.formats import storage
from rt.cuda.host import HostDevice
from rt.kernel_image import KernelImage
from rt.kernels import launch, registry
from rt.kernels.aot import compile_case
from rt.kernels.spec import Case, KernelSpec

_DRY = ("layer_norm", "to_pixels")


def run(context: Context) -> Iterator[Figures]:
    """See the module. `payloads`, one a case."""
    device: Device = HostDevice(capability=90) if context.dry else CudaDevice()
    rows: list[dict[str, Any]] = []
    for spec in registry.specs().values():
        if context.dry and spec.name not in _DRY:
            continue
        for case in _chosen(spec, dry=context.dry):
            compiled = compile_case(spec, case, device.capability)
            drawn = launch.draw(spec, case, context.seed)
            expected = spec.reference(*map(_exact, drawn.values()), **case.attributes)
            if isinstance(device, HostDevice):
                device = HostDevice({spec.name: partial(_stand_in, expected)}, capability=device.capability)
            error = 0.0
            for code in (compiled.cubin, compiled.ptx.encode() + b"\0"):
                given = _launch(device, compiled.image, code, spec, case, drawn)
                error = max(error, *map(_difference, given, expected))
            rows.append(
                {
                    "kernel": spec.name,
                    "case": str(case),
                    "cubin_bytes": len(compiled.cubin),
                    "registers": compiled.image.registers,
                    "shared_bytes": compiled.image.shared_bytes,
                    "spill_bytes": compiled.spill_bytes,
                    "error": error,
                    "tolerance": spec.tolerance[case.dtype],
                    "passed": error <= spec.tolerance[case.dtype],
                }
            )
            yield {"payloads": rows}
    device.close()


def _chosen(spec: KernelSpec, *, dry: bool) -> list[Case]:
    smallest = min(spec.cases, key=spec.bytes)
    return [smallest] if dry else [smallest, next(iter(spec.workloads.values()))]


def _launch(
    device: Device,
    image: KernelImage,
    code: bytes,
    spec: KernelSpec,
    case: Case,
    drawn: Mapping[str, Tensor],
) -> list[Tensor]:
    """What the kernel writes, as `spec.outputs` has it."""
    stream = device.create_stream()
    arrays: dict[str, DeviceArray] = {}
    pinned = {}
    for argument in (*spec.inputs, *spec.outputs):
        shape, dtype = spec.extent(argument, case), spec.dtype(argument, case)
        host = pinned[argument.name] = device.pinned(shape, dtype)
        host[...] = _bits(drawn.get(argument.name), shape, dtype)
        arrays[argument.name] = device.allocate(shape, dtype)
        device.upload(arrays[argument.name], host, stream)
    inputs, outputs = ([arrays[argument.name] for argument in group] for group in (spec.inputs, spec.outputs))
    device.load(image, code).launch(stream, case.sizes, inputs, outputs)
    for argument in spec.outputs:
        device.download(pinned[argument.name], arrays[argument.name], stream)
    device.synchronise(stream)
    given = [_tensor(pinned[argument.name], spec.dtype(argument, case)) for argument in spec.outputs]
    for name, array in arrays.items():
        device.free(array)
        device.unpin(pinned[name])
    device.destroy_stream(stream)
    return given


def _bits(value: Tensor | None, shape: Sequence[int], dtype: str) -> Any:
    """The value as numpy holds its format; NaN, or the largest integer, where there is none."""
    kind = getattr(torch, dtype)
    if value is None:
        value = torch.full(
            tuple(shape), math.nan if kind.is_floating_point else torch.iinfo(kind).max, dtype=kind
        )
    return value.contiguous().view(torch.uint8).numpy().reshape(-1).view(storage(dtype)).reshape(tuple(shape))


def _tensor(array: Any, dtype: str) -> Tensor:
    """A copy as torch holds it."""
    raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
    return raw.view(getattr(torch, dtype)).reshape(array.shape)


def _stand_in(
    expected: Sequence[Tensor], image: KernelImage, sizes: Mapping[str, int], arrays: Mapping[str, Any]
) -> None:
    """Writes what the reference gave, in the place of a GPU."""
    for argument, value in zip(image.outputs, expected, strict=True):
        shape = arrays[argument.name].shape
        arrays[argument.name][...] = _bits(value.to(getattr(torch, argument.dtype)), shape, argument.dtype)


def _exact(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _difference(given: Tensor, expected: Tensor) -> float:
    """Largest, relative to the largest value expected; infinite where something is NaN."""
    difference = (given.double() - expected.double()).abs().max()
    return float(torch.nan_to_num(difference, nan=torch.inf)) / (float(expected.double().abs().max()) or 1.0)
