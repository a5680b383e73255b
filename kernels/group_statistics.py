"""GroupNorm in two launches, the first: mean and squared deviations of each group in each chunk of the pixels.

    h = x + bias                         x (batch, pixels, channels) in T, bias (batch, channels) fp32
    mean, m2 (batch, chunks, groups)     of h over `chunk` pixels and a group's channels: mean, Σ(h − mean)²; fp32

For pictures that `group_norm` would run on a fraction of a GPU: the decoder has 32 groups of up to 4 M values. A
program owns a chunk of the pixels of a few neighbouring groups, as many as fill 128 channels, so that it reads whole
sectors however narrow a group is. Each program of `group_normalize` merges all chunks: small ones give this kernel more
programs and that one more to merge. `chunk_of` is a compromise that grows with the square root.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.group_norm import off_centre
from rt.kernels.spec import Budget, Case, Config, KernelSpec
from rt.kernels.welford import accumulate, merge, seen


def reference(x: Tensor, bias: Tensor, *, groups: int, chunk: int) -> tuple[Tensor, Tensor]:
    """In torch."""
    parts = torch.split((x + bias[:, None]).view(*x.shape[:2], groups, -1).double(), chunk, 1)
    mean = torch.stack([part.mean((1, 3)) for part in parts], 1)
    m2 = torch.stack([part.var((1, 3), correction=0) * part[0, :, 0].numel() for part in parts], 1)
    return mean, m2


@triton.jit
def group_statistics(
    x,
    bias,
    pixels,
    bias_stride,
    mean,
    m2,
    channels: tl.constexpr,
    groups: tl.constexpr,
    chunk: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels at a time, a divisor of chunk
    GROUPS: tl.constexpr,  # of a program
    GROUPS_TILE: tl.constexpr,  # up to a power of two
    TILE: tl.constexpr,  # their channels, up to a power of two
):
    """In Triton: a program a few groups of a chunk of a row."""
    width: tl.constexpr = channels // groups
    group = tl.program_id(0) * GROUPS
    part = tl.program_id(1)
    row = tl.program_id(2)
    column = tl.arange(0, TILE)
    channel = group * width + column
    inside = (column < GROUPS * width) & (channel < channels)
    added = tl.load(bias + row * bias_stride + channel, inside, 0.0)[None, :]

    pixel = tl.arange(0, BLOCK)
    start = (row.to(tl.int64) * pixels + part * chunk) * channels
    offset = pixel[:, None] * channels + channel[None, :]
    here = tl.minimum(pixels - part * chunk, chunk)
    average = tl.zeros((BLOCK, TILE), tl.float32)
    squares = tl.zeros((BLOCK, TILE), tl.float32)
    for first in range(0, here, BLOCK):
        valid = (first + pixel < here)[:, None] & inside[None, :]
        value = tl.load(x + start + first * channels + offset, valid, 0.0).to(tl.float32) + added
        average, squares = accumulate(value, average, squares, first // BLOCK + 1.0, valid)
    average, squares = merge(average, squares, seen(here, pixel, BLOCK)[:, None], 0)

    member = tl.arange(0, GROUPS_TILE)
    owns = (column // width)[None, :] == member[:, None]
    count = tl.where(owns, here, 0).to(tl.float32)
    average, squares = merge(average[None, :], tl.where(owns, squares[None, :], 0.0), count, 1)
    at = (row * tl.num_programs(1) + part) * groups + group + member
    valid = (member < GROUPS) & (group + member < groups)
    tl.store(mean + at, average, valid)
    tl.store(m2 + at, squares, valid)


def chunk_of(pixels: int) -> int:
    """The pixels of a chunk: twice the square root, up to a power of two."""
    return 2 * int(triton.next_power_of_2(math.isqrt(pixels - 1) + 1))


def tiles(case: Case) -> dict[str, int]:
    """Groups of a program, as many as fill 128 channels, and 4096 values at a time."""
    channels, groups = case.sizes["channels"], int(case.attributes["groups"])
    width = channels // groups
    tile = int(triton.next_power_of_2(min(channels, max(128, width))))
    own = min(groups, tile // width)
    return {
        "BLOCK": 4096 // tile,
        "GROUPS": own,
        "GROUPS_TILE": triton.next_power_of_2(own),
        "TILE": tile,
    }


def config(case: Case) -> Config:
    """Sixteen values a thread."""
    return Config(constants=tiles(case), warps=8)


def case(
    batch: int, pixels: int, channels: int, chunk: int = 0, *, groups: int = 32, dtype: str = "float16"
) -> Case:
    """Of diffusers' blocks, with `chunk_of` unless said otherwise."""
    return Case(
        sizes={"batch": batch, "pixels": pixels, "channels": channels},
        dtype=dtype,
        attributes={"groups": groups, "chunk": chunk or chunk_of(pixels)},
    )


WIDE = {
    **{
        f"{model} {side}x{side}x{channels}": (2, side * side, channels)
        for model, side in (("sd15", 64), ("sd21", 96), ("sdxl", 128))
        for channels in (320, 640, 960)
    },
    **{
        f"vae{8 * side} {factor * side}x{factor * side}x{channels}": (1, (factor * side) ** 2, channels)
        for side in (64, 96, 128)
        for factor, channels in ((1, 512), (2, 512), (4, 512), (4, 256), (8, 256), (8, 128))
    },
}
"""Pictures with large groups, of U-Nets under guidance and of decoders: batch, pixels, channels."""

SPEC = KernelSpec(
    name="group_statistics",
    kernel=group_statistics,
    inputs=(
        TensorArgument(name="x", shape=("batch", "pixels", "channels"), dtype="T"),
        TensorArgument(name="bias", shape=("batch", "channels"), dtype="float32"),
    ),
    scalars={"pixels": "pixels", "bias_stride": "channels"},
    outputs=(
        TensorArgument(name="mean", shape=("batch", "cdiv(pixels, chunk)", "groups"), dtype="float32"),
        TensorArgument(name="m2", shape=("batch", "cdiv(pixels, chunk)", "groups"), dtype="float32"),
    ),
    fixed=("channels",),
    config=config,
    grid=("cdiv(groups, GROUPS)", "cdiv(pixels, chunk)", "batch"),
    reference=reference,
    cases=(
        case(1, 256, 128, 64),  # whole chunks and tiles
        case(2, 150, 320, 64, dtype="bfloat16"),  # groups of 10; a last chunk of 22 pixels
        case(1, 65, 640, 32),  # of 20; a last chunk of 1
        case(3, 40, 1280, 64, dtype="bfloat16"),  # of 40; less than a chunk
        case(1, 100, 60, 50, groups=3, dtype="float32"),  # 20 in one program, 4 columns of its tile idle
        case(1, 20, 480, 16, groups=2),  # a group of more than 128
    ),
    workloads={name: case(*sizes) for name, sizes in WIDE.items()},
    tolerance={"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5},
    budget=Budget(registers=80, shared_bytes=8192),
    examples={"x": off_centre},
)
