"""GroupNorm in two launches, the second: merge the statistics of the chunks, normalise, SiLU.

    h = x + bias                                       x (batch, pixels, channels) in T, bias (batch, channels)
    y = (h − mean) / √(variance + eps) · scale + shift     mean and variance from `group_statistics` of the same chunks
    y = y · sigmoid(y)                                 if silu

Everything but x and y is fp32. A program owns a chunk of the pixels of a few neighbouring groups and merges what it
needs of the statistics itself, twice over: the mean, then the deviations from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels import group_statistics
from rt.kernels.group_norm import off_centre
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(
    x: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    m2: Tensor,
    *,
    groups: int,
    chunk: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor]:
    """In torch, for any statistics, also such as x does not have."""
    pixels, width = x.shape[1], x.shape[2] // groups
    counts = [width * min(chunk, pixels - start) for start in range(0, pixels, chunk)]
    count = torch.tensor(counts, device=mean.device)[:, None]
    whole = (mean * count).sum(1, keepdim=True) / (pixels * width)
    variance = (m2 + count * (mean - whole) ** 2).sum(1, keepdim=True) / (pixels * width)
    h = (x + bias[:, None]).view(*x.shape[:2], groups, -1)
    y = ((h - whole[..., None]) / (variance[..., None] + eps).sqrt()).flatten(-2) * scale + shift
    return (F.silu(y) if silu else y,)


@triton.jit
def group_normalize(
    x,
    bias,
    scale,
    shift,
    mean,
    m2,
    pixels,
    bias_stride,
    y,
    channels: tl.constexpr,
    groups: tl.constexpr,
    chunk: tl.constexpr,
    eps: tl.constexpr,
    silu: tl.constexpr,
    BLOCK: tl.constexpr,  # pixels at a time
    CHUNKS: tl.constexpr,  # statistics at a time
    GROUPS: tl.constexpr,  # of a program
    GROUPS_TILE: tl.constexpr,  # up to a power of two
    TILE: tl.constexpr,  # their channels, up to a power of two
):
    """In Triton: a program a few groups of a chunk of a row."""
    width: tl.constexpr = channels // groups
    group = tl.program_id(0) * GROUPS
    part = tl.program_id(1)
    row = tl.program_id(2)
    chunks = tl.num_programs(1)

    member = tl.arange(0, GROUPS_TILE)
    known = (member < GROUPS) & (group + member < groups)
    index = tl.arange(0, CHUNKS)
    at = (row * chunks + index[:, None]) * groups + (group + member)[None, :]
    total = tl.zeros((CHUNKS, GROUPS_TILE), tl.float32)
    for first in range(0, chunks, CHUNKS):
        valid = (first + index < chunks)[:, None] & known[None, :]
        count = tl.minimum(pixels - (first + index) * chunk, chunk)[:, None] * width
        total += tl.load(mean + first * groups + at, valid, 0.0) * count
    whole = tl.sum(total, 0) / (pixels * width)
    total = tl.zeros((CHUNKS, GROUPS_TILE), tl.float32)
    for first in range(0, chunks, CHUNKS):
        valid = (first + index < chunks)[:, None] & known[None, :]
        count = tl.minimum(pixels - (first + index) * chunk, chunk)[:, None] * width
        apart = tl.where(valid, tl.load(mean + first * groups + at, valid, 0.0) - whole[None, :], 0.0)
        total += tl.load(m2 + first * groups + at, valid, 0.0) + count * apart * apart
    inverse = tl.rsqrt(tl.sum(total, 0) / (pixels * width) + eps)

    column = tl.arange(0, TILE)
    channel = group * width + column
    inside = (column < GROUPS * width) & (channel < channels)
    owns = (column // width)[None, :] == member[:, None]  # from a value a group to one a channel
    factor = tl.load(scale + channel, inside, 0.0) * tl.sum(tl.where(owns, inverse[:, None], 0.0), 0)
    added = tl.load(bias + row * bias_stride + channel, inside, 0.0)
    added -= tl.sum(tl.where(owns, whole[:, None], 0.0), 0)
    term = tl.load(shift + channel, inside, 0.0)

    pixel = tl.arange(0, BLOCK)
    start = (row.to(tl.int64) * pixels + part * chunk) * channels
    offset = pixel[:, None] * channels + channel[None, :]
    here = tl.minimum(pixels - part * chunk, chunk)
    for first in range(0, here, BLOCK):
        valid = (first + pixel < here)[:, None] & inside[None, :]
        place = start + first * channels + offset
        value = tl.load(x + place, valid, 0.0).to(tl.float32) + added[None, :]
        value = value * factor[None, :] + term[None, :]
        if silu:
            value *= tl.sigmoid(value)
        tl.store(y + place, value.to(y.dtype.element_ty), valid)


def config(case: Case) -> Config:
    """Sixteen values a thread."""
    constants = group_statistics.tiles(case)
    return Config(constants={**constants, "CHUNKS": 1024 // constants["GROUPS_TILE"]}, warps=8)


def case(
    batch: int,
    pixels: int,
    channels: int,
    chunk: int = 0,
    *,
    groups: int = 32,
    eps: float = 1e-6,
    silu: bool = True,
    dtype: str = "float16",
) -> Case:
    """Of diffusers' blocks, with `chunk_of` unless said otherwise."""
    given = group_statistics.case(batch, pixels, channels, chunk, groups=groups, dtype=dtype)
    return Case(sizes=given.sizes, dtype=dtype, attributes={**given.attributes, "eps": eps, "silu": silu})


def statistics(case: Case, generator: torch.Generator) -> Tensor:
    """Means of about 10, other in each chunk."""
    groups, chunk = int(case.attributes["groups"]), int(case.attributes["chunk"])
    chunks = -(-case.sizes["pixels"] // chunk)
    return torch.randn(case.sizes["batch"], chunks, groups, generator=generator) + 10


def deviations(case: Case, generator: torch.Generator) -> Tensor:
    """Of a variance of 1 to 2 in each chunk."""
    groups, chunk = int(case.attributes["groups"]), int(case.attributes["chunk"])
    chunks = -(-case.sizes["pixels"] // chunk)
    variance = torch.rand(case.sizes["batch"], chunks, groups, generator=generator) + 1
    return variance * min(chunk, case.sizes["pixels"]) * (case.sizes["channels"] // groups)


def eager(
    x: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    m2: Tensor,
    *,
    groups: int,
    chunk: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """What diffusers runs, statistics included."""
    h = (x + bias.to(x.dtype)[:, None]).movedim(-1, 1)
    y = F.group_norm(h, groups, scale.to(x.dtype), shift.to(x.dtype), eps)
    return (F.silu(y) if silu else y).movedim(1, -1)


PER_GROUP = ("batch", "cdiv(pixels, chunk)", "groups")

SPEC = KernelSpec(
    name="group_normalize",
    kernel=group_normalize,
    inputs=(
        TensorArgument(name="x", shape=("batch", "pixels", "channels"), dtype="T"),
        TensorArgument(name="bias", shape=("batch", "channels"), dtype="float32"),
        TensorArgument(name="scale", shape=("channels",), dtype="float32"),
        TensorArgument(name="shift", shape=("channels",), dtype="float32"),
        TensorArgument(name="mean", shape=PER_GROUP, dtype="float32"),
        TensorArgument(name="m2", shape=PER_GROUP, dtype="float32"),
    ),
    scalars={"pixels": "pixels", "bias_stride": "channels"},
    outputs=(TensorArgument(name="y", shape=("batch", "pixels", "channels"), dtype="T"),),
    fixed=("channels",),
    config=config,
    grid=("cdiv(groups, GROUPS)", "cdiv(pixels, chunk)", "batch"),
    bounds=("pixels * (channels // groups)",),
    reference=reference,
    cases=(
        case(1, 256, 128, 64),
        case(2, 150, 320, 64, dtype="bfloat16"),
        case(1, 65, 640, 32, silu=False, eps=0.5),
        case(3, 40, 1280, 64, dtype="bfloat16"),
        case(1, 100, 60, 50, groups=3, dtype="float32"),
        case(1, 20, 480, 16, groups=2),
        case(1, 90, 64, 1, silu=False),  # more chunks than are merged at a time
    ),
    workloads={
        **{
            name: case(*sizes, eps=1e-6 if name.startswith("vae") else 1e-5)
            for name, sizes in group_statistics.WIDE.items()
        },
        **{f"vae{8 * side} attention": case(1, side * side, 512, silu=False) for side in (64, 96, 128)},
    },
    tolerance={"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5},
    budget=Budget(registers=74, shared_bytes=4096),
    examples={"x": off_centre, "mean": statistics, "m2": deviations},
    alternatives={"eager": eager},
)
