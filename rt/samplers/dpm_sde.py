"""DPM-Solver++ of second order with fresh noise, as k-diffusion has it: DPM++ SDE and DPM++ 2S a (arXiv:2211.01095).

From σ to σ', through a level σ_m between them: with (down, up) as an ancestral step splits σ → σ', and likewise
(down_m, up_m), a step down is a mean of the sample and a prediction of x_0 on the way:

    x_m = (down_m/σ) · x + (1 − down_m/σ) · x_0(x, σ)      + up_m · z_m
    x'  = (down/σ)   · x + (1 − down/σ)   · x_0(x_m, σ_m)  + up · z'

DPM++ 2S a has its middle in log σ on the way to `down`, and no noise there. DPM++ SDE has it on the way to σ', and
both of its noises belong to one Brownian path W, which goes by σ:

    z_m = (W(σ) − W(σ_m))/√(σ − σ_m)
    z'  = (W(σ) − W(σ'))/√(σ − σ')  =  √ρ · z_m + √(1 − ρ) · z,    ρ = (σ − σ_m)/(σ − σ')

z is drawn, as every sampler's noise, from the picture's seed, one draw a row. diffusers takes W from torchsde, with a
seed of its own that is random unless `noise_sampler_seed` says it: a path of the same law, but another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers.euler import ancestral
from rt.samplers.levels import SigmaSampler
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import x0_form
from rt.samplers.sampler import choice
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class DPM2SAncestral(SigmaSampler):
    """k-diffusion's `sample_dpmpp_2s_ancestral`, with the options of the class below: diffusers has no such class."""

    karras_takes_range: ClassVar[bool] = False

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
        table, middle = self.table(sigmas)
        told = np.insert(t, np.arange(1, steps), self.noise.timestep_of(middle))
        return table.schedule(told, self.init_noise_sigma(sigmas))

    def table(self, sigmas: Floats) -> tuple[Table, Floats]:
        """The rows, and the levels (N − 1,) in the middle of all steps but the last."""
        down, _ = ancestral(sigmas[:-2], sigmas[1:-1])
        middle = np.sqrt(sigmas[:-2] * down)
        return dpmpp_2s(self.prediction_type, sigmas, middle, middle), middle


@dataclass(frozen=True, kw_only=True)
class DPMSolverSDE(DPM2SAncestral):
    """Options of diffusers' DPMSolverSDEScheduler."""

    noise_sampler_seed: int | None = choice(None)

    def table(self, sigmas: Floats) -> tuple[Table, Floats]:
        """As for DPM++ 2S a, but with noise in the middle."""
        sigma, sigma_next = sigmas[:-2], sigmas[1:-1]
        middle = np.sqrt(sigma * sigma_next)
        down_m, up_m = ancestral(sigma, middle)
        table = dpmpp_2s(self.prediction_type, sigmas, middle, down_m)

        # z_m is not kept, but what it is in: z_m = (x_m − down_m/σ · x − (1 − down_m/σ) · x_0)/up_m. That is the x_m
        # which the row before has left: the path knows nothing of what a caller changes.
        rho = (sigma - middle) / (sigma - sigma_next)
        first, second = np.s_[0:-1:2], np.s_[1::2]
        again = table.n[second] * np.sqrt(rho) / up_m
        table.a[second, 0] = again
        table.a[second, 1] -= again * down_m / sigma
        table.b[second, 1] = -again * (1 - down_m / sigma)
        table.n[first] = up_m
        table.n[second] *= np.sqrt(1 - rho)
        table.unsteered[second] = True
        return table, middle


def dpmpp_2s(prediction_type: str, sigmas: Floats, middle: Floats, down_m: Floats) -> Table:
    """Steps from σ (N + 1,) through `middle` (N − 1,), which is reached by a step to `down_m`; h is x_0."""
    sigma, n = sigmas[:-1], len(sigmas) - 1
    seen = np.insert(sigma, np.arange(1, n), middle)
    down, up = ancestral(sigma, sigmas[1:])

    table = Table(2 * n - 1)
    table.c_in = 1 / np.sqrt(seen**2 + 1)
    table.p, table.q = x0_form(prediction_type, 1.0, seen)
    to_middle = np.append(down_m / sigma[:-1], 0)
    table.a[0::2, 0] = to_middle
    table.b[0::2, 0] = 1 - to_middle
    table.a[1::2, 1] = (down / sigma)[:-1]
    table.b[1::2, 0] = (1 - down / sigma)[:-1]
    table.n[1::2] = up[:-1]
    return table
