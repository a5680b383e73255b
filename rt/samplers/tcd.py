"""Trajectory consistency distillation: Zheng et al., arXiv:2402.19159."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rt.samplers.lcm import Consistency
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import x0_form
from rt.samplers.table import Schedule, Table


@dataclass(frozen=True, kw_only=True)
class TCD(Consistency):
    """Options of diffusers' TCDScheduler; `eta` is the paper's γ, from 0 (no noise) to 1 (as LCM)."""

    eta: float = 0.3

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t = self.timesteps(steps, timesteps)
        noise = self.noise
        previous = np.append(t[1:], 0)
        # In float32 because the floor is a table index, and diffusers takes it of a float32 product.
        s = np.floor(np.float32(1 - self.eta) * previous.astype(np.float32))
        alpha_bar_s = noise.at(s)
        alpha_bar_u = noise.at(previous)
        alpha_bar_u[-1] = alpha_bar_s[-1]
        if self.eta == 0:
            alpha_bar_u = alpha_bar_s
        return tcd(self.prediction_type, noise.at(t), alpha_bar_s, alpha_bar_u).schedule(t)


def tcd(prediction_type: str, alpha_bar: Floats, alpha_bar_s: Floats, alpha_bar_u: Floats) -> Table:
    """Strategic stochastic sampling from ᾱ_t down to ᾱ_s and up to ᾱ_u, all (N,): algorithm 2.

    With h the predicted x_0 and ε = (x − α_t · x_0)/σ_t,

        x_s = α_s · x_0 + σ_s · ε          x_u = √(ᾱ_u/ᾱ_s) · x_s + √(1 − ᾱ_u/ᾱ_s) · z
    """
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    alpha_s, sigma_s = np.sqrt(alpha_bar_s), np.sqrt(1 - alpha_bar_s)
    up = np.sqrt(alpha_bar_u / alpha_bar_s)

    table = Table(len(alpha))
    table.p, table.q = x0_form(prediction_type, alpha, sigma)
    table.a[:, 0] = up * sigma_s / sigma
    table.b[:, 0] = up * (alpha_s - sigma_s * alpha / sigma)
    table.n = np.sqrt(1 - alpha_bar_u / alpha_bar_s)
    return table
