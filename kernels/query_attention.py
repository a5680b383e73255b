"""Cross-attention over few keys with the projection of its queries inside: the queries never reach memory.

    out[b, t, h] = Σ_s softmax_s(q[b, t, h] · k[b, s, h] / √d) v[b, s, h]        q[b, t, h] = W_h x[b, t]

    x (B, L, C), W (H · d, C), key (B, S, H · d), value (B, S, H · d) → out (B, L, H · d), all in T

It is a linear layer without bias and `attention`, one after the other: products are in T with sums in fp32, queries are
rounded to T between them, all else is in fp32. Keys of a text do not depend on the step and are inputs.

A program first multiplies its rows of x with the rows of W that belong to its heads, then goes through the keys as
`attention` does. The tensor cores of a Hopper read both factors from shared memory, and 128 columns of W at a time let
them work where 64 leave them waiting; so two heads of up to 64 columns, each in a tile of 64, are one product. Wider
heads are taken apart as in `attention`.

Programs of other heads read the same rows of x again, from L2, and by that alone, at 5.5 TB/s, the product is held to
350 TFLOP/s. What is saved is a launch and writing and reading the queries: by estimate that is about even, so this is
for builds that measure. It has not been timed on a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels import attention
from rt.kernels.attention import LOG2_E, _load, split
from rt.kernels.spec import Budget, Case, Config, KernelSpec


def reference(x: Tensor, weight: Tensor, key: Tensor, value: Tensor, *, heads: int) -> tuple[Tensor]:
    """In torch."""
    return attention.reference(F.linear(x, weight), key, value, heads=heads)


@triton.jit
def _attend(
    q_wide,
    q_narrow,
    key,
    value,
    keys,
    row,
    inside,
    stride: tl.constexpr,
    width: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One head of the rows of a program, from its queries to memory."""
    scale: tl.constexpr = LOG2_E / width**0.5
    wide_padded: tl.constexpr = width < WIDE
    narrow_padded: tl.constexpr = width < WIDE + NARROW
    wide, narrow = tl.arange(0, WIDE), WIDE + tl.arange(0, max(NARROW, 1))
    largest = tl.full(row.shape, float("-inf"), tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    y_wide, y_narrow = tl.zeros(q_wide.shape, tl.float32), tl.zeros(q_narrow.shape, tl.float32)
    for start in tl.range(0, keys, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        k_wide = _load(key, s, wide, stride, keys, width, True, wide_padded)
        v_wide = _load(value, s, wide, stride, keys, width, True, wide_padded)
        logits = tl.dot(q_wide, k_wide.T)
        if NARROW:
            k_narrow = _load(key, s, narrow, stride, keys, width, True, narrow_padded)
            logits = tl.dot(q_narrow, k_narrow.T, logits)
        logits = tl.where(s[None, :] < keys, logits * scale, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(logits, 1))
        shrink = tl.exp2(before - largest)
        weights = tl.exp2(logits - largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        w = weights.to(q_wide.dtype)
        if NARROW:
            v_narrow = _load(value, s, narrow, stride, keys, width, True, narrow_padded)
            y_narrow = tl.dot(w, v_narrow, y_narrow * shrink[:, None])
        y_wide = tl.dot(w, v_wide, y_wide * shrink[:, None])

    at, inside = row[:, None], inside[:, None]
    tl.store(at + wide[None, :], (y_wide / total[:, None]).to(q_wide.dtype), inside & (wide[None, :] < width))
    if NARROW:
        y_narrow = (y_narrow / total[:, None]).to(q_wide.dtype)
        tl.store(at + narrow[None, :], y_narrow, inside & (narrow[None, :] < width))


@triton.jit
def query_attention(
    x,
    weight,
    key,
    value,
    queries,
    keys,
    out,
    inner: tl.constexpr,
    width: tl.constexpr,
    heads: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a program
    WIDE: tl.constexpr,  # a head is so many columns
    NARROW: tl.constexpr,  # and up to so many more, or none; one head alone has any
    BLOCK_L: tl.constexpr,  # rows of a program
    BLOCK_C: tl.constexpr,  # columns of x at a time
    BLOCK_S: tl.constexpr,  # keys at a time
):
    """In Triton: a program for `BLOCK_L` rows of `HEADS` heads."""
    stride: tl.constexpr = heads * width
    ragged: tl.constexpr = inner % BLOCK_C != 0
    batch = (tl.program_id(1) // (heads // HEADS)).to(tl.int64)
    head = tl.program_id(1) % (heads // HEADS) * HEADS
    x += batch * queries * inner
    weight += head * width * inner
    key += batch * keys * stride + head * width
    value += batch * keys * stride + head * width
    out += batch * queries * stride + head * width

    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_C)
    n = tl.arange(0, HEADS * WIDE)
    # Rows of the weight and of x past the end are other ones; what they give is not used, or multiplied with zeros.
    # Offsets take half of the registers of pointers.
    left = (t % queries)[:, None] * inner + column[None, :]
    right = (n // WIDE * width + n % WIDE % width)[None, :] * inner + column[:, None]
    q_wide = tl.zeros((BLOCK_L, HEADS * WIDE), tl.float32)
    narrow = (WIDE + tl.arange(0, max(NARROW, 1))) % width
    far = narrow[None, :] * inner + column[:, None]
    q_narrow = tl.zeros((BLOCK_L, max(NARROW, 1)), tl.float32)
    for start in range(0, inner, BLOCK_C):
        if ragged:
            a = tl.load(x + start + left, (start + column < inner)[None, :], 0.0)
            b = tl.load(weight + start + right, (start + column < inner)[:, None], 0.0)
        else:
            a, b = tl.load(x + start + left), tl.load(weight + start + right)
        q_wide = tl.dot(a, b, q_wide)
        if NARROW:
            if ragged:
                c = tl.load(weight + start + far, (start + column < inner)[:, None], 0.0)
            else:
                c = tl.load(weight + start + far)
            q_narrow = tl.dot(a, c, q_narrow)

    row, inside = out + t * stride, t < queries
    q_wide, q_narrow = q_wide.to(x.dtype.element_ty), q_narrow.to(x.dtype.element_ty)
    if HEADS == 2:
        first, second = q_wide.reshape(BLOCK_L, 2, WIDE).permute(0, 2, 1).split()
        _attend(first, q_narrow, key, value, keys, row, inside, stride, width, WIDE, NARROW, BLOCK_S)
        key, value, row = key + width, value + width, row + width
        _attend(second, q_narrow, key, value, keys, row, inside, stride, width, WIDE, NARROW, BLOCK_S)
    else:
        _attend(q_wide, q_narrow, key, value, keys, row, inside, stride, width, WIDE, NARROW, BLOCK_S)


def config(case: Case) -> Config:
    """All fit the 99 KB of shared memory that consumer GPUs have, and two programs of 128 rows a Hopper's processor.

    Half as many rows where the head is wide or the programs would be fewer than the processors. A text of 77 tokens is
    five tiles of 16 keys; larger ones would pad more, and need more than the 128 registers that let a second one in.
    """
    size, heads = case.sizes, int(case.attributes["heads"])
    width = size["width"]
    wide, narrow = (max(16, triton.next_power_of_2(width)), 0) if width <= 64 else split(width)
    together = 2 if width <= 64 and heads % 2 == 0 else 1
    blocks = triton.cdiv(size["queries"], 128) * size["batch"] * heads // together
    rows = 64 if wide > 64 or blocks < 132 else 128
    constants = {
        "HEADS": together,
        "WIDE": wide,
        "NARROW": narrow,
        "BLOCK_L": rows,
        "BLOCK_C": 64,
        "BLOCK_S": 16,
    }
    return Config(constants=constants, warps=rows // 16, stages=3)


def separate(x: Tensor, weight: Tensor, key: Tensor, value: Tensor, *, heads: int) -> Tensor:
    """A product and what torch chooses for attention."""
    return attention.fused(F.linear(x, weight), key, value, heads=heads)


def flops(case: Case) -> int:
    """Three products."""
    size = case.sizes
    channels = int(case.attributes["heads"]) * size["width"]
    return 2 * size["batch"] * size["queries"] * channels * (size["inner"] + 2 * size["keys"])


def case(
    batch: int, queries: int, keys: int, heads: int, width: int, dtype: str = "float16", inner: int = 0
) -> Case:
    """Sizes by name; x is as wide as the output unless `inner` says otherwise."""
    sizes = {
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "inner": inner or heads * width,
        "width": width,
    }
    return Case(sizes=sizes, attributes={"heads": heads}, dtype=dtype)


def small_weights(case: Case, generator: torch.Generator) -> Tensor:
    """So that the queries are of the order of 1."""
    inner = case.sizes["inner"]
    rows = int(case.attributes["heads"]) * case.sizes["width"]
    return torch.randn(rows, inner, generator=generator) / math.sqrt(inner)


def levels(side: int, heads: dict[int, tuple[int, int]]) -> dict[str, Case]:
    """Cross-attention of a U-Net with guidance, as in `attention`."""
    found = {}
    for halved, (count, width) in heads.items():
        pixels = (side >> halved) ** 2
        found[f"{pixels}x{width}"] = case(2, pixels, 77, count, width)
    return found


SPEC = KernelSpec(
    name="query_attention",
    kernel=query_attention,
    inputs=(
        TensorArgument(name="x", shape=("batch", "queries", "inner"), dtype="T"),
        TensorArgument(name="weight", shape=("heads * width", "inner"), dtype="T"),
        TensorArgument(name="key", shape=("batch", "keys", "heads * width"), dtype="T"),
        TensorArgument(name="value", shape=("batch", "keys", "heads * width"), dtype="T"),
    ),
    scalars={"queries": "queries", "keys": "keys"},
    outputs=(TensorArgument(name="out", shape=("batch", "queries", "heads * width"), dtype="T"),),
    fixed=("inner", "width"),
    config=config,
    grid=("cdiv(queries, BLOCK_L)", "batch * heads // HEADS"),
    bounds=("queries * inner", "queries * heads * width", "keys * heads * width"),
    reference=reference,
    cases=(
        case(2, 130, 77, 2, 40),
        case(1, 70, 5, 3, 40, "bfloat16"),  # an odd number of heads
        case(1, 100, 130, 2, 64, "bfloat16"),
        case(2, 64, 32, 1, 64, inner=96),  # half a block of columns
        case(1, 17, 77, 2, 80, "bfloat16"),
        case(1, 33, 130, 2, 160, inner=72),
        case(2, 20, 3, 4, 8),
    ),
    workloads={
        **{f"sd15 {name}": one for name, one in levels(64, attention.SD15).items()},
        **{f"sd21 {name}": one for name, one in levels(96, attention.SD21).items()},
        **{f"sdxl {name}": one for name, one in levels(128, attention.XL).items()},
    },
    flops=flops,
    tolerance={"float16": 2e-3, "bfloat16": 3e-2},  # queries are rounded, too
    budget=Budget(registers=200, shared_bytes=98304),
    examples={"weight": small_weights},
    alternatives={"linear and attention": separate},
)
