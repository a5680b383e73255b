"""Attention of tokens to each other, whose queries, keys and values lie side by side, as one product gives them.

    q, k, v = thirds of qkv along its last axis
    out[b, t, h] = Σ_s softmax_s(q[b, t, h] · k[b, s, h] / √d) v[b, s, h]

    qkv (B, L, 3 · H · d) → out (B, L, H · d)

`attention` on rows three times as wide: to take them apart would be a copy of everything.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels import attention
from rt.kernels.attention import SD15, SD21, XL, attend
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(qkv: Tensor, *, heads: int) -> tuple[Tensor]:
    """In torch."""
    return attention.reference(*qkv.chunk(3, -1), heads=heads)


@triton.jit
def self_attention(
    qkv,
    tokens,
    out,
    width: tl.constexpr,
    heads: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """In Triton, see `attention`."""
    third: tl.constexpr = heads * width
    attend(
        qkv,
        qkv + third,
        qkv + 2 * third,
        tokens,
        tokens,
        out,
        3 * third,
        width,
        heads,
        WIDE,
        NARROW,
        BLOCK_L,
        BLOCK_S,
    )


def config(case: Case) -> Config:
    """That of attention to as many keys."""
    return attention.config(_whole(case))


def _whole(case: Case) -> Case:
    """The case of `attention` that computes the same."""
    size = case.sizes
    heads = int(case.attributes["heads"])
    return attention.case(size["batch"], size["tokens"], size["tokens"], heads, size["width"], case.dtype)


def flops(case: Case) -> int:
    """Two products."""
    return attention.flops(_whole(case))


def fused(qkv: Tensor, *, heads: int) -> Tensor:
    """What torch chooses among its own kernels and cuDNN's."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def case(batch: int, tokens: int, heads: int, width: int, dtype: str = "float16") -> Case:
    """Sizes by name."""
    sizes = {"batch": batch, "tokens": tokens, "width": width}
    return Case(sizes=sizes, attributes={"heads": heads}, dtype=dtype)


def levels(side: int, heads: Mapping[int, tuple[int, int]]) -> dict[str, Case]:
    """Of a U-Net under guidance: `heads` has the number and width for each time the latent is halved."""
    return {
        f"{(side >> halved) ** 2}x{width}": case(2, (side >> halved) ** 2, count, width)
        for halved, (count, width) in heads.items()
    }


SPEC = KernelSpec(
    name="self_attention",
    kernel=self_attention,
    inputs=(TensorArgument(name="qkv", shape=("batch", "tokens", "3 * heads * width"), dtype="T"),),
    scalars={"tokens": "tokens"},
    outputs=(TensorArgument(name="out", shape=("batch", "tokens", "heads * width"), dtype="T"),),
    fixed=("width",),
    config=config,
    grid=("cdiv(tokens, BLOCK_L)", "batch * heads"),
    bounds=("3 * tokens * heads * width",),
    reference=reference,
    cases=(
        case(2, 130, 2, 40),
        case(1, 64, 3, 64, "bfloat16"),
        case(1, 33, 2, 80),
        case(2, 65, 1, 160, "bfloat16"),
    ),
    workloads={
        **{f"sd15 {name}": one for name, one in levels(64, SD15).items()},
        "sd15 4096x40 both sides at once": case(1, 4096, 8, 40),
        **{f"sd21 {name}": one for name, one in levels(96, SD21).items()},
        **{f"sdxl {name}": one for name, one in levels(128, XL).items()},
    },
    flops=flops,
    tolerance={"float16": 2e-3, "bfloat16": 1.6e-2},
    budget=Budget(registers=240, shared_bytes=80 * 1024),
    alternatives={"torch": fused},
)
