"""Decoder output to 8-bit pixels.

    pixels = round(255 · clip(x / 2 + 1/2, 0, 1)), half to even

    x (batch, elements) in T, in [−1, 1] → pixels (batch, elements) uint8, broken (batch,)

The results are those of `rt.images.postprocess`, to the bit, so that a decoder with the same output gives the same
file. `broken` of a picture with a NaN or Inf becomes 1; the caller clears it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec

TO_INTEGER = tl.constexpr(2.0**23)
"""fp32 numbers from here are whole, so adding it rounds, half to even."""


def reference(x: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
    """In torch."""
    finite = x.isfinite()
    pixels = (x.nan_to_num(0.0) * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels, torch.where(finite.all(1), broken, 1)


@triton.jit
def to_pixels(x, elements, pixels, broken, BLOCK: tl.constexpr):
    """In Triton: a program for `BLOCK` values of a picture."""
    picture = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    start = picture.to(tl.int64) * elements
    value = tl.load(x + start + at, inside, 0.0).to(tl.float32)
    finite = tl.abs(value) < float("inf")
    # Clipped after the product, to the same result: else the compiler would fuse product and rounding.
    y = (tl.where(finite, value, 0.0) * 0.5 + 0.5) * 255.0
    y = tl.minimum(tl.maximum(y, 0.0), 255.0)
    y = (y + TO_INTEGER) - TO_INTEGER
    tl.store(pixels + start + at, y.to(tl.int32).to(tl.uint8), inside)
    wrong = tl.min(finite.to(tl.int32), 0) == 0
    tl.store(broken + picture, 1, wrong)


def config(case: Case) -> Config:
    """Eight values a thread."""
    return Config(constants={"BLOCK": 1024}, warps=4)


def colours(case: Case, generator: torch.Generator) -> Tensor:
    """Beyond both ends, and a third of them halfway between two pixels as near as T has it."""
    shape = case.sizes["batch"], case.sizes["elements"]
    x = 1.2 * torch.randn(shape, generator=generator)
    half = (torch.randint(255, shape, generator=generator) + 0.5) / 127.5 - 1
    return torch.where(torch.rand(shape, generator=generator) < 1 / 3, half, x)


def clear(case: Case, generator: torch.Generator) -> Tensor:
    """No fault so far, but in the first picture."""
    broken = torch.zeros(case.sizes["batch"], dtype=torch.int32)
    broken[0] = 1
    return broken


def case(batch: int, elements: int, *, dtype: str = "float16") -> Case:
    """Sizes by name."""
    return Case(sizes={"batch": batch, "elements": elements}, dtype=dtype)


SPEC = KernelSpec(
    name="to_pixels",
    kernel=to_pixels,
    inputs=(TensorArgument(name="x", shape=("batch", "elements"), dtype="T"),),
    scalars={"elements": "elements"},
    outputs=(
        TensorArgument(name="pixels", shape=("batch", "elements"), dtype="uint8"),
        TensorArgument(name="broken", shape=("batch",), dtype="int32"),
    ),
    inplace=frozenset({"broken"}),
    config=config,
    grid=("cdiv(elements, BLOCK)", "batch"),
    bounds=("elements + BLOCK",),
    reference=reference,
    cases=(case(2, 3 * 1000), case(1, 1024, dtype="bfloat16"), case(3, 3 * 700, dtype="float32")),
    workloads={"512": case(1, 3 * 512 * 512), "1024": case(1, 3 * 1024 * 1024)},
    tolerance=dict.fromkeys(("float16", "bfloat16", "float32"), 0.0),
    budget=Budget(registers=32, shared_bytes=16),
    examples={"x": colours, "broken": clear},
)
