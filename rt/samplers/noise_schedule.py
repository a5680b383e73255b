"""The forward process: how much of the image and how much noise a latent holds at each training timestep.

    x_t = α_t · x_0 + σ_t · ε,    α_t² = ᾱ_t = Π (1 − β),    σ_t² = 1 − ᾱ_t    (arXiv:2006.11239, eq. 4)

Its tables come from torch in float32, and all its roundings are repeated here: the products of ᾱ accumulate
in float64 and round once an entry, as `torch.cumprod` does on a CPU. (The exception is zero terminal SNR: the
float32 square root of torch may be an ulp off, which the rescaling makes 4e-6 at the noisiest timesteps.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]


def betas(
    schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained: Sequence[float] | None,
) -> Floats32:
    """The variance β_t added at each of the training timesteps, shape (T,)."""
    if trained is not None:
        return np.asarray(trained, np.float32)
    if schedule == "linear":
        return _linspace(beta_start, beta_end, num_train_timesteps)
    if schedule == "scaled_linear":
        return _linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    return _squared_cosine(num_train_timesteps)


def rescale_zero_terminal_snr(betas: Floats32) -> Floats32:
    """Shift and scale √ᾱ so that the last timestep is pure noise (arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    alphas: Floats32 = np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """ᾱ of every training timestep, shape (T,), float32, falling from about 1 to about 0."""

    alphas_cumprod: Floats32

    @classmethod
    def from_betas(cls, betas: Floats32, *, zero_snr: bool = False, floor: float = 0.0) -> NoiseSchedule:
        """With `zero_snr` the last ᾱ is `floor`: above 0 where a sampler divides by it to get σ/α."""
        if not zero_snr:
            return cls(_cumprod(1 - betas))
        alphas_cumprod = _cumprod(1 - rescale_zero_terminal_snr(betas))
        alphas_cumprod[-1] = floor
        return cls(alphas_cumprod)

    @cached_property
    def sigmas(self) -> Floats32:
        """σ_t/α_t, the noise level when the image has unit scale (Karras et al., arXiv:2206.00364)."""
        sigmas: Floats32 = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        return sigmas

    @cached_property
    def log_sigmas(self) -> Floats32:
        """−λ_t: minus half the log signal-to-noise ratio."""
        return np.log(self.sigmas)

    def at(self, timesteps: Floats, final: float = 1.0) -> Floats:
        """ᾱ at integer timesteps; `final` before the first one."""
        t = timesteps.astype(np.int64)
        return np.where(t < 0, final, self.alphas_cumprod[np.maximum(t, 0)]).astype(np.float64)

    def sigma_at(self, timesteps: Floats) -> Floats:
        """The noise level at timesteps that need not be whole: linear between neighbours."""
        return np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas)

    def timestep_of(self, sigmas: Floats) -> Floats:
        """The fractional timesteps (N,) of noise levels (N,): linear in log σ, held at both ends."""
        # The differences stay in the precision that diffusers takes them in, because some of its classes
        # truncate the result, where 998.9999999 and 999 are a timestep apart.
        log_sigma = np.log(sigmas)
        # The last one that is not above: with zero terminal SNR the levels before the last may be above it.
        reached = self.log_sigmas <= log_sigma[:, None]
        last = len(self.sigmas) - 1 - reached[:, ::-1].argmax(axis=1)
        low = np.where(reached.any(axis=1), np.minimum(last, len(self.sigmas) - 2), 0)
        below, above = self.log_sigmas[low], self.log_sigmas[low + 1]
        w = np.clip((below - log_sigma) / (below - above), 0, 1)
        timesteps: Floats = (1 - w) * low + w * (low + 1)
        return timesteps


def _linspace(start: float, end: float, n: int) -> Floats32:
    # torch walks from both ends with one fused multiply-add an element, which float64 reproduces exactly.
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(n - 1, 1)))
    i = np.arange(n)
    values: Floats = np.where(i < n // 2, first + step * i, last - step * (n - 1 - i))
    return values.astype(np.float32)


def _cumprod(alphas: Floats32) -> Floats32:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _squared_cosine(n: int) -> Floats32:
    """ᾱ(t) = cos²((t + 0.008)/1.008 · π/2), each β capped at 0.999 (arXiv:2102.09672, eq. 17)."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)], np.float32)
