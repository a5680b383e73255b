"""GEGLU as the end of the linear layer before it: the layer's output, twice as wide, never reaches memory.

    [h₀, h₁] = x Wᵀ + b               x (rows, inner), W (2 · features, inner), b (2 · features), all in T
    y = h₀ · h₁ · (1 + erf(h₁ / √2)) / 2              y (rows, features) in T; products in T, sums and GELU in fp32

A program owns a tile of y. Its rows of both halves of W are one factor of twice as many columns, so that the tensor
cores of a Hopper read x once for both, and one sum, of which a thread holds both values that it multiplies in the end.

It saves writing and reading 2 · features values a row, and has to come near the vendor's matrix product to gain by it;
it is for builds that have measured it against that product and `geglu` on their GPU. By estimate it is to reach 550 to
600 TFLOP/s on an H200 where there are tiles enough. It has not been timed on one.

Programs go down eight tiles of rows before the next of features, so that tiles in flight share both operands in L2.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """In torch."""
    hidden, gate = F.linear(x, weight, bias).chunk(2, -1)
    return (hidden * F.gelu(gate),)


@triton.jit
def _gelu(x):
    """GELU to 10⁻⁶: the end of a tile is 28 instructions a value, 39 with `tl.erf`, while tensor cores may rest.

    erfc(z) = 1 / (1 + a₁ z + … + a₆ z⁶)¹⁶ to 3 · 10⁻⁷: Abramowitz and Stegun, 7.1.28; here z = |x| / √2.
    """
    z = tl.abs(x)
    p = 5.3829750e-06 * z + 4.8890636e-05
    p = p * z + 3.8003575e-05
    p = p * z + 3.2776263e-03
    p = p * z + 2.1141006e-02
    p = p * z + 4.9867347e-02
    p = p * z + 1.0
    p = p * p
    p = p * p
    p = p * p
    beyond = tl.fdiv(0.5, p * p)  # the part of the normal distribution that lies beyond z
    return x * tl.where(x < 0, beyond, 1.0 - beyond)


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
    start_feature = within // height * FEATURES

    column = tl.arange(0, INNER)
    both = tl.arange(0, 2 * FEATURES)
    # Rows and features past the end compute what is not stored, from the first ones.
    line = both // FEATURES * features + (start_feature + both % FEATURES) % features
    left = x + (row % rows).to(tl.int64)[:, None] * inner + column[None, :]
    right = weight + line[None, :] * inner + column[:, None]
    sums = tl.zeros((ROWS, 2 * FEATURES), tl.float32)
    for start in range(0, inner, INNER):
        if inner % INNER == 0:
            a = tl.load(left + start)
            b = tl.load(right + start)
        else:
            a = tl.load(left + start, (start + column < inner)[None, :], 0.0)
            b = tl.load(right + start, (start + column < inner)[:, None], 0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    hidden, gate = sums.reshape(ROWS, 2, FEATURES).permute(0, 2, 1).split()
    feature = start_feature + tl.arange(0, FEATURES)
    inside = feature < features
    hidden += tl.load(bias + feature, inside, 0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + features + feature, inside, 0.0).to(tl.float32)[None, :]
    value = (hidden * _gelu(gate)).to(y.dtype.element_ty)
    at = y + row.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(at, value, (row < rows)[:, None] & inside[None, :])


def config(case: Case) -> Config:
    """A sum of 128 by 2 · 64 in eight warps, and three stages that fit the smallest shared memory."""
    return Config(constants={"ROWS": 128, "FEATURES": 64, "INNER": 64}, warps=8, stages=3)


def hopper_config(case: Case) -> Config:
    """Twice the features where the product is long and there is work for 132 processors several times.

    Such a program has a processor for itself, whose tensor cores rest while it begins and ends. Where that is long
    beside the product, two smaller programs do better, each at work while the other begins or ends.
    """
    if case.sizes["inner"] < 1024 or case.sizes["rows"] < 2048:
        return config(case)
    return Config(constants={"ROWS": 128, "FEATURES": 128, "INNER": 64}, warps=8, stages=4)


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


_EVERYWHERE = KernelSpec(
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
    budget=Budget(registers=176, shared_bytes=98304),
    examples={"weight": small_weights},
    alternatives={"eager": eager},
)

SPEC = replace(
    _EVERYWHERE,
    hopper=replace(
        _EVERYWHERE,
        config=hopper_config,
        cases=(case(130, 64, 80), case(2049, 1032, 80, "bfloat16")),
        budget=Budget(registers=192, shared_bytes=196608),
    ),
)
