"""DPM-Solver-2 as k-diffusion has it, plain and ancestral: Lu et al., arXiv:2206.00927."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers.euler import ancestral
from rt.samplers.levels import SigmaSampler
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import eps_form
from rt.samplers.sampler import choice
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class DPM2(SigmaSampler):
    """Options of diffusers' KDPM2DiscreteScheduler."""

    rounds_karras: ClassVar[bool] = True

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = choice("epsilon", "v_prediction")
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = choice(False)
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """Two rows a step, and one for the last, which ends at σ = 0."""
        t, sigmas = self.levels(steps, timesteps)
        down, up = self.split(sigmas)
        middle = np.sqrt(sigmas[:-2] * down[:-1])
        told = np.insert(t, np.arange(1, steps), self.noise.timestep_of(middle))
        table = dpm2(self.prediction_type, sigmas, middle, down, up)
        return table.schedule(told, self.init_noise_sigma(sigmas))

    def split(self, sigmas: Floats) -> tuple[Floats, Floats]:
        """The level each step goes down to, and the fresh noise that brings it up to the next, both (N,)."""
        return sigmas[1:], np.zeros(len(sigmas) - 1)


@dataclass(frozen=True, kw_only=True)
class DPM2Ancestral(DPM2):
    """Options of diffusers' KDPM2AncestralDiscreteScheduler, which are those of the plain one."""

    def split(self, sigmas: Floats) -> tuple[Floats, Floats]:
        """Part of each step as fresh noise."""
        return ancestral(sigmas[:-1], sigmas[1:])


def dpm2(prediction_type: str, sigmas: Floats, middle: Floats, down: Floats, up: Floats) -> Table:
    """Steps from σ (N + 1,) through `middle` (N − 1,) to `down`, plus noise `up` (N,), with h = ε = dx/dσ.

    Algorithm 1 of Lu et al. in unscaled samples, with the middle at half of the step in log σ:

        x̂ = x + (σ_mid − σ) · d(x, σ)          x' = x + (σ_down − σ) · d(x̂, σ_mid) + σ_up · z
    """
    sigma, n = sigmas[:-1], len(sigmas) - 1
    seen = np.insert(sigma, np.arange(1, n), middle)

    table = Table(2 * n - 1)
    table.c_in = 1 / np.sqrt(seen**2 + 1)
    table.p, table.q = eps_form(prediction_type, 1.0, seen)
    table.a[0::2, 0] = 1
    table.b[0::2, 0] = np.append(middle, 0) - sigma
    table.a[1::2, 1] = 1
    table.b[1::2, 0] = (down - sigma)[:-1]
    table.n[1::2] = up[:-1]
    return table
