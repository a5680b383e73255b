"""GEGLU as the end of the linear layer before it: the layer's output, twice as wide, never reaches memory.

    [h₀, h₁] = x Wᵀ + b               x (rows, inner), W (2 · features, inner), b (2 · features), all in T
    y = h₀ · h₁ · (1 + erf(h₁ / √2)) / 2              y (rows, features) in T; products in T, sums and GELU in fp32

A program owns a tile of y and keeps a sum for each half of W. It saves writing and reading 2 · features values a row,
and has to come near the vendor's matrix product to gain by it; it is for builds that have measured it against that
product and `geglu` on their GPU. It has not been timed on one.

Programs go down eight tiles of rows before the next of features, so that tiles in flight share both operands in L2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.geglu import gelu
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """In torch."""
    hidden, gate = F.linear(x, weight, bias).chunk(2, -1)
    return (hidden * F.gelu(gate),)


@triton.jit
def geglu_linear(
    x,
    weight,
    bias,
    rows,
    y,
    inner: tl.constexpr,
    features: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
):
    """In Triton: a program a tile of y."""
    tiles: tl.constexpr = (features + FEATURES - 1) // FEATURES
    bands = tl.cdiv(rows, ROWS)
    first = tl.program_id(0) // (8 * tiles) * 8
    height = tl.minimum(bands - first, 8)
    within = tl.program_id(0) % (8 * tiles)
    row = (first + within % height) * ROWS + tl.arange(0, ROWS)
    feature = within // height * FEATURES + tl.arange(0, FEATURES)

    column = tl.arange(0, INNER)
    # Rows and features past the end compute what is not stored, from the first ones.
    left = x + (row % rows).to(tl.int64)[:, None] * inner + column[None, :]
    right = weight + (feature % features)[None, :] * inner + column[:, None]
    hidden = tl.zeros((ROWS, FEATURES), tl.float32)
    gate = tl.zeros((ROWS, FEATURES), tl.float32)
    for start in range(0, inner, INNER):
        if inner % INNER == 0:
            a = tl.load(left + start)
            b = tl.load(right + start)
            c = tl.load(right + start + features * inner)
        else:
            a = tl.load(left + start, (start + column < inner)[None, :], 0.0)
            b = tl.load(right + start, (start + column < inner)[:, None], 0.0)
            c = tl.load(right + start + features * inner, (start + column < inner)[:, None], 0.0)
        hidden = tl.dot(a, b, hidden, input_precision="ieee")
        gate = tl.dot(a, c, gate, input_precision="ieee")
    inside = feature < features
    hidden += tl.load(bias + feature, inside, 0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + features + feature, inside, 0.0).to(tl.float32)[None, :]
    value = (hidden * gelu(gate)).to(y.dtype.element_ty)
    at = y + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(at, value, (row < rows)[:, None] & inside[None, :])


def config(case: Case) -> Config:
    """Two sums of 128 by 64 in eight warps, and three stages that fit the smallest shared memory."""
    return Config(constants={"ROWS": 128, "FEATURES": 64, "INNER": 64}, warps=8, stages=3)


def case(rows: int, inner: int, features: int, dtype: str = "float16") -> Case:
    """Without attributes."""
    return Case(sizes={"rows": rows, "inner": inner, "features": features}, dtype=dtype)


def small_weights(case: Case, generator: torch.Generator) -> Tensor:
    """So that the products are of the order of 1."""
    inner = case.sizes["inner"]
    return torch.randn(2 * case.sizes["features"], inner, generator=generator) / math.sqrt(inner)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What diffusers runs."""
    return reference(x, weight, bias)[0]


SPEC = KernelSpec(
    name="geglu_linear",
    kernel=geglu_linear,
    inputs=(
        TensorArgument(name="x", shape=("rows", "inner"), dtype="T"),
        TensorArgument(name="weight", shape=("2 * features", "inner"), dtype="T"),
        TensorArgument(name="bias", shape=("2 * features",), dtype="T"),
    ),
    scalars={"rows": "rows"},
    outputs=(TensorArgument(name="y", shape=("rows", "features"), dtype="T"),),
    fixed=("inner", "features"),
    config=config,
    grid=("cdiv(rows, ROWS) * cdiv(features, FEATURES)",),
    reference=reference,
    cases=(
        case(128, 128, 64),  # one whole tile
        case(130, 64, 144, "bfloat16"),  # ragged rows and features
        case(77, 96, 64),  # half a step of the inner dimension
        case(9 * 128, 64, 128),  # a second group of bands, with one band
    ),
    workloads={
        "sd15 4096x320": case(2 * 4096, 320, 1280),
        "sd15 1024x640": case(2 * 1024, 640, 2560),
        "sd15 256x1280": case(2 * 256, 1280, 5120),
        "sd15 64x1280": case(2 * 64, 1280, 5120),
        "sd21 9216x320": case(2 * 9216, 320, 1280),
        "sd21 2304x640": case(2 * 2304, 640, 2560),
        "sd21 576x1280": case(2 * 576, 1280, 5120),
        "sd21 144x1280": case(2 * 144, 1280, 5120),
        "sdxl 4096x640": case(2 * 4096, 640, 2560),
        "sdxl 1024x1280": case(2 * 1024, 1280, 5120),
    },
    flops=lambda case: 4 * case.sizes["rows"] * case.sizes["inner"] * case.sizes["features"],
    tolerance={"float16": 1e-3, "bfloat16": 8e-3},
    budget=Budget(registers=156, shared_bytes=98304),
    examples={"weight": small_weights},
    alternatives={"eager": eager},
)
