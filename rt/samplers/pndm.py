"""PNDM without its Runge-Kutta warm-up, known as PLMS: Liu et al., arXiv:2202.09778."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rt.samplers.noise_schedule import Floats
from rt.samplers.sampler import Sampler, choice
from rt.samplers.table import Schedule, Table

# Linear multistep weights (equation 12) of the newest output and those before it, by how many there are.
_ADAMS_BASHFORTH = {
    1: np.array([1]),
    2: np.array([3, -1]) / 2,
    3: np.array([23, -16, 5]) / 12,
    4: np.array([55, -59, 37, -9]) / 24,
}


@dataclass(frozen=True, kw_only=True)
class PNDM(Sampler):
    """Options of diffusers' PNDMScheduler.

    Its Runge-Kutta warm-up (skip_prk_steps=False) is refused: the steps after it read outputs from twelve
    evaluations before, which no row of the table holds.
    """

    prediction_type: str = choice("epsilon", "v_prediction")
    skip_prk_steps: bool = choice(True, default=False)
    set_alpha_to_one: bool = False
    timestep_spacing: str = choice("leading", "linspace", "trailing")
    steps_offset: int = 0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step, and one more: the second timestep is evaluated twice."""
        noise = self.noise
        stride = self.num_train_timesteps // steps
        t = np.round(self.spaced(steps))
        start, end = t, t - stride
        if steps > 1:
            t = np.insert(t, 1, t[1])
            start = np.insert(start, 1, t[1] + stride)
            end = np.insert(end, 1, t[1])
        final = 1.0 if self.set_alpha_to_one else float(noise.alphas_cumprod[0])
        return plms(self.prediction_type, noise.at(start), noise.at(end, final)).schedule(t)


def plms(prediction_type: str, alpha_bar: Floats, alpha_bar_s: Floats) -> Table:
    """Steps from ᾱ_t to ᾱ_s, both (N,), with h the raw output of the network, which this method extrapolates.

    Equation 11, with ε the extrapolated output m (for a velocity, ε = α_t · m + σ_t · x):

        x_s = (α_s/α_t) · x − (ᾱ_s − ᾱ_t) / (α_t · (σ_s · α_t + σ_t · α_s)) · ε

    Row 0 is an Euler step. Row 1 repeats it from x_0 with the mean of both outputs, and its own output is not
    kept: row 4 extrapolates m_4, m_3, m_2 and m_0, which is why rows read five entries of the history.
    """
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    alpha_s, sigma_s = np.sqrt(alpha_bar_s), np.sqrt(1 - alpha_bar_s)
    of_x = alpha_s / alpha
    of_m = -(alpha_bar_s - alpha_bar) / (alpha * (sigma_s * alpha + sigma * alpha_s))
    if prediction_type == "v_prediction":
        of_x, of_m = of_x + of_m * sigma, of_m * alpha

    table = Table(len(alpha_bar))
    table.q[:] = 1
    for i in range(len(alpha_bar)):
        if i == 1:
            table.a[1, 1] = of_x[1]
            table.b[1, :2] = of_m[1] / 2
            continue
        kept = [k for k in range(i, -1, -1) if k != 1][:4]
        table.a[i, 0] = of_x[i]
        for k, weight in zip(kept, of_m[i] * _ADAMS_BASHFORTH[len(kept)], strict=True):
            table.b[i, i - k] = weight
    return table
