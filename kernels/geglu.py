"""GEGLU: a product of one half and the GELU of the other.

    y = x₀ · x₁ · (1 + erf(x₁ / √2)) / 2         x = [x₀, x₁] (rows, 2 · features) in T, y (rows, features) in T

GELU is the exact one, in fp32. A program owns a stretch of the values of y in memory order, 16 bytes a load and store.

Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(x: Tensor) -> tuple[Tensor]:
    """In torch."""
    hidden, gate = x.chunk(2, -1)
    return (hidden * F.gelu(gate),)


@triton.jit
def gelu(x):
    """The exact GELU."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def geglu(x, rows, y, features: tl.constexpr, BLOCK: tl.constexpr):
    """In Triton: a program a stretch of y."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = index < rows.to(tl.int64) * features
    at = x + index // features * (2 * features) + index % features
    hidden = tl.load(at, valid, 0.0).to(tl.float32)
    gate = tl.load(at + features, valid, 0.0).to(tl.float32)
    tl.store(y + index, (hidden * gelu(gate)).to(y.dtype.element_ty), valid)


def config(case: Case) -> Config:
    """Eight values a thread."""
    return Config(constants={"BLOCK": 1024}, warps=4)


def case(rows: int, features: int, dtype: str = "float16") -> Case:
    """Without attributes."""
    return Case(sizes={"rows": rows, "features": features}, dtype=dtype)


def eager(x: Tensor) -> Tensor:
    """What diffusers runs."""
    return reference(x)[0]


WORKLOADS = {
    "sd15 4096x1280": case(2 * 4096, 1280),
    "sd15 1024x2560": case(2 * 1024, 2560),
    "sd15 256x5120": case(2 * 256, 5120),
    "sd15 64x5120": case(2 * 64, 5120),
    "sd21 9216x1280": case(2 * 9216, 1280),
    "sd21 2304x2560": case(2 * 2304, 2560),
    "sd21 576x5120": case(2 * 576, 5120),
    "sd21 144x5120": case(2 * 144, 5120),
    "sdxl 4096x2560": case(2 * 4096, 2560),
    "sdxl 1024x5120": case(2 * 1024, 5120),
}

SPEC = KernelSpec(
    name="geglu",
    kernel=geglu,
    inputs=(TensorArgument(name="x", shape=("rows", "2 * features"), dtype="T"),),
    scalars={"rows": "rows"},
    outputs=(TensorArgument(name="y", shape=("rows", "features"), dtype="T"),),
    fixed=("features",),
    config=config,
    grid=("cdiv(rows * features, BLOCK)",),
    reference=reference,
    cases=(
        case(4, 1280),
        case(3, 2560, "bfloat16"),
        case(5, 333),  # no whole block, and a block that crosses rows
        case(1, 5120, "bfloat16"),
        case(7, 24, "float32"),
    ),
    workloads=WORKLOADS,
    tolerance={"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5},
    budget=Budget(registers=44, shared_bytes=0),
    alternatives={"eager": eager},
)
