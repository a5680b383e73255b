"""The kernels that the sampling loop launches itself, compiled into a bundle; those of a network are in its engines.

Importing it needs Triton.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rt.kernel_image import KernelImage
from rt.kernels.aot import CAPABILITIES, compile_case
from rt.kernels.registry import spec
from rt.kernels.spec import Case

NAMES = ("feed", "guidance_rescale", "guide_and_step", "select_rows", "to_pixels")
FOLDER = "kernels"


def compile_loop(stage: Path) -> tuple[KernelImage, ...]:
    """Write a cubin a kernel and GPU architecture below `stage`; needs Triton and no GPU.

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
    return tuple(images)
