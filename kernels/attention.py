"""Attention with its heads, without the matrix of weights in memory.

    out[b, t, h] = Σ_s softmax_s(q[b, t, h] · k[b, s, h] / √d) v[b, s, h]

    query (B, L, H · d), key (B, S, H · d), value (B, S, H · d) → out (B, L, H · d)

It is `rt::attention` of export/operators.py: heads lie side by side in the last dimension, so nothing is transposed.

FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 1: a program keeps a block of queries and goes through the
keys; maximum and sum of each row are corrected on the way. Products are in T with sums in fp32, all else is in fp32.

Triton's tiles are powers of two, and the heads of SD 1.5 are 40, 80 and 160 wide. Rather than padded to 64, 128 and 256
a head is taken apart into two tiles, 32 + 16, 64 + 16 and 128 + 32: each product is two, and only 40 has any padding
left.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rt.kernel_image import TensorArgument
from rt.kernels.spec import Budget, Case, Config, KernelSpec

LOG2_E = tl.constexpr(math.log2(math.e))


def reference(query: Tensor, key: Tensor, value: Tensor, *, heads: int) -> tuple[Tensor]:
    """In torch."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return ((weights @ v).transpose(1, 2).flatten(2),)


@triton.jit
def _load(
    x, rows, columns, stride, end, width: tl.constexpr, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr
):
    """A tile of a matrix (end, width), zeros outside; what cannot be outside is not checked."""
    at = x + rows[:, None] * stride + columns[None, :]
    inside_row, inside_column = rows[:, None] < end, columns[None, :] < width
    if CHECK_ROWS and CHECK_COLUMNS:
        tile = tl.load(at, inside_row & inside_column, 0.0)
    elif CHECK_ROWS:
        tile = tl.load(at, inside_row, 0.0)
    elif CHECK_COLUMNS:
        tile = tl.load(at, inside_column, 0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def attention(
    query,
    key,
    value,
    queries,
    keys,
    out,
    width: tl.constexpr,
    heads: tl.constexpr,
    WIDE: tl.constexpr,  # a head is so many columns
    NARROW: tl.constexpr,  # and up to so many more, or none
    BLOCK_L: tl.constexpr,  # queries of a program
    BLOCK_S: tl.constexpr,  # keys at a time
):
    """In Triton: a program for `BLOCK_L` queries of a head."""
    row: tl.constexpr = heads * width
    attend(query, key, value, queries, keys, out, row, width, heads, WIDE, NARROW, BLOCK_L, BLOCK_S)


@triton.jit
def attend(
    query,
    key,
    value,
    queries,
    keys,
    out,
    stride: tl.constexpr,  # of a row of query, key or value
    width: tl.constexpr,
    heads: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """What a program of `attention` does; the operands may lie in wider rows."""
    scale: tl.constexpr = LOG2_E / width**0.5  # exp(x) = 2^(x · log2 e)
    wide_padded: tl.constexpr = width < WIDE
    narrow_padded: tl.constexpr = width < WIDE + NARROW
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    query += batch * queries * stride + head * width
    key += batch * keys * stride + head * width
    value += batch * keys * stride + head * width
    out += (batch * queries * heads + head) * width

    t = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    wide = tl.arange(0, WIDE)
    q_wide = _load(query, t, wide, stride, queries, width, True, wide_padded)
    y_wide = tl.zeros((BLOCK_L, WIDE), tl.float32)
    if NARROW:
        narrow = WIDE + tl.arange(0, NARROW)
        q_narrow = _load(query, t, narrow, stride, queries, width, True, narrow_padded)
        y_narrow = tl.zeros((BLOCK_L, NARROW), tl.float32)
    largest = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)

    whole = keys // BLOCK_S * BLOCK_S
    for ragged in tl.static_range(2):  # whole blocks of keys, then what is left
        first, end = (whole, keys) if ragged else (0, whole)
        for start in tl.range(first, end, BLOCK_S, num_stages=1 if ragged else None):
            s = start + tl.arange(0, BLOCK_S)
            k = _load(key, s, wide, stride, keys, width, ragged, wide_padded)
            logits = tl.dot(q_wide, k.T)
            if NARROW:
                k_narrow = _load(key, s, narrow, stride, keys, width, ragged, narrow_padded)
                logits = tl.dot(q_narrow, k_narrow.T, logits)
            if ragged:
                logits = tl.where(s[None, :] < keys, logits, float("-inf"))

            before = largest
            largest = tl.maximum(before, tl.max(logits, 1) * scale)
            shrink = tl.exp2(before - largest)
            weights = tl.exp2(logits * scale - largest[:, None])

            w = weights.to(value.dtype.element_ty)
            if NARROW:
                v_narrow = _load(value, s, narrow, stride, keys, width, ragged, narrow_padded)
                y_narrow = tl.dot(w, v_narrow, y_narrow * shrink[:, None])
            v = _load(value, s, wide, stride, keys, width, ragged, wide_padded)
            y_wide = tl.dot(w, v, y_wide * shrink[:, None])
            total = total * shrink + tl.sum(weights, 1)  # last: the products of a Hopper run meanwhile

    row, inside = out + t[:, None] * (heads * width), t[:, None] < queries
    y_wide = (y_wide / total[:, None]).to(out.dtype.element_ty)
    tl.store(row + wide[None, :], y_wide, inside & (wide[None, :] < width))
    if NARROW:
        y_narrow = (y_narrow / total[:, None]).to(out.dtype.element_ty)
        tl.store(row + narrow[None, :], y_narrow, inside & (narrow[None, :] < width))


def split(width: int) -> tuple[int, int]:
    """A head as two powers of two that hold it, the second 0 where one is enough; products want at least 16."""
    wide = max(16, 1 << width.bit_length() - 1)
    rest = max(0, width - wide)
    narrow = max(16, triton.next_power_of_2(rest)) if rest else 0
    return (2 * wide, 0) if narrow == wide else (wide, narrow)


def config(case: Case) -> Config:
    """Tiles by the width of a head; all fit the 99 KB of shared memory that consumer GPUs have.

    Queries and the sums of the output stay on chip, so wide heads leave room for few of them: at 512 a program has
    32, and the tensor cores of a Hopper, which want 64, are used as those of an Ampere.
    """
    wide, narrow = split(case.sizes["width"])
    queries, keys, stages = next(tile for most, tile in TILES.items() if wide + narrow <= most)
    if case.sizes["keys"] < 128:  # a text of 77 tokens is 96 keys, not 128
        keys = min(keys, 32)
    constants = {"WIDE": wide, "NARROW": narrow, "BLOCK_L": queries, "BLOCK_S": keys}
    return Config(constants=constants, warps=8, stages=stages)


TILES = {64: (128, 64, 3), 96: (128, 64, 2), 128: (128, 32, 3), 192: (64, 32, 2), 512: (32, 32, 1)}
"""Padded width of a head, at most, to queries, keys and stages."""


def fused(query: Tensor, key: Tensor, value: Tensor, *, heads: int) -> Tensor:
    """What torch chooses among its own kernels and cuDNN's."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def flops(case: Case) -> int:
    """Two products."""
    size = case.sizes
    return 4 * size["batch"] * int(case.attributes["heads"]) * size["queries"] * size["keys"] * size["width"]


def case(batch: int, queries: int, keys: int, heads: int, width: int, dtype: str = "float16") -> Case:
    """Sizes by name."""
    sizes = {"batch": batch, "queries": queries, "keys": keys, "width": width}
    return Case(sizes=sizes, attributes={"heads": heads}, dtype=dtype)


def levels(batch: int, side: int, heads: dict[int, tuple[int, int]]) -> dict[str, Case]:
    """Self- and cross-attention of a U-Net: `heads` has the number and width for each time the latent is halved."""
    found = {}
    for halved, (count, width) in heads.items():
        pixels = (side >> halved) ** 2
        found[f"{pixels}x{width}"] = case(batch, pixels, pixels, count, width)
        found[f"{pixels}x{width} text"] = case(batch, pixels, 77, count, width)
    return found


SD15 = {0: (8, 40), 1: (8, 80), 2: (8, 160), 3: (8, 160)}
SD21 = {0: (5, 64), 1: (10, 64), 2: (20, 64), 3: (20, 64)}
XL = {1: (10, 64), 2: (20, 64)}
WORKLOADS = {
    **{f"sd15 {name}": one for name, one in levels(2, 64, SD15).items()},
    "sd15 4096x40 both sides at once": case(1, 4096, 4096, 8, 40),
    **{f"sd21 {name}": one for name, one in levels(2, 96, SD21).items()},
    **{f"sdxl {name}": one for name, one in levels(2, 128, XL).items()},
    "vae 512": case(1, 4096, 4096, 1, 512),
    "vae 1024": case(1, 16384, 16384, 1, 512),
}

SPEC = KernelSpec(
    name="attention",
    kernel=attention,
    inputs=(
        TensorArgument(name="query", shape=("batch", "queries", "heads * width"), dtype="T"),
        TensorArgument(name="key", shape=("batch", "keys", "heads * width"), dtype="T"),
        TensorArgument(name="value", shape=("batch", "keys", "heads * width"), dtype="T"),
    ),
    scalars={"queries": "queries", "keys": "keys"},
    outputs=(TensorArgument(name="out", shape=("batch", "queries", "heads * width"), dtype="T"),),
    fixed=("width",),
    config=config,
    grid=("cdiv(queries, BLOCK_L)", "batch * heads"),
    bounds=("queries * heads * width", "keys * heads * width"),
    reference=reference,
    cases=(
        case(2, 130, 77, 2, 40),
        case(1, 64, 128, 3, 40, "bfloat16"),
        case(1, 100, 200, 2, 64, "bfloat16"),
        case(1, 17, 130, 2, 80),
        case(1, 64, 64, 1, 128),
        case(2, 33, 65, 2, 160),
        case(1, 40, 50, 1, 512, "bfloat16"),
        case(1, 5, 3, 4, 8),
    ),
    workloads=WORKLOADS,
    flops=flops,
    tolerance={"float16": 2e-3, "bfloat16": 1.6e-2},
    budget=Budget(registers=240, shared_bytes=80 * 1024),
    alternatives={"torch": fused},
)
