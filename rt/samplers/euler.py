"""Euler's method, plain and ancestral, over the noise levels of Karras et al., arXiv:2206.00364."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers.levels import SigmaSampler
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import x0_form
from rt.samplers.sampler import choice
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class Euler(SigmaSampler):
    """Options of diffusers' EulerDiscreteScheduler."""

    takes_timesteps: ClassVar[bool] = True

    prediction_type: str = choice("epsilon", "v_prediction", "sample", reads_as={"original_sample": "sample"})
    rescale_betas_zero_snr: bool = False
    interpolation_type: str = choice("linear")
    timestep_type: str = choice("discrete")
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = choice(False)
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = choice("zero", "sigma_min")
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t, sigmas = self.levels(steps, timesteps)
        table = euler(self.prediction_type, sigmas[:-1], sigmas[1:])
        return table.schedule(t, self.init_noise_sigma(sigmas))


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(SigmaSampler):
    """Options of diffusers' EulerAncestralDiscreteScheduler."""

    prediction_type: str = choice("epsilon", "v_prediction")
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t, sigmas = self.levels(steps, timesteps)
        down, up = ancestral(sigmas[:-1], sigmas[1:])
        table = euler(self.prediction_type, sigmas[:-1], down)
        table.n = up
        return table.schedule(t, self.init_noise_sigma(sigmas))


def euler(prediction_type: str, sigma: Floats, sigma_next: Floats) -> Table:
    """Steps from σ to σ', both (N,): x' = x + (σ' − σ) · (x − x_0)/σ (algorithm 2 without churn).

    Written as x' = (σ'/σ) · x + (1 − σ'/σ) · x_0, with h = x_0: a mean of two terms, where nothing
    cancels, also from σ = 4096 at zero terminal SNR.
    """
    table = Table(len(sigma))
    table.c_in = 1 / np.sqrt(sigma**2 + 1)
    table.p, table.q = x0_form(prediction_type, 1.0, sigma)
    table.a[:, 0] = sigma_next / sigma
    table.b[:, 0] = 1 - sigma_next / sigma
    return table


def ancestral(sigma: Floats, sigma_next: Floats) -> tuple[Floats, Floats]:
    """Each step from σ to σ' split into one down and fresh noise up: σ'² = down² + up².

    diffusers takes down as √(σ'² − up²) in float32, which cancels in long steps; it is σ'²/σ.
    """
    return sigma_next**2 / sigma, sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)
