"""LayerNorm of rows: fp32 inside, half at both ends.

    y = (x − mean) / √(variance + eps) · scale + shift       x (rows, channels) in T; mean and variance of a row

scale and shift are fp32, and so is everything between load and store. A program owns a few whole rows, each read once.

Ba, Kiros and Hinton, "Layer Normalization", https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float) -> tuple[Tensor]:
    """In torch."""
    return (F.layer_norm(x, (x.shape[-1],), scale, shift, eps),)


@triton.jit
def layer_norm(
    x,
    scale,
    shift,
    rows,
    y,
    channels: tl.constexpr,
    eps: tl.constexpr,
    ROWS: tl.constexpr,  # of a program
    TILE: tl.constexpr,  # channels, up to a power of two
):
    """In Triton: a program a few rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, TILE)
    inside = channel < channels
    valid = (row < rows)[:, None] & inside[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, valid, 0.0).to(tl.float32)
    mean = tl.sum(value, 1) / channels
    value = tl.where(inside[None, :], value - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / channels + eps)
    factor = tl.load(scale + channel, inside, 0.0)
    term = tl.load(shift + channel, inside, 0.0)
    value = value * inverse[:, None] * factor[None, :] + term[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), valid)


def config(case: Case) -> Config:
    """Eight values a thread; several rows where they are short."""
    tile = triton.next_power_of_2(case.sizes["channels"])
    rows = max(1, 1024 // tile)
    return Config(constants={"ROWS": rows, "TILE": tile}, warps=rows * tile // 256)


def case(rows: int, channels: int, *, eps: float = 1e-5, dtype: str = "float16") -> Case:
    """Of diffusers' and CLIP's blocks unless said otherwise."""
    return Case(sizes={"rows": rows, "channels": channels}, dtype=dtype, attributes={"eps": eps})


def off_centre(case: Case, generator: torch.Generator) -> Tensor:
    """Rows whose mean is ten times their deviation: E[x²] − E[x]² would show."""
    return torch.randn(case.sizes["rows"], case.sizes["channels"], generator=generator) + 10


def eager(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    """What diffusers runs."""
    return F.layer_norm(x, (x.shape[-1],), scale.to(x.dtype), shift.to(x.dtype), eps)


SPEC = KernelSpec(
    name="layer_norm",
    kernel=layer_norm,
    inputs=(
        TensorArgument(name="x", shape=("rows", "channels"), dtype="T"),
        TensorArgument(name="scale", shape=("channels",), dtype="float32"),
        TensorArgument(name="shift", shape=("channels",), dtype="float32"),
    ),
    scalars={"rows": "rows"},
    outputs=(TensorArgument(name="y", shape=("rows", "channels"), dtype="T"),),
    fixed=("channels",),
    config=config,
    grid=("cdiv(rows, ROWS)",),
    reference=reference,
    cases=(
        case(7, 320),  # the last program has a row too many
        case(4, 640, dtype="bfloat16"),
        case(3, 1280),
        case(5, 768, dtype="bfloat16", eps=0.5),
        case(2, 2048),
        case(9, 24, dtype="float32"),
    ),
    workloads={
        "sd15 4096x320": case(2 * 4096, 320),
        "sd15 1024x640": case(2 * 1024, 640),
        "sd15 256x1280": case(2 * 256, 1280),
        "sd15 64x1280": case(2 * 64, 1280),
        "sd15 text": case(77, 768),
        "sd21 9216x320": case(2 * 9216, 320),
        "sd21 2304x640": case(2 * 2304, 640),
        "sd21 576x1280": case(2 * 576, 1280),
        "sd21 text": case(77, 1024),
        "sdxl 4096x640": case(2 * 4096, 640),
        "sdxl 1024x1280": case(2 * 1024, 1280),
        "sdxl text": case(77, 1280),
    },
    tolerance={"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5},
    budget=Budget(registers=40, shared_bytes=8192),
    examples={"x": off_centre},
    alternatives={"eager": eager},
)
