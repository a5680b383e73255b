"""DPM-Solver and DPM-Solver++, multistep and singlestep: Lu et al., arXiv:2206.00927 and arXiv:2211.01095.

All of them integrate the exact solution of the diffusion ODE (or SDE) over a step in λ, with the network's
output replaced by a polynomial in λ through those known: D_0 its value where the step starts, D_1 and D_2 its
first two derivatives there, in units of the step. From s to t:

    DPM-Solver++        x_t = (σ_t/σ_s) · x_s + α_t · (φ_1 · D_0 + φ_2 · D_1 + φ_3 · D_2)     u = λ_t − λ_s
    DPM-Solver          x_t = (α_t/α_s) · x_s + σ_t · (φ_1 · D_0 + φ_2 · D_1 + φ_3 · D_2)     u = λ_s − λ_t
    SDE-DPM-Solver++    as the first, with e^(λ_s − λ_t) · x_s, and + σ_t · √φ_1 · z          u = 2(λ_t − λ_s)

    φ_1 = 1 − e^(−u)      φ_2 = 1 − φ_1/u, or φ_1/2 at a midpoint      φ_3 = 1/2 − (u − φ_1)/u²

The history holds what is extrapolated: x_0 for the ++ solvers, else ε. Multistep has half of D_2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.errors import ConfigError
from rt.samplers.levels import LambdaSampler, alpha_sigma_lambda
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import eps_form, x0_form
from rt.samplers.sampler import choice
from rt.samplers.table import HISTORY, Schedule, Table

_FIXED = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
_DEIS_OR_UNIPC = {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}


@dataclass(frozen=True, kw_only=True)
class DPMSolver(LambdaSampler):
    """Options that the multistep and the singlestep scheduler of diffusers share."""

    takes_timesteps: ClassVar[bool] = True

    algorithm_type: str = choice(
        "dpmsolver++", "sde-dpmsolver++", "dpmsolver", reads_as={"deis": "dpmsolver++"}
    )
    solver_order: int = choice(2, 1, 3)
    solver_type: str = choice("midpoint", "heun", reads_as=_DEIS_OR_UNIPC)
    thresholding: bool = choice(False)
    variance_type: str | None = choice(None, *_FIXED)
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = choice(False)
    use_flow_sigmas: bool = choice(False)
    use_dynamic_shifting: bool = choice(False)
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = choice("zero", "sigma_min")
    lambda_min_clipped: float = -np.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm_type == "dpmsolver" and self.final_sigmas_type == "zero":
            raise ConfigError(
                f"{type(self).__name__}: algorithm_type 'dpmsolver' got final_sigmas_type 'zero', where its "
                "last step is infinite; expected 'sigma_min'. Set it so in scheduler_config.json, or set "
                "algorithm_type to 'dpmsolver++'."
            )


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistep(DPMSolver):
    """Options of diffusers' DPMSolverMultistepScheduler."""

    rescale_betas_zero_snr: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t, levels = self.levels(steps, timesteps)
        n = len(t)
        orders = [min(i + 1, self.solver_order) for i in range(n)]
        short = self.lower_order_final and n < 15
        if short:
            orders[-2:] = [min(order, 2) for order in orders[-2:]]
        if short or self.euler_at_final or self.final_sigmas_type == "zero":
            orders[-1] = 1
        return dpm_solver(self, levels, orders, multistep=True).schedule(t)

    def _told(self, timesteps: Floats) -> Floats:
        # diffusers leaves the cosine schedule's unrounded, and then truncates them with all others.
        return np.trunc(timesteps) if self.beta_schedule == "squaredcos_cap_v2" else super()._told(timesteps)


@dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestep(DPMSolver):
    """Options of diffusers' DPMSolverSinglestepScheduler, whose timesteps are always spaced `linspace`."""

    lower_order_final: bool = False

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step: a solver step of order k spends k of them."""
        t, levels = self.levels(steps, timesteps)
        return dpm_solver(self, levels, self._orders(len(t)), multistep=False).schedule(t)

    def _orders(self, n: int) -> list[int]:
        """Rows of order 1, …, k in turn; the last is of order 1 where the options or the final sigma ask."""
        orders = [i % self.solver_order + 1 for i in range(n)]
        full = orders[-1] == self.solver_order
        if self.final_sigmas_type == "zero" or (self.lower_order_final and full):
            orders[-1] = 1
        return orders


def dpm_solver(solver: DPMSolver, levels: Floats, orders: Sequence[int], *, multistep: bool) -> Table:
    """Steps down `levels` (N + 1,) at the given order a row.

    Multistep (arXiv:2211.01095, algorithm 2): row i steps from x_i and looks back at the rows before.
    Singlestep (arXiv:2206.00927, algorithms 1 and 2): a row of order k steps again from where a row of order
    1 did, k − 1 rows back, now knowing the outputs on the way.
    """
    stochastic = solver.algorithm_type == "sde-dpmsolver++"
    noise_form = solver.algorithm_type == "dpmsolver"
    midpoint = solver.solver_type == "midpoint"
    alpha, sigma, lam = alpha_sigma_lambda(levels)
    ratio, scale, form = (alpha, sigma, eps_form) if noise_form else (sigma, alpha, x0_form)
    h = np.eye(HISTORY)

    table = Table(len(orders))
    table.p, table.q = form(solver.prediction_type, alpha[:-1], sigma[:-1])
    for i, order in enumerate(orders):
        start = 0 if multistep else order - 1
        others = [age for age in range(order) if age != start]
        step = lam[i + 1] - lam[i - start]
        r = (lam[[i - age for age in others]] - lam[i - start]) / step
        slopes = (h[others] - h[start]) / r[:, None]

        u = 2 * step if stochastic else -step if noise_form else step
        phi_1 = -np.expm1(-u)
        phi_2 = phi_1 / 2 if midpoint and order == 2 else 1 - phi_1 / u
        # The series of the SDE has +1/2, too; both classes of diffusers have −1/2, and so have we.
        phi_3 = (-0.5 if stochastic else 0.5) - (u - phi_1) / u**2

        table.a[i, start] = ratio[i + 1] / ratio[i - start] * (np.exp(-step) if stochastic else 1)
        table.b[i] = phi_1 * h[start]
        if order == 2 or (order == 3 and midpoint and not multistep):
            table.b[i] += phi_2 * slopes[0]
        elif order == 3:
            gap = r[1] - r[0]
            table.b[i] += phi_2 * (r[1] * slopes[0] - r[0] * slopes[1]) / gap
            table.b[i] += phi_3 * (slopes[1] - slopes[0]) / gap * (1 if multistep else 2)
        table.b[i] *= scale[i + 1]
        table.n[i] = sigma[i + 1] * np.sqrt(phi_1) if stochastic else 0
    return table
