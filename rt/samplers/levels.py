"""Samplers that walk down noise levels: those over σ of Karras et al., and the DPM-Solver family over λ."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rt.errors import ConfigError
from rt.samplers import spacing
from rt.samplers.noise_schedule import Floats, NoiseSchedule
from rt.samplers.sampler import Sampler, absent


@dataclass(frozen=True, kw_only=True)
class LevelSampler(Sampler):
    """A sampler of noise levels σ/α, which follow from its timesteps, or the timesteps from them."""

    # Above 0, so that σ/α and λ are finite there: σ/α = 4096.
    terminal_alpha_cumprod: ClassVar[float] = 2.0**-24
    repeats_last: ClassVar[bool] = False
    """Whether a Karras or exponential run that stops short of zero ends by repeating its last level."""
    karras_takes_range: ClassVar[bool] = True
    """Whether `sigma_min` and `sigma_max` are the ends of a Karras run, too, and not only of an exponential one."""

    def levels(self, steps: int, listed: Sequence[int] | None) -> tuple[Floats, Floats]:
        """Timesteps (N,) and noise levels (N + 1,), the last one where the run ends."""
        noise = self.noise
        timesteps = self._start(steps, noise) if listed is None else np.array(listed, np.float64)
        sigmas = noise.sigma_at(timesteps)
        final = 0.0 if self.final_sigmas_type == "zero" else float(noise.sigmas[0])
        if self.level_spacing is not None:
            lowest, highest = self._range(noise, sigmas)
            if self.level_spacing == "exponential" or (
                self.level_spacing == "karras" and self.karras_takes_range
            ):
                lowest = lowest if self.sigma_min is None else self.sigma_min
                highest = highest if self.sigma_max is None else self.sigma_max
            space = spacing.karras if self.level_spacing == "karras" else spacing.exponential
            sigmas = space(lowest, highest, steps)
            timesteps = self._told(noise.timestep_of(sigmas))
            if self.repeats_last and self.final_sigmas_type != "zero":
                final = sigmas[-1]
        # The reference keeps its levels in float32; everything derived from them is float64 here.
        return timesteps, np.append(sigmas, final).astype(np.float32).astype(np.float64)

    @abstractmethod
    def _start(self, steps: int, noise: NoiseSchedule) -> Floats:
        """The timesteps of a run that is spaced in timesteps."""

    @abstractmethod
    def _range(self, noise: NoiseSchedule, sigmas: Floats) -> tuple[float, float]:
        """The lowest and highest noise level of a run that is spaced in levels."""

    @abstractmethod
    def _told(self, timesteps: Floats) -> Floats:
        """What the network is told of the fractional timesteps of a run that is spaced in levels."""


@dataclass(frozen=True, kw_only=True)
class SigmaSampler(LevelSampler):
    """Samples are x = x_0 + σ · ε, scaled to unit variance for the network (arXiv:2206.00364, table 1)."""

    rounds_karras: ClassVar[bool] = False

    def _start(self, steps: int, noise: NoiseSchedule) -> Floats:
        return self.spaced(steps).astype(np.float32).astype(np.float64)

    def _range(self, noise: NoiseSchedule, sigmas: Floats) -> tuple[float, float]:
        return float(sigmas[-1]), float(sigmas[0])

    def _told(self, timesteps: Floats) -> Floats:
        return np.round(timesteps) if self.rounds_karras and self.use_karras_sigmas else timesteps

    def init_noise_sigma(self, sigmas: Floats) -> float:
        """The scale of x_0. With `leading` the run starts below the noisiest level."""
        top = float(sigmas.max())
        return top if self.timestep_spacing in ("linspace", "trailing") else (top**2 + 1) ** 0.5


@dataclass(frozen=True, kw_only=True)
class LambdaSampler(LevelSampler):
    """Samples are x = α · x_0 + σ · ε with α² + σ² = 1; steps are in λ = log(α/σ) (arXiv:2206.00927)."""

    lambda_min_clipped: float = absent(-np.inf)

    def _start(self, steps: int, noise: NoiseSchedule) -> Floats:
        clipped = int(np.searchsorted(-noise.log_sigmas[::-1], self.lambda_min_clipped))
        if clipped >= self.num_train_timesteps:
            raise ConfigError(
                f"lambda_min_clipped got {self.lambda_min_clipped}, which leaves no timestep; expected a value below "
                f"{-noise.log_sigmas[0]:.3g}. Correct scheduler_config.json."
            )
        return np.round(self.spaced(steps, clipped=clipped, drop_last=True))

    def _range(self, noise: NoiseSchedule, sigmas: Floats) -> tuple[float, float]:
        if self.level_spacing == "lu":
            lowest, highest = np.exp(noise.log_sigmas[[0, -1]].astype(np.float64))
            return float(lowest), float(highest)
        return float(noise.sigmas[0]), float(noise.sigmas[-1])

    def _told(self, timesteps: Floats) -> Floats:
        return np.trunc(timesteps) if self.level_spacing == "exponential" else np.round(timesteps)


def alpha_sigma_lambda(levels: Floats) -> tuple[Floats, Floats, Floats]:
    """α, σ and λ = log α − log σ at noise levels σ/α, with α² + σ² = 1; λ is +inf at level 0."""
    alpha = 1 / np.sqrt(levels**2 + 1)
    return alpha, levels * alpha, -np.log(levels)
