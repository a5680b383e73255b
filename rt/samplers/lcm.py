"""Latent consistency models: Luo et al., arXiv:2310.04378."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.samplers import spacing
from rt.samplers.noise_schedule import Floats
from rt.samplers.prediction import x0_form
from rt.samplers.sampler import Sampler, choice
from rt.samplers.table import Schedule, Table

_SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class Consistency(Sampler):
    """A sampler of a model that was distilled at some of the training timesteps."""

    takes_timesteps: ClassVar[bool] = True

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = choice("scaled_linear", "linear", "squaredcos_cap_v2")
    original_inference_steps: int = 50
    clip_sample: bool = choice(False)
    thresholding: bool = choice(False)
    rescale_betas_zero_snr: bool = False

    def timesteps(self, steps: int, listed: Sequence[int] | None) -> Floats:
        """Those of the distillation, or those listed, shape (N,)."""
        if listed is not None:
            return np.array(listed, np.float64)
        return spacing.distilled(self.original_inference_steps, steps, self.num_train_timesteps)


@dataclass(frozen=True, kw_only=True)
class LCM(Consistency):
    """Options of diffusers' LCMScheduler."""

    timestep_scaling: float = 10.0

    def schedule(self, steps: int, timesteps: Sequence[int] | None = None) -> Schedule:
        """A row a step."""
        t = self.timesteps(steps, timesteps)
        alpha_bar = self.noise.at(t)
        scaled = t * self.timestep_scaling
        return lcm(self.prediction_type, scaled, alpha_bar, np.append(alpha_bar[1:], 1.0)).schedule(t)


def lcm(prediction_type: str, scaled: Floats, alpha_bar: Floats, alpha_bar_s: Floats) -> Table:
    """Consistency sampling from ᾱ_t to ᾱ_s, both (N,), at timesteps in the units of c_skip: algorithm 1 of
    arXiv:2303.01469, with h the predicted x_0.

        x_s = α_s · (c_out · x_0 + c_skip · x) + σ_s · z
    """
    alpha_s, sigma_s = np.sqrt(alpha_bar_s), np.sqrt(1 - alpha_bar_s)
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2)

    table = Table(len(scaled))
    table.p, table.q = x0_form(prediction_type, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    table.a[:, 0] = alpha_s * c_skip
    table.b[:, 0] = alpha_s * c_out
    table.n = sigma_s
    return table
