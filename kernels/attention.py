"""Attention with its heads, without the matrix of weights in memory.

    out[b, l, h] = Σ_s softmax_s(q[b, l, h] · k[b, s, h] / √d) v[b, s, h]

    query (B, L, H · d), key (B, S, H · d), value (B, S, H · d) → out (B, L, H · d)

It is `rt::attention` of export/operators.py: heads lie side by side in the last dimension, so nothing is transposed.

FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 1: a program keeps a block of queries and goes through the
keys; maximum and sum of each row are corrected on the way. Products are in T with sums in fp32, all else is in fp32.

Tensor cores work on powers of two, and the heads of SD 1.5 are 40, 80 and 160 wide. Rather than padded to 64, 128 and 256
a head is taken apart into two powers of two, 32 + 16, 64 + 16 and 128 + 32: each product is two, and only 40 has any
padding left.
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


def reference(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, ...]:
    """The formula."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return ((weights @ v).transpose(1, 2).flatten(2),)


@triton.jit
def _load(start, rows, columns, stride, end, width: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """A tile of a matrix (end, width) with zeros outside; columns are checked only where some can be outside."""
    at = start + rows[:, None] * stride + columns[None, :]
    if CHECK_ROWS:
        return tl.load(at, (rows[:, None] < end) & (columns[None, :] < width), other=0.0)
    return tl.load(at, columns[None, :] < width, other=0.0)


@triton.jit
def attention(
    query,
    key,
    value,
    queries,
    keys,
    heads,
    out,
    width: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A program for `BLOCK_L` queries of a head, whose first `WIDE` columns and up to `NARROW` more are apart."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    stride = heads * width
    query += batch.to(tl.int64) * queries * stride + head * width
    key += batch.to(tl.int64) * keys * stride + head * width
    value += batch.to(tl.int64) * keys * stride + head * width
    out += batch.to(tl.int64) * queries * stride + head * width

    l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    wide = tl.arange(0, WIDE)
    q_wide = _load(query, l, wide, stride, queries, width, True)
    y_wide = tl.zeros((BLOCK_L, WIDE), tl.float32)
    if NARROW:
        narrow = WIDE + tl.arange(0, NARROW)
        q_narrow = _load(query, l, narrow, stride, queries, width, True)
        y_narrow = tl.zeros((BLOCK_L, NARROW), tl.float32)
    largest = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    scale: tl.constexpr = LOG2_E / width**0.5  # exp(x) = 2^(x · log2 e)

    whole = keys // BLOCK_S * BLOCK_S
    for ragged in tl.static_range(2):  # whole blocks of keys, then what is left
        first, end = (whole, keys) if ragged else (0, whole)
        for start in tl.range(first, end, BLOCK_S, num_stages=1 if ragged else None):
            s = start + tl.arange(0, BLOCK_S)
            logits = tl.dot(q_wide, _load(key, s, wide, stride, keys, width, ragged).T)
            if NARROW:
                logits = tl.dot(q_narrow, _load(key, s, narrow, stride, keys, width, ragged).T, logits)
            if ragged:
                logits = tl.where(s[None, :] < keys, logits, float("-inf"))

            before = largest
            largest = tl.maximum(before, tl.max(logits, 1) * scale)
            shrink = tl.exp2(before - largest)
            weights = tl.exp2(logits * scale - largest[:, None])
            total = total * shrink + tl.sum(weights, 1)

            weights = weights.to(value.dtype.element_ty)
            v = _load(value, s, wide, stride, keys, width, ragged)
            y_wide = tl.dot(weights, v, y_wide * shrink[:, None])
            if NARROW:
                v_narrow = _load(value, s, narrow, stride, keys, width, ragged)
                y_narrow = tl.dot(weights, v_narrow, y_narrow * shrink[:, None])

    rows = l[:, None]
    y_wide = (y_wide / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows * stride + wide[None, :], y_wide, rows < queries)
    if NARROW:
        y_narrow = (y_narrow / total[:, None]).to(out.dtype.element_ty)
        inside = (rows < queries) & (narrow[None, :] < width)
        tl.store(out + rows * stride + narrow[None, :], y_narrow, inside)
