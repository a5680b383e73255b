"""DEIS, in its log-ρ multistep form: Zhang and Chen, arXiv:2204.13902."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers.lagrange import lagrange_basis
from rt.samplers.levels import LambdaSampler, alpha_sigma_lambda
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import eps_form
from rt.samplers.sampler import absent, choice
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class DEIS(LambdaSampler):
    """Options of diffusers' DEISMultistepScheduler."""

    repeats_last: ClassVar[bool] = True

    solver_order: int = choice(2, 1, 3)
    thresholding: bool = choice(False)
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = choice(False)
    use_flow_sigmas: bool = choice(False)
    use_dynamic_shifting: bool = choice(False)
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = absent("sigma_min")
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t, levels = self.levels(steps, timesteps)
        n = len(t)
        orders = [min(i + 1, self.solver_order) for i in range(n)]
        if self.lower_order_final and n < 15:
            orders = [min(order, n - i) for i, order in enumerate(orders)]
        return deis(self.prediction_type, levels, orders).schedule(t)


def deis(prediction_type: str, rho: Floats, orders: Sequence[int]) -> Table:
    """Steps down ρ = σ/α (N + 1,) at the given order a row, with h = ε: equation 15 and appendix B.

        x_t/α_t = x_s/α_s + Σ_j ε_j · ∫ L_j(log ρ) dρ  over [ρ_s, ρ_t]

    L_j are the Lagrange polynomials in log ρ over the levels of the last outputs. With v = log(ρ/ρ_s),
    ∫ L dρ = ρ_s · [e^v · (L − L' + L'')].
    """
    alpha, sigma, _ = alpha_sigma_lambda(rho)
    table = Table(len(orders))
    table.p, table.q = eps_form(prediction_type, alpha[:-1], sigma[:-1])
    table.a[:, 0] = alpha[1:] / alpha[:-1]
    for i, order in enumerate(orders):
        v = np.log(rho[i + 1] / rho[i])
        nodes = np.log(rho[i + 1 - order : i + 1][::-1] / rho[i])
        for j, basis in enumerate(lagrange_basis(nodes)):
            integral = basis - basis.deriv() + basis.deriv(2)
            table.b[i, j] = alpha[i + 1] * rho[i] * (np.exp(v) * integral(v) - integral(0.0))
    return table
