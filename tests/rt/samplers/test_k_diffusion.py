"""What diffusers does not have, against the formulas of k-diffusion's samplers, on basis vectors.

And the law of the noise that DPM++ SDE adds, whose path diffusers draws otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rt.samplers import Scheduler

Array = NDArray[np.float64]


def ancestral_step(sigma: float, sigma_next: float) -> tuple[float, float]:
    up = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def denoised(prediction_type: str, x: Array, output: Array, sigma: float) -> Array:
    if prediction_type == "epsilon":
        return x - sigma * output
    return x / (sigma**2 + 1) - sigma / (sigma**2 + 1) ** 0.5 * output


def dpmpp_2s_ancestral(prediction_type: str, sigmas: Array, basis: Array) -> tuple[Array, Array]:
    """Algorithm of `sample_dpmpp_2s_ancestral`: every sample, and the noise level that each network call sees."""
    rows = 2 * (len(sigmas) - 1) - 1
    outputs, noises = iter(basis[1 : 1 + rows]), basis[1 + rows :]
    x, samples, seen = basis[0], [basis[0]], []
    for sigma, sigma_next in pairwise(sigmas):
        x_0 = denoised(prediction_type, x, next(outputs), sigma)
        seen.append(sigma)
        down, up = ancestral_step(sigma, sigma_next)
        if down == 0:
            samples.append(x + (x - x_0) / sigma * (down - sigma))
            break
        t, t_next = -np.log(sigma), -np.log(down)
        h, r = t_next - t, 0.5
        s = t + r * h
        x_2 = np.exp(-s) / np.exp(-t) * x - np.expm1(-h * r) * x_0
        samples.append(x_2)
        x_0 = denoised(prediction_type, x_2, next(outputs), np.exp(-s))
        seen.append(np.exp(-s))
        x = np.exp(-t_next) / np.exp(-t) * x - np.expm1(-h) * x_0 + noises[len(samples) - 1] * up
        samples.append(x)
    return np.array(samples), np.array(seen)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras", "exponential"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 31])
def test_dpmpp_2s_a(
    steps: int,
    spacing: str,
    prediction_type: str,
    base_config: dict[str, Any],
    table_probe: Callable[..., Any],
) -> None:
    config = base_config | {"prediction_type": prediction_type}
    schedule = Scheduler.from_config(config, "DPM++ 2S a", spacing=spacing).schedule(steps)
    euler = Scheduler.from_config(config, "euler", spacing=spacing)
    sigmas = euler.sampler.levels(steps, None)[1]  # type: ignore[attr-defined]
    expected, seen = dpmpp_2s_ancestral(prediction_type, sigmas, np.eye(1 + 2 * len(schedule)))
    probe = table_probe(schedule)
    gap = np.abs(probe.samples - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert gap.max() < 2e-6
    np.testing.assert_allclose(schedule.c_in, (seen**2 + 1) ** -0.5, rtol=1e-6)
    told = euler.sampler.noise.timestep_of(seen)
    np.testing.assert_allclose(schedule.timesteps, told, atol=0.01)
    assert schedule.init_noise_sigma == euler.schedule(steps).init_noise_sigma


@pytest.mark.parametrize("name", ["dpmpp-sde", "dpmpp-sde-karras"])
def test_the_noise_of_dpmpp_sde_is_a_brownian_path(
    name: str, base_config: dict[str, Any], table_probe: Callable[..., Any]
) -> None:
    """What one step adds in the middle and at its end is correlated as W over [σ_m, σ] and [σ', σ] is."""
    scheduler = Scheduler.from_config(base_config, name)
    schedule = scheduler.schedule(9)
    sigmas = scheduler.sampler.levels(9, None)[1]  # type: ignore[attr-defined]
    samples = table_probe(schedule).samples[1:, 1 + len(schedule) :]
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas[:-1])):
        middle = (sigma * sigma_next) ** 0.5
        down, up = ancestral_step(sigma, sigma_next)
        down_m, up_m = ancestral_step(sigma, middle)
        before = samples[2 * step - 1] if step else np.zeros_like(samples[0])
        # The two entries of this step's draws, after a network that says ε = 0: then x_0 is the sample itself.
        z_m = (samples[2 * step] - down_m / sigma * before - (1 - down_m / sigma) * before)[2 * step :] / up_m
        drift = down / sigma * before + (1 - down / sigma) * samples[2 * step]
        z = (samples[2 * step + 1] - drift)[2 * step :] / up
        rho = (sigma - middle) / (sigma - sigma_next)
        np.testing.assert_allclose(z_m[:2], [1, 0], atol=1e-5)
        np.testing.assert_allclose(z[:2], [rho**0.5, (1 - rho) ** 0.5], atol=1e-5)
        assert not z_m[2:].any() and not z[2:].any()
