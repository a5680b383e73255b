"""UniPC, a unified predictor and corrector: Zhao et al., arXiv:2302.04867."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.errors import ConfigError
from rt.samplers.levels import LambdaSampler, alpha_sigma_lambda
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import x0_form
from rt.samplers.sampler import choice
from rt.samplers.table import HISTORY, Schedule, Table

_DPM_OR_DEIS = {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}


@dataclass(frozen=True, kw_only=True)
class UniPC(LambdaSampler):
    """Options of diffusers' UniPCMultistepScheduler."""

    repeats_last: ClassVar[bool] = True

    solver_order: int = choice(2, 1, 3)
    solver_type: str = choice("bh2", "bh1", reads_as=_DPM_OR_DEIS)
    predict_x0: bool = choice(True)
    solver_p: object = choice(None)
    lower_order_final: bool = True
    disable_corrector: Collection[int] = ()
    thresholding: bool = choice(False)
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = choice(False)
    use_flow_sigmas: bool = choice(False)
    use_dynamic_shifting: bool = choice(False)
    shift_terminal: float | None = choice(None)
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: str = choice("zero", "sigma_min")
    timestep_spacing: str = choice("linspace", "leading", "trailing")
    steps_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_order > 1 and self.final_sigmas_type == "zero" and not self.lower_order_final:
            raise ConfigError(
                f"UniPC: solver_order {self.solver_order} got lower_order_final=False, where its last "
                "step, to σ = 0, is infinite; expected True. Set it so in scheduler_config.json, or "
                "final_sigmas_type to 'sigma_min'."
            )

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t, levels = self.levels(steps, timesteps)
        n = len(t)
        orders = [min(i + 1, self.solver_order, n - i if self.lower_order_final else n) for i in range(n)]
        corrected = [i not in self.disable_corrector for i in range(n)]
        return unipc(self.prediction_type, levels, orders, corrected, self.solver_type).schedule(t)


def unipc(
    prediction_type: str, levels: Floats, orders: Sequence[int], corrected: Sequence[bool], solver_type: str
) -> Table:
    """Steps down `levels` (N + 1,) at the given order a row, with h the predicted x_0: algorithms 7 and 8.

    From s to t, with λ = λ_t − λ_s and D_k = (h_{s−k} − h_s)/r_k, predictor (P) and corrector (C) are

        P:  x_t  = (σ_t/σ_s) · x^c_s + α_t · (1 − e^(−λ)) · h_s − α_t · B · Σ ρ^p_k · D_k
        C:  x^c_t = the same two terms, then                  − α_t · B · (Σ ρ^c_k · D_k + ρ^c · (h_t − h_s))

    The network sees x_t; the next step starts from x^c_t, which no row stores. But all that depends on x^c_s
    is the same in both, so that their difference is a sum over the history alone,

        x^c_t − x_t = α_t · B · (Σ (ρ^p_k − ρ^c_k) · D_k − ρ^c · (h_t − h_s)),

    and the next row has x_t plus this sum where P has x^c_s. Order 3 reads h_t … h_{t−3}. That x_t is the
    predictor's own, `unsteered`: C starts from x^c_s, and of a change to x_t it knows what it does to h_t.
    """
    alpha, sigma, lam = alpha_sigma_lambda(levels)
    h = np.eye(HISTORY)
    one_row_later = np.eye(HISTORY, k=1)
    correction = np.zeros(HISTORY)

    table = Table(len(orders))
    table.p, table.q = x0_form(prediction_type, alpha[:-1], sigma[:-1])
    for i, order in enumerate(orders):
        step = lam[i + 1] - lam[i]
        r = np.append((lam[i - np.arange(1, order)] - lam[i]) / step, 1)
        D = (h[1:order] - h[0]) / r[:-1, None]
        B = -step if solver_type == "bh1" else np.expm1(-step)
        predicted = np.zeros(HISTORY)
        if order > 1:
            predicted = -alpha[i + 1] * B * _weights(r[:-1], -step, B) @ D

        ratio = sigma[i + 1] / sigma[i]
        table.a[i, 0] = ratio
        table.b[i] = ratio * correction - alpha[i + 1] * np.expm1(-step) * h[0] + predicted

        correction = np.zeros(HISTORY)
        if corrected[i] and i + 1 < len(orders):
            rho = _weights(r, -step, B)
            change = rho[:-1] @ D @ one_row_later + rho[-1] * (h[0] - h[1])
            correction = -alpha[i + 1] * B * change - predicted @ one_row_later
            table.unsteered[i + 1] = True
    return table


def _weights(r: Floats, hh: float, B: float) -> Floats:
    """ρ for outputs at the positions `r` within the step: Σ_k ρ_k · r_k^(n−1) = n! · φ_(n+1)/B, equation 11.

    With one position it is 1/2, whatever B is, as in the authors' code.
    """
    if len(r) == 1:
        return np.array([0.5])
    phi, right = np.expm1(hh) / hh, []
    for n in range(1, len(r) + 1):
        phi = (phi - 1) if n == 1 else phi / hh - 1 / math.factorial(n)
        right.append(math.factorial(n) * phi / B)
    try:
        return np.linalg.solve(np.vander(r, increasing=True).T, np.array(right))
    except np.linalg.LinAlgError:  # two outputs at one level; `Table` refuses what is not finite
        return np.full(len(r), np.nan)
