"""Mean and squared deviations in one pass, without the cancellation of E[x²] − E[x]².

Welford, "Note on a method for calculating corrected sums of squares and products", 1962; merging parts after Chan,
Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
Everywhere m2 is Σ(x − mean)², so the variance is m2 / count.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def accumulate(value, mean, m2, count, valid):
    """One more `value` in each lane, the `count`-th there, where `valid`: the new mean and m2."""
    delta = tl.where(valid, value - mean, 0.0)
    mean += delta * (1.0 / count)
    m2 += tl.where(valid, delta * (value - mean), 0.0)
    return mean, m2


@triton.jit
def seen(total, lane, step):
    """How many of `total` values each lane has met that takes every `step`-th; 0 for one that starts past the end."""
    return ((total - lane + step - 1) // step).to(tl.float32)


@triton.jit
def merge(mean, m2, count, axis: tl.constexpr):
    """The lanes along `axis`, each over `count` values, as one lane: its mean and m2. Lanes of 0 values have m2 = 0."""
    whole = tl.sum(mean * count, axis) / tl.maximum(tl.sum(count, axis), 1.0)
    apart = mean - tl.expand_dims(whole, axis)
    return whole, tl.sum(m2 + count * apart * apart, axis)
