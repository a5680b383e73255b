"""Every table against the scheduler of diffusers of the same name, coefficient by coefficient.

Worst differences measured over a larger grid (18,000 runs), relative to the largest coefficient of the row:
PNDM, LCM and TCD 6e-7; DPM2 1.4e-6; DPM++ 2S 6e-6; LMS and Heun 1e-5, all of it the rounding of the table to
float32 (Heun at two steps has a coefficient of 250). With zero terminal SNR the others reach 1.1e-5, because
torch's float32 square root is an ulp off in ᾱ itself. Hence the tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers import AysSchedules

from rt.errors import ConfigError
from rt.samplers import SAMPLERS, Scheduler
from rt.samplers.names import SLUGS

STEPS = (1, 2, 3, 4, 5, 10, 14, 15, 20, 50)
TOLERANCE = 2e-5

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
LEVELS: tuple[dict[str, Any], ...] = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True})
FINALS = ("zero", "sigma_min")


def _grid(**axes: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def _cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Class, options, arguments of each step."""
    zero_snr = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    everything = list(_grid(prediction_type=PREDICTIONS, timestep_spacing=SPACINGS))
    no_sample = [options for options in everything if options["prediction_type"] != "sample"]
    for options in everything:
        yield "DDIMScheduler", options, {}
        yield "DDIMScheduler", options | {"set_alpha_to_one": True}, {"eta": 0.6}
        yield "DDPMScheduler", options, {}
        for levels in LEVELS:
            yield "LMSDiscreteScheduler", options | levels, {}
            yield "EulerDiscreteScheduler", options | levels, {}
            yield "HeunDiscreteScheduler", options | levels, {}
    yield "DDIMScheduler", {}, {"eta": 1.0}
    yield "DDPMScheduler", {"variance_type": "fixed_small_log"}, {}
    yield "DDPMScheduler", {"variance_type": "fixed_large"}, {}
    yield "DDIMScheduler", {"set_alpha_to_one": None}, {}  # a null switch is off
    yield "EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, {}
    for levels in LEVELS[1:]:  # of which LMS and SDE read the range for exponential levels only
        for name in ("LMSDiscrete", "DPMSolverSDE", "Heun", "KDPM2", "DPMSolverMultistep", "DEISMultistep"):
            class_name = f"{name}Discrete" if name in ("Heun", "KDPM2") else name
            yield f"{class_name}Scheduler", levels | {"sigma_min": 0.05, "sigma_max": 12.0}, {}
    lu = {"use_lu_lambdas": True}
    # Where levels before the last are above it.
    yield "DPMSolverMultistepScheduler", lu | zero_snr | {"beta_schedule": "linear", "beta_start": 1e-4}, {}
    yield "DPMSolverMultistepScheduler", lu | {"sigma_min": 0.05, "sigma_max": 12.0}, {}
    for levels in LEVELS[1:]:
        yield "DPMSolverMultistepScheduler", lu | levels, {}
    yield "EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}, {}
    for options in no_sample:
        yield "PNDMScheduler", options, {}
        yield "EulerAncestralDiscreteScheduler", options, {}
    for options, levels in zip(no_sample, (*LEVELS, *LEVELS), strict=True):
        yield "KDPM2DiscreteScheduler", options | levels, {}
        yield "KDPM2AncestralDiscreteScheduler", options | levels, {}
        yield "DPMSolverSDEScheduler", options | levels, {}
    for name in (
        "DDIM",
        "DDPM",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
    ):
        yield f"{name}Scheduler", zero_snr, {}
    for algorithm, order, solver, final in itertools.product(
        ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"), (1, 2, 3), ("midpoint", "heun"), FINALS
    ):
        if (algorithm, final) != ("dpmsolver", "zero"):
            dpm = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
            dpm["final_sigmas_type"] = final
            yield "DPMSolverMultistepScheduler", dpm, {}
            yield "DPMSolverSinglestepScheduler", dpm, {}
    for options in everything:
        yield "DPMSolverMultistepScheduler", options, {}
        yield (
            "DPMSolverMultistepScheduler",
            options | {"algorithm_type": "sde-dpmsolver++"},
            {"generator": None},
        )
    for levels in (*LEVELS[1:], {"use_lu_lambdas": True}):
        yield "DPMSolverMultistepScheduler", levels, {}
        yield "DPMSolverMultistepScheduler", levels | {"solver_order": 3, "lower_order_final": False}, {}
    yield "DPMSolverMultistepScheduler", {"euler_at_final": True, "solver_order": 3}, {}
    yield "DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, {}
    for prediction, levels in itertools.product(PREDICTIONS, LEVELS):
        yield "DPMSolverSinglestepScheduler", levels | {"prediction_type": prediction}, {}
    yield "DPMSolverSinglestepScheduler", {"lower_order_final": True, "solver_order": 3}, {}
    for order, options in itertools.product((1, 2, 3), everything):
        yield "DEISMultistepScheduler", options | {"solver_order": order}, {}
        yield "UniPCMultistepScheduler", options | {"solver_order": order}, {}
    for levels, order in itertools.product(LEVELS[1:], (2, 3)):
        yield "DEISMultistepScheduler", levels | {"solver_order": order}, {}
        yield "UniPCMultistepScheduler", levels | {"solver_order": order}, {}
    yield "DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, {}
    for order in (1, 2, 3):
        bh1 = {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}
        yield "UniPCMultistepScheduler", bh1 | {"solver_order": order}, {}
    unlowered = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
    yield "UniPCMultistepScheduler", unlowered | {"solver_order": 3}, {}
    yield "UniPCMultistepScheduler", {"solver_order": 3, "disable_corrector": [0, 1, 4]}, {}
    for prediction in PREDICTIONS:
        yield "LCMScheduler", {"prediction_type": prediction}, {}
        for eta in (0.0, 0.3, 1.0):
            yield "TCDScheduler", {"prediction_type": prediction}, {"eta": eta}
    for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"):
        for schedule in ("linear", "squaredcos_cap_v2"):
            yield f"{name}Scheduler", {"beta_schedule": schedule, "prediction_type": "v_prediction"}, {}
    trained = np.linspace(1e-4, 0.02, 1000).tolist()
    yield "DDIMScheduler", {"trained_betas": trained}, {}
    yield "DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0}, {}
    yield "DPMSolverSinglestepScheduler", {"lambda_min_clipped": -2.0}, {}


def _name(case: tuple[str, dict[str, Any], dict[str, Any]]) -> str:
    class_name, options, step = case
    words = [f"{key}={value}" for key, value in (options | step).items() if key != "trained_betas"]
    return "-".join([class_name.removesuffix("Scheduler"), *words])


def _agree(ours: Any, reference: Any) -> None:
    n = len(reference.timesteps)
    assert len(ours.timesteps) == n
    np.testing.assert_allclose(ours.timesteps, reference.timesteps, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.c_in, reference.c_in, rtol=2e-6)
    assert ours.init_noise_sigma == pytest.approx(reference.init_noise_sigma, rel=3e-7)
    # diffusers also draws noise for a last step that multiplies it by 0: the draws before it are the same.
    assert ours.drawn <= reference.drawn
    assert reference.drawn - ours.drawn <= {n - 1}
    assert ours.difference(reference) < TOLERANCE


@pytest.mark.parametrize("case", list(_cases()), ids=_name)
def test_table_is_the_scheduler_of_diffusers(
    case: tuple[str, dict[str, Any], dict[str, Any]],
    base_config: dict[str, Any],
    diffusers_probe: Callable[..., Any],
    table_probe: Callable[..., Any],
) -> None:
    class_name, options, step = case
    config = base_config | options | {"_class_name": class_name}
    scheduler = Scheduler.from_config(config)
    for steps in STEPS:
        reference = diffusers_probe(class_name, config, steps, **step)
        assert np.isfinite(reference.samples).all()
        _agree(table_probe(scheduler.schedule(steps, eta=step.get("eta"))), reference)


ACCEPT_TIMESTEPS = (
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


@pytest.mark.parametrize("class_name", ACCEPT_TIMESTEPS)
@pytest.mark.parametrize("spacing", ["ays", "ays-sdxl"])
def test_align_your_steps_are_the_timesteps_of_diffusers(
    class_name: str,
    spacing: str,
    base_config: dict[str, Any],
    diffusers_probe: Callable[..., Any],
    table_probe: Callable[..., Any],
) -> None:
    published = {
        "ays": AysSchedules["StableDiffusionTimesteps"],
        "ays-sdxl": AysSchedules["StableDiffusionXLTimesteps"],
    }[spacing]
    config = base_config | {"_class_name": class_name}
    reference = diffusers_probe(class_name, config, 10, timesteps=published)
    _agree(table_probe(Scheduler.from_config(config, spacing=spacing).schedule(10)), reference)
    _agree(table_probe(Scheduler.from_config(config).schedule(10, timesteps=published)), reference)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_align_your_steps_at_other_counts(
    steps: int,
    base_config: dict[str, Any],
    diffusers_probe: Callable[..., Any],
    table_probe: Callable[..., Any],
) -> None:
    config = base_config | {"_class_name": "DPMSolverMultistepScheduler"}
    schedule = Scheduler.from_config(config, spacing="ays").schedule(steps)
    timesteps = schedule.timesteps.astype(int).tolist()
    assert len(schedule) == steps
    assert timesteps[0] == 999
    assert timesteps == sorted(set(timesteps), reverse=True)
    reference = diffusers_probe("DPMSolverMultistepScheduler", config, steps, timesteps=timesteps)
    _agree(table_probe(schedule), reference)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"dpmpp-2s-a"}))  # see test_k_diffusion.py
def test_table_is_diffusers_as_it_runs(
    name: str,
    base_config: dict[str, Any],
    diffusers_probe: Callable[..., Any],
    table_probe: Callable[..., Any],
) -> None:
    """Not promoted to float64: what a user of diffusers runs. Measured: 1e-7 to 8e-7."""
    scheduler = Scheduler.from_config(base_config, name)
    config = base_config | SLUGS[name].options
    reference = diffusers_probe(scheduler._class_name, config, 20, promote=False)
    assert table_probe(scheduler.schedule(20)).difference(reference) < 5e-6


def test_unipc_bh1_to_zero_is_finite(base_config: dict[str, Any]) -> None:
    """diffusers gives NaN here, an infinity times an empty sum; both variants end in h, the predicted x_0."""
    config = base_config | {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}
    schedule = Scheduler.from_config(config).schedule(10)
    assert schedule.a[-1].tolist() == [0, 0, 0]
    assert schedule.b[-1].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_nothing_is_read_from_before_the_first_row(
    name: str, steps: int, base_config: dict[str, Any]
) -> None:
    schedule = Scheduler.from_config(base_config, name).schedule(steps)
    for i in range(len(schedule)):
        assert not schedule.a[i, i + 1 :].any()
        assert not schedule.b[i, i + 1 :].any()


def test_a_trailing_run_has_as_many_steps_as_asked(base_config: dict[str, Any]) -> None:
    """At 61 steps rounding gives diffusers one more, at timestep −1."""
    config = base_config | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    schedule = Scheduler.from_config(config).schedule(61)
    assert len(schedule) == 61
    assert schedule.timesteps.min() >= 0


def test_zero_terminal_snr_has_no_epsilon(base_config: dict[str, Any]) -> None:
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = Scheduler.from_config(base_config | zero_snr, "ddim")
    with pytest.raises(ConfigError, match=r"timestep 999 has no finite coefficients .*v_prediction"):
        scheduler.schedule(10)
