"""The kernels that the sampling loop launches itself, compiled into a bundle; those of a network are in its engines.

Importing it needs Triton.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rt.cuda.probe import gpu_capability
from rt.errors import ConfigError
from rt.kernel_image import KernelImage
from rt.kernels.aot import CAPABILITIES, Compiled, compile_case
from rt.kernels.registry import spec
from rt.kernels.spec import Case

NAMES = ("feed", "guidance_rescale", "guide_and_step", "select_rows", "to_pixels")
FOLDER = "kernels"
OLDEST = min(CAPABILITIES)


def check_gpu() -> None:
    """Raises ConfigError where this machine's GPU, if it has one, is too old for any of them."""
    if 0 < (here := gpu_capability()) < OLDEST:
        raise ConfigError(
            f"our kernels need a GPU of compute capability {OLDEST / 10} or later, and this one has {here / 10}; "
            f"use --backend openvino"
        )


def compile_loop(stage: Path) -> tuple[KernelImage, ...]:
    """Write a cubin a kernel and GPU architecture below `stage`, and PTX for those that are not among them.

    Needs Triton and no GPU.

    Raises:
        BuildError: A kernel cannot be compiled.
    """
    (stage / FOLDER).mkdir()
    images = []
    for name in NAMES:
        kernel = spec(name)
        # Sizes are arguments, so any workload's will do; buffers of engines are fp32 in every precision.
        case = Case(sizes=next(iter(kernel.workloads.values())).sizes, dtype="float32")
        for capability in CAPABILITIES:
            compiled = compile_case(kernel, case, capability)
            image = replace(compiled.image, file=f"{FOLDER}/{compiled.image.file}")
            (stage / image.file).write_bytes(compiled.cubin)
            images.append(image)
            if capability == OLDEST:
                image = _as_ptx(compiled)
                (stage / image.file).write_text(compiled.ptx, encoding="ascii")
                images.append(image)
    return tuple(images)


def _as_ptx(compiled: Compiled) -> KernelImage:
    """The record of what a cubin was assembled from, which the drivers of later GPUs assemble themselves."""
    image = compiled.image
    name = image.name.replace(f"-sm{image.capability}", f"-compute{image.capability}")
    return replace(image, name=name, file=f"{FOLDER}/{name}.ptx")
