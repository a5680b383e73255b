"""Which of the training timesteps, or which noise levels, a run of N steps visits."""

from __future__ import annotations

import math

import numpy as np

from rt.errors import ConfigError
from rt.samplers.noise_schedule import Floats, NoiseSchedule

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")

# Align Your Steps (Sabour et al. 2024, arXiv:2404.14507), as published for ten steps.
_AYS = {
    "ays": (
        (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
        (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    ),
    "ays-sdxl": (
        (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
        (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    ),
}
AYS_SPACINGS = tuple(_AYS)
SPACINGS = (*TIMESTEP_SPACINGS, "karras", "exponential", *AYS_SPACINGS)


def timesteps(
    spacing: str, n: int, total: int, *, offset: int = 0, clipped: int = 0, drop_last: bool = False
) -> Floats:
    """`n` of `total` training timesteps, from the noisy end down (arXiv:2305.08891, table 2).

    The noisiest `clipped` are left out, so that `trailing` may give fewer than `n`. With `drop_last`, n + 1
    points are laid and the cleanest is left to the final sigma. `linspace` is not yet rounded.
    """
    end = total - clipped
    points = n + 1 if drop_last else n
    if spacing == "linspace":
        return np.linspace(0.0, end - 1, points)[::-1][:n]
    if spacing == "leading":
        return (np.arange(points, dtype=np.float64) * (end // points))[::-1][:n] + offset
    # Rounding can make arange one element longer than asked for; diffusers then runs an extra step at −1.
    return np.round(np.arange(end, 0, -total / n, dtype=np.float64))[:n] - 1


def distilled(original: int, n: int, total: int) -> Floats:
    """`n` of the `original` timesteps that a consistency model was distilled at (arXiv:2310.04378).

    Raises:
        ConfigError: there are fewer of those than steps.
    """
    if original > total:
        raise ConfigError(
            f"original_inference_steps got {original}; expected at most num_train_timesteps = {total}. "
            "Correct scheduler_config.json."
        )
    if n > original:
        raise ConfigError(
            f"got {n} steps; expected at most original_inference_steps = {original}, the timesteps that this "
            "model was distilled at. Use fewer steps: four are usual."
        )
    trained = np.arange(original, 0, -1, dtype=np.float64) * (total // original) - 1
    return trained[np.linspace(0, original, n, endpoint=False).astype(np.int64)]


def karras(sigma_min: float, sigma_max: float, n: int) -> Floats:
    """`n` noise levels, evenly spaced in σ^(1/ρ) with ρ = 7 (arXiv:2206.00364, eq. 5)."""
    rho = 7.0
    ramp = np.linspace(0, 1, n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas: Floats = (high + ramp * (low - high)) ** rho
    return sigmas


def exponential(sigma_min: float, sigma_max: float, n: int) -> Floats:
    """`n` noise levels, evenly spaced in log σ."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), n))


def align_your_steps(spacing: str, n: int, noise: NoiseSchedule) -> list[int]:
    """`n` integer timesteps: the published list for ten, else its noise levels resampled, linear in log σ.

    Raises:
        ConfigError: the model does not have the 1000 timesteps of the publication, or `n` is so large that
            two steps would fall on one timestep.
    """
    published, sigmas = _AYS[spacing]
    if len(noise.sigmas) != 1000:
        raise ConfigError(
            f"spacing {spacing!r} is for models of 1000 training timesteps; this one has "
            f"{len(noise.sigmas)}. Use one of {', '.join(TIMESTEP_SPACINGS)}."
        )
    if n == len(published):
        return list(published)
    levels = np.exp(np.interp(np.linspace(0, 10, n + 1), np.arange(11), np.log(sigmas)))
    steps: list[int] = np.round(noise.timestep_of(levels[:-1])).astype(int).tolist()
    if len(set(steps)) < n:
        raise ConfigError(
            f"spacing {spacing!r} got {n} steps, and two of them share a timestep. "
            f"Use fewer steps (it is made for about 10), or one of {', '.join(TIMESTEP_SPACINGS)}."
        )
    return steps
