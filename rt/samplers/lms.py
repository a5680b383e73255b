"""The linear multistep method of k-diffusion, over the noise levels of Karras et al., arXiv:2206.00364."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers.lagrange import lagrange_basis
from rt.samplers.levels import SigmaSampler
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import eps_form
from rt.samplers.sampler import choice
from rt.samplers.table import Schedule, Table

ORDER = 4


@dataclass(frozen=True, kw_only=True)
class LMS(SigmaSampler):
    """Options of diffusers' LMSDiscreteScheduler, at its order of 4."""

    karras_takes_range: ClassVar[bool] = False

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = choice(False)
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t, sigmas = self.levels(steps, timesteps)
        return lms(self.prediction_type, sigmas).schedule(t, self.init_noise_sigma(sigmas))


def lms(prediction_type: str, sigmas: Floats) -> Table:
    """Steps down `sigmas` (N + 1,), with h = ε, the derivative dx/dσ (equation 1 at α = 1).

    x_{i+1} − x_i is the integral over [σ_i, σ_{i+1}] of the polynomial through the last four derivatives.
    """
    table = Table(len(sigmas) - 1)
    table.c_in = 1 / np.sqrt(sigmas[:-1] ** 2 + 1)
    table.p, table.q = eps_form(prediction_type, 1.0, sigmas[:-1])
    table.a[:, 0] = 1
    for i in range(len(table.p)):
        nodes = sigmas[max(0, i + 1 - ORDER) : i + 1][::-1] - sigmas[i]
        for j, basis in enumerate(lagrange_basis(nodes)):
            table.b[i, j] = basis.integ()(sigmas[i + 1] - sigmas[i])
    return table
