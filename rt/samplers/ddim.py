"""DDIM: Song, Meng and Ermon, arXiv:2010.02502."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import x0_form
from rt.samplers.sampler import Sampler, choice
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """Options of diffusers' DDIMScheduler; `eta` scales the noise added, from 0 (none) to 1 (as DDPM)."""

    eta: float = 0.0
    clip_sample: bool = choice(False, default=True)
    thresholding: bool = choice(False)
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = choice("leading", "linspace", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        noise = self.noise
        t = np.round(self.spaced(steps))
        # The step is always T/N long, also where the spacing is not: diffusers' DDIM does so.
        previous = t - self.num_train_timesteps // steps
        final = 1.0 if self.set_alpha_to_one else float(noise.alphas_cumprod[0])
        return ddim(self.prediction_type, noise.at(t), noise.at(previous, final), self.eta).schedule(t)


def ddim(prediction_type: str, alpha_bar: Floats, alpha_bar_s: Floats, eta: float) -> Table:
    """Steps from ᾱ_t to ᾱ_s, both (N,): equation 12, with h the predicted x_0 and ε = (x − α_t · x_0)/σ_t.

    x_s = α_s · x_0 + √(σ_s² − ς²) · ε + ς · z,    ς² = η² · (σ_s²/σ_t²) · (1 − ᾱ_t/ᾱ_s)   (equation 16)
    """
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    alpha_s, sigma_s = np.sqrt(alpha_bar_s), np.sqrt(1 - alpha_bar_s)
    fresh = eta * sigma_s / sigma * np.sqrt(1 - alpha_bar / alpha_bar_s)
    kept = np.sqrt(sigma_s**2 - fresh**2) / sigma

    table = Table(len(alpha_bar))
    table.p, table.q = x0_form(prediction_type, alpha, sigma)
    table.a[:, 0] = kept
    table.b[:, 0] = alpha_s - kept * alpha
    table.n = fresh
    return table
