"""DDPM: Ho, Jain and Abbeel, arXiv:2006.11239."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import x0_form
from rt.samplers.sampler import Sampler, choice
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """Options of diffusers' DDPMScheduler."""

    takes_timesteps: ClassVar[bool] = True

    variance_type: str = choice("fixed_small", "fixed_small_log", "fixed_large")
    clip_sample: bool = choice(False, default=True)
    thresholding: bool = choice(False)
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = choice("leading", "linspace", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t = np.round(self.spaced(steps)) if timesteps is None else np.array(timesteps, np.float64)
        previous = np.append(t[1:], -1)
        table = ddpm(self.prediction_type, self.noise.at(t), self.noise.at(previous), self.variance_type)
        table.n[t == 0] = 0
        return table.schedule(t)


def ddpm(prediction_type: str, alpha_bar: Floats, alpha_bar_s: Floats, variance_type: str) -> Table:
    """Steps from ᾱ_t to ᾱ_s, both (N,): the posterior of equations 6 and 7, with h the predicted x_0.

        x_s = √ᾱ_s · β/(1 − ᾱ_t) · x_0 + √(1 − β) · (1 − ᾱ_s)/(1 − ᾱ_t) · x + ς · z,    β = 1 − ᾱ_t/ᾱ_s

    ς² is β · (1 − ᾱ_s)/(1 − ᾱ_t), the small choice of section 3.2, or β, the large one.
    """
    beta = 1 - alpha_bar / alpha_bar_s
    small = np.maximum(beta * (1 - alpha_bar_s) / (1 - alpha_bar), 1e-20)

    table = Table(len(alpha_bar))
    table.p, table.q = x0_form(prediction_type, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    table.a[:, 0] = np.sqrt(1 - beta) * (1 - alpha_bar_s) / (1 - alpha_bar)
    table.b[:, 0] = np.sqrt(alpha_bar_s) * beta / (1 - alpha_bar)
    table.n = np.sqrt(beta if variance_type == "fixed_large" else small)
    return table
