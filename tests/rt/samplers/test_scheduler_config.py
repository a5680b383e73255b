"""Names, options, and every refusal of `Scheduler`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from rt.errors import ConfigError
from rt.samplers import SAMPLERS, SPACINGS, Scheduler
from rt.samplers.names import CLASSES

NAMES = {
    "ddim": ("ddim", "DDIM"),
    "DDIMScheduler": ("ddim", "DDIM"),
    "ddpmscheduler": ("ddpm", "DDPM"),
    "PLMS": ("pndm", "PLMS"),
    "PNDMScheduler": ("pndm", "PLMS"),
    "LMS Karras": ("lms-karras", "LMS Karras"),
    "Euler": ("euler", "Euler"),
    "Euler a": ("euler-a", "Euler a"),
    "EULER_A": ("euler-a", "Euler a"),
    "EulerAncestralDiscreteScheduler": ("euler-a", "Euler a"),
    "Heun": ("heun", "Heun"),
    "DPM2": ("dpm2", "DPM2"),
    "DPM2 a": ("dpm2-a", "DPM2 a"),
    "DPM2 a Karras": ("dpm2-a-karras", "DPM2 a Karras"),
    "KDPM2AncestralDiscreteScheduler": ("dpm2-a", "DPM2 a"),
    "DPM++ 2M": ("dpmpp-2m", "DPM++ 2M"),
    "DPM++ 2M Karras": ("dpmpp-2m-karras", "DPM++ 2M Karras"),
    "dpmpp-2m-exponential": ("dpmpp-2m-exponential", "DPM++ 2M Exponential"),
    "DPM++ 2M SDE": ("dpmpp-2m-sde", "DPM++ 2M SDE"),
    "dpmpp-2m-sde-karras": ("dpmpp-2m-sde-karras", "DPM++ 2M SDE Karras"),
    "DPMSolverMultistepScheduler": ("dpmpp-2m", "DPM++ 2M"),
    "DPM++ 2S": ("dpmpp-2s", "DPM++ 2S"),
    "DPMSolverSinglestepScheduler": ("dpmpp-2s", "DPM++ 2S"),
    "deis": ("deis", "DEIS"),
    "UniPC": ("unipc", "UniPC"),
    " UniPCMultistepScheduler ": ("unipc", "UniPC"),
    "LCM": ("lcm", "LCM"),
    "tcd": ("tcd", "TCD"),
}


@pytest.mark.parametrize("asked", NAMES)
def test_name_and_label(asked: str, base_config: dict[str, Any]) -> None:
    scheduler = Scheduler.from_config(base_config, asked)
    assert (scheduler.name, scheduler.label) == NAMES[asked]
    assert Scheduler.from_config(base_config, scheduler.name) == scheduler


@pytest.mark.parametrize("slug", SAMPLERS)
def test_every_slug_is_its_own_name(slug: str, base_config: dict[str, Any]) -> None:
    assert Scheduler.from_config(base_config, slug).name == slug


def test_the_class_of_the_config_is_the_default(base_config: dict[str, Any]) -> None:
    config = base_config | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert Scheduler.from_config(config).label == "DPM++ 2M Karras"
    assert Scheduler.from_config(config | {"algorithm_type": "sde-dpmsolver++"}).name == "dpmpp-2m-sde-karras"


def test_a_slug_says_its_algorithm_and_leaves_the_rest(base_config: dict[str, Any]) -> None:
    config = base_config | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_karras_sigmas": True}
    sampler = Scheduler.from_config(config, "dpmpp-2m").sampler
    assert (sampler.algorithm_type, sampler.solver_order) == ("dpmsolver++", 2)  # type: ignore[attr-defined]
    assert sampler.use_karras_sigmas


def test_options_without_a_slug_are_named_by_their_class(base_config: dict[str, Any]) -> None:
    config = base_config | {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}
    scheduler = Scheduler.from_config(config)
    assert scheduler.name == scheduler.label == "DPMSolverMultistepScheduler"
    assert Scheduler.from_config(config, scheduler.name) == scheduler


def test_keys_carry_over_where_the_class_has_them(base_config: dict[str, Any]) -> None:
    config = base_config | {"timestep_spacing": "trailing", "use_karras_sigmas": True, "solver_type": "bh1"}
    assert Scheduler.from_config(config, "ddim").sampler.timestep_spacing == "trailing"
    assert not Scheduler.from_config(config, "ddim").sampler.use_karras_sigmas
    assert Scheduler.from_config(config, "heun").sampler.use_karras_sigmas
    assert Scheduler.from_config(config, "dpmpp-2m").sampler.solver_type == "midpoint"  # type: ignore[attr-defined]
    assert Scheduler.from_config(base_config, "ddim").sampler.timestep_spacing == "leading"
    assert Scheduler.from_config(base_config, "euler").sampler.timestep_spacing == "linspace"


def test_defaults_of_the_first_class_do_not_carry_over(base_config: dict[str, Any]) -> None:
    """`pipe.scheduler.config` lists which of its values are only the defaults of its class."""
    config = base_config | {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert Scheduler.from_config(config, "euler").sampler.timestep_spacing == "linspace"
    same = {**config, "_class_name": "EulerDiscreteScheduler"}
    assert Scheduler.from_config(same).sampler.timestep_spacing == "linspace"


def test_null_is_the_default(base_config: dict[str, Any]) -> None:
    config = base_config | {"trained_betas": None, "use_karras_sigmas": None, "variance_type": None}
    assert Scheduler.from_config(config, "dpmpp-2m") == Scheduler.from_config(base_config, "dpmpp-2m")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spacing_replaces_every_other(spacing: str, base_config: dict[str, Any]) -> None:
    config = base_config | {"use_karras_sigmas": spacing != "karras", "use_exponential_sigmas": False}
    scheduler = Scheduler.from_config(config, "dpmpp-2m", spacing=spacing)
    sampler = scheduler.sampler
    assert sampler.use_karras_sigmas is (spacing == "karras")
    assert sampler.use_exponential_sigmas is (spacing == "exponential")
    assert scheduler.align_your_steps == (spacing if spacing.startswith("ays") else None)
    assert spacing not in ("leading", "linspace", "trailing") or sampler.timestep_spacing == spacing
    assert len(scheduler.schedule(10)) == 10


def test_label_of_align_your_steps(base_config: dict[str, Any]) -> None:
    assert Scheduler.from_config(base_config, "dpmpp-2m", spacing="ays").label == "DPM++ 2M Align Your Steps"


def test_schedule_is_read_only(base_config: dict[str, Any]) -> None:
    schedule = Scheduler.from_config(base_config, "euler-a").schedule(7)
    for field in dataclasses.fields(schedule):
        column = getattr(schedule, field.name)
        if field.name != "init_noise_sigma":
            assert column.dtype == (np.bool_ if field.name in ("unsteered", "guided", "full") else np.float32)
            assert len(column) == len(schedule) == 7
            with pytest.raises(ValueError, match="read-only"):
                column[0] = 1
    assert schedule.a.shape == (7, 3)
    assert schedule.b.shape == (7, 5)
    assert schedule.noisy.tolist() == [True] * 6 + [False]
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.init_noise_sigma = 2.0  # type: ignore[misc]


def test_repr(base_config: dict[str, Any]) -> None:
    scheduler = Scheduler.from_config(base_config, "euler-a")
    assert repr(scheduler.schedule(20)) == (
        "Schedule(20 rows, timesteps 999 … 0, 19 noisy, init_noise_sigma=14.6146)"
    )
    assert "EulerAncestral(" in repr(scheduler)


def test_eta(base_config: dict[str, Any]) -> None:
    ddim = Scheduler.from_config(base_config, "ddim")
    assert not ddim.schedule(5).noisy.any()
    assert ddim.schedule(5, eta=1.0).noisy.all()
    tcd = Scheduler.from_config(base_config, "tcd")
    np.testing.assert_array_equal(tcd.schedule(4).n, tcd.schedule(4, eta=0.3).n)
    assert not tcd.schedule(4, eta=0.0).noisy.any()


ROWS = {"pndm": 11, **dict.fromkeys(("heun", "dpm2", "dpm2-a", "dpmpp-sde", "dpmpp-2s-a"), 19)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows(name: str, base_config: dict[str, Any]) -> None:
    assert len(Scheduler.from_config(base_config, name).schedule(10)) == ROWS.get(name, 10)


UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("ddim", {"clip_sample": True}, "DDIM: clip_sample got True; expected False"),
    ("ddpm", {"thresholding": True}, "DDPM: thresholding got True"),
    (
        "ddpm",
        {"variance_type": "learned_range"},
        "variance_type got 'learned_range'; expected 'fixed_small' or",
    ),
    (
        "ddpm",
        {"beta_schedule": "sigmoid"},
        "beta_schedule got 'sigmoid'; expected 'linear' or 'scaled_linear'",
    ),
    ("heun", {"clip_sample": True}, "Heun: clip_sample got True"),
    ("PNDMScheduler", {"skip_prk_steps": False}, "PNDM: skip_prk_steps got False; expected True"),
    ("pndm", {"prediction_type": "sample"}, "PNDM: prediction_type got 'sample'; expected 'epsilon'"),
    ("euler", {"use_beta_sigmas": True}, "Euler: use_beta_sigmas got True"),
    ("euler", {"interpolation_type": "log_linear"}, "interpolation_type got 'log_linear'"),
    ("euler", {"timestep_type": "continuous"}, "timestep_type got 'continuous'"),
    ("euler-a", {"prediction_type": "v_pred"}, r"got 'v_pred'; .*did you mean 'v_prediction'"),
    ("euler", {"final_sigmas_type": "sigma_max"}, r"final_sigmas_type got 'sigma_max'"),
    ("dpmpp-2m", {"use_flow_sigmas": True}, "use_flow_sigmas got True"),
    ("dpmpp-2m", {"use_dynamic_shifting": True}, "use_dynamic_shifting got True"),
    ("dpmpp-2m", {"prediction_type": "flow_prediction"}, "prediction_type got 'flow_prediction'"),
    ("dpmpp-2m", {"variance_type": "learned"}, "variance_type got 'learned'"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver"}, "got 'sde-dpmsolver'; expected"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver"},
        "'zero', where its last step is infinite",
    ),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order got 4; expected 2 or 1 or 3"),
    ("unipc", {"predict_x0": False}, "UniPC: predict_x0 got False"),
    ("unipc", {"lower_order_final": False}, "UniPC: solver_order 2 got lower_order_final=False"),
    ("unipc", {"shift_terminal": 0.1}, "UniPC: shift_terminal got 0.1"),
    ("lcm", {"clip_sample": True}, "LCM: clip_sample got True"),
    ("ddim", {"timestep_spacing": "leadin"}, "got 'leadin'; .*did you mean 'leading'"),
    ("ddim", {"steps_offset": "1"}, "steps_offset got '1'; expected a value like 0"),
    ("ddim", {"num_train_timesteps": 1}, "num_train_timesteps got 1; expected 2 to 100,000"),
    (
        "ddim",
        {"trained_betas": [0.1, 0.2]},
        "trained_betas has 2 entries; expected num_train_timesteps = 1000",
    ),
    (
        "euler",
        {"use_karras_sigmas": True, "use_exponential_sigmas": True},
        "more than one of use_karras_sigmas",
    ),
]


@pytest.mark.parametrize(("name", "options", "message"), UNSUPPORTED)
def test_an_option_that_is_not_supported_is_refused(
    name: str, options: dict[str, Any], message: str, base_config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_config(base_config | options, name)


def test_clipping_is_the_default_of_ddim_but_not_of_a_checkpoint_run_with_it(
    base_config: dict[str, Any],
) -> None:
    del base_config["clip_sample"]
    base_config["_class_name"] = "DDIMScheduler"
    with pytest.raises(
        ConfigError, match=r"clip_sample got True; expected False\. Choose another sampler, or"
    ):
        Scheduler.from_config(base_config)
    assert Scheduler.from_config(base_config, "ddim").schedule(5).timesteps[0] > 0
    with pytest.raises(ConfigError, match="clip_sample got True"):
        Scheduler.from_config(base_config | {"clip_sample": True}, "ddim")


def test_unknown_name(base_config: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown sampler 'eulr' \(did you mean 'euler'\?\); expected one of ddim"
    ):
        Scheduler.from_config(base_config, "eulr")
    with pytest.raises(ConfigError, match="unknown sampler 'FlowMatchEulerDiscreteScheduler'"):
        Scheduler.from_config(base_config | {"_class_name": "FlowMatchEulerDiscreteScheduler"})


def test_no_name(base_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'_class_name' is None; expected a class of diffusers"):
        Scheduler.from_config(base_config)


@pytest.mark.parametrize(
    ("name", "spacing", "message"),
    [
        ("ddim", "karras", "spacing got 'karras'.*expected for ddim: linspace, leading, trailing"),
        ("unipc", "ays", "spacing got 'ays'"),
        ("lcm", "trailing", "expected for lcm: ays, ays-sdxl"),
        ("dpmpp-2s", "leading", "expected for dpmpp-2s: karras, exponential, ays, ays-sdxl"),
        ("dpmpp-2m", "karas", "did you mean 'karras'"),
        ("euler-a-karras", None, "spacing got 'karras'.*expected for euler-a"),
    ],
)
def test_a_spacing_that_the_sampler_does_not_have(
    name: str, spacing: str | None, message: str, base_config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_config(base_config, name, spacing=spacing)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "20"])
def test_number_of_steps(steps: Any, base_config: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"num_inference_steps got .*; expected a whole number from 1 to 1000"
    ):
        Scheduler.from_config(base_config, "ddim").schedule(steps)


@pytest.mark.parametrize("name", ["unipc", "dpmpp-2m", "deis"])
def test_two_steps_at_one_level(name: str, base_config: dict[str, Any]) -> None:
    """Where steps are as many as timesteps, rounding lets two of these samplers' fall on one."""
    config = base_config | {"num_train_timesteps": 8}
    for order in (2, 3):
        scheduler = Scheduler.from_config(config, name)
        scheduler = dataclasses.replace(
            scheduler, sampler=dataclasses.replace(scheduler.sampler, solver_order=order)
        )
        with pytest.raises(
            ConfigError, match=r"has no finite coefficients with these options; .* Use fewer steps"
        ):
            scheduler.schedule(8)


def test_more_steps_than_the_distillation_had(base_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="got 51 steps; expected at most original_inference_steps = 50"):
        Scheduler.from_config(base_config, "lcm").schedule(51)


def test_a_spacing_that_starts_beyond_the_last_timestep(base_config: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match="1000 steps in 'leading' spacing start at timestep 1000; expected at most"
    ):
        Scheduler.from_config(base_config | {"timestep_spacing": "leading"}, "euler").schedule(1000)


def test_align_your_steps_limits(base_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="got 900 steps, and two of them share a timestep"):
        Scheduler.from_config(base_config, "euler", spacing="ays").schedule(900)
    with pytest.raises(ConfigError, match="is for models of 1000 training timesteps; this one has 500"):
        Scheduler.from_config(base_config | {"num_train_timesteps": 500}, "euler", spacing="ays").schedule(10)


@pytest.mark.parametrize(
    ("name", "timesteps", "message"),
    [
        ("ddim", [999, 500], "ddim: got timesteps, which it cannot take; expected .*ddpm, euler, heun"),
        ("euler-karras", [999, 500], "noise levels are spaced already"),
        ("euler", [999, 500, 1], "got 3 timesteps for 2 steps"),
        ("euler", [500, 999], "expected each below the one before"),
        ("euler", [1000, 500], "from at most 999 to at least 0"),
        ("euler", [5, -1], "from at most 999 to at least 0"),
        ("euler", ["a", "b"], r"timesteps got \['a', 'b'\]; expected each below the one before"),
        ("euler", "ab", "timesteps got 'ab'; expected each below the one before"),
        ("euler", 5, "timesteps got 5; expected each below the one before"),
        ("euler", [[1], [2]], "expected each below the one before"),
    ],
)
def test_timesteps(name: str, timesteps: list[int], message: str, base_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_config(base_config, name).schedule(2, timesteps=timesteps)


@pytest.mark.parametrize(
    ("name", "eta", "message"),
    [
        ("euler", 0.5, "euler: eta got 0.5; only ddim and tcd have it"),
        ("ddim", 1.5, "ddim: eta got 1.5; expected a number from 0 to 1"),
        ("tcd", float("nan"), "tcd: eta got nan"),
        ("tcd", "0.5", "tcd: eta got '0.5'; expected a number from 0 to 1"),
        ("euler", [0], r"euler: eta got \[0\]; expected a number from 0 to 1"),
        ("ddim", 10**400, "ddim: eta got 1000"),
    ],
)
def test_bad_eta(name: str, eta: float, message: str, base_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_config(base_config, name).schedule(5, eta=eta)


_ANYTHING = (
    *(None, True, False, 0, -1, 3, 10**18, 10**30, 10**400, 0.5, -0.0, 1e300, -math.inf),
    *("", "junk", "9" * 400, [], [None], [1, 2, 3], [[]], {}, {"name": 1}),
)


@pytest.mark.parametrize("class_name", sorted(CLASSES))
def test_anything_in_any_option_is_a_schedule_or_a_config_error(class_name: str) -> None:
    """A manifest holds the scheduler's config as it is, and it is read at the first picture."""
    for option in CLASSES[class_name].options():
        for junk in _ANYTHING:
            config = {"_class_name": class_name, "skip_prk_steps": True, option.name: junk}
            try:
                Scheduler.from_config(config).schedule(3)
            except ConfigError as error:
                assert len(str(error)) < 500 and str(error).isprintable(), (option.name, junk)
