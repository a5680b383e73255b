"""Heun's method: Karras et al., arXiv:2206.00364."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers.levels import SigmaSampler
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import eps_form
from rt.samplers.sampler import choice
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class Heun(SigmaSampler):
    """Options of diffusers' HeunDiscreteScheduler."""

    takes_timesteps: ClassVar[bool] = True

    beta_start: float = 0.00085
    beta_end: float = 0.012
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = choice(False)
    sigma_min: float | None = None
    sigma_max: float | None = None
    clip_sample: bool = choice(False)
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """Two rows a step, and one for the last, which ends at σ = 0."""
        t, sigmas = self.levels(steps, timesteps)
        return heun(self.prediction_type, sigmas).schedule(np.repeat(t, 2)[1:], self.init_noise_sigma(sigmas))


def heun(prediction_type: str, sigmas: Floats) -> Table:
    """Steps down `sigmas` (N + 1,), with h = ε, the derivative d = dx/dσ: algorithm 1.

    x̂ = x + (σ' − σ) · d(x, σ)          x' = x + (σ' − σ) · (d(x, σ) + d(x̂, σ'))/2
    """
    step = np.diff(sigmas)
    seen = np.repeat(sigmas[:-1], 2)[1:]

    table = Table(len(seen))
    table.c_in = 1 / np.sqrt(seen**2 + 1)
    table.p, table.q = eps_form(prediction_type, 1.0, seen)
    table.a[0::2, 0] = 1
    table.b[0::2, 0] = step
    table.a[1::2, 1] = 1
    table.b[1::2, 0] = table.b[1::2, 1] = step[:-1] / 2
    return table
