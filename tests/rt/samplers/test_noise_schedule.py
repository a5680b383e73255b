"""ᾱ as diffusers has it, bit by bit."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from rt.samplers import Scheduler


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [2, 777, 1000])
def test_alphas_cumprod_is_bit_identical(schedule: str, steps: int, base_config: dict[str, Any]) -> None:
    rng = np.random.default_rng()
    config = base_config | {
        "beta_schedule": schedule,
        "num_train_timesteps": steps,
        "beta_start": rng.uniform(1e-4, 1e-3),
        "beta_end": rng.uniform(0.01, 0.02),
    }
    reference = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_array_equal(
        Scheduler.from_config(config, "ddim").sampler.noise.alphas_cumprod, reference
    )


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_zero_terminal_snr(schedule: str, name: str, base_config: dict[str, Any]) -> None:
    config = base_config | {"beta_schedule": schedule, "rescale_betas_zero_snr": True}
    kind = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}[name]
    reference = kind.from_config(config).alphas_cumprod.numpy()
    ours = Scheduler.from_config(config, name).sampler.noise.alphas_cumprod
    # torch's float32 square root may be an ulp off; the rescaling makes it 4e-6 where ᾱ is 1e-7.
    np.testing.assert_allclose(ours, reference, rtol=1e-5)
    assert ours[-1] == reference[-1] == {"ddim": 0.0, "euler": 2.0**-24}[name]
