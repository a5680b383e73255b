"""What A1111, ComfyUI, k-diffusion and diffusers call a sampler is that sampler here."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from rt.errors import ConfigError
from rt.samplers import SAMPLERS, Scheduler
from rt.samplers.names import CLASSES, SLUGS

CONFIG: dict[str, Any] = {"beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": True}

NAMES = {
    # A1111's labels, of old with the spacing in them
    "Euler a": "euler-a",
    "LMS Karras": "lms-karras",
    "DPM2 a Karras": "dpm2-a-karras",
    "DPM++ 2M Karras": "dpmpp-2m-karras",
    "DPM++ 2M SDE Exponential": "dpmpp-2m-sde-exponential",
    "DPM++ 2M SDE Heun Karras": "dpmpp-2m-sde-heun-karras",
    "DPM++ 3M SDE": "dpmpp-3m-sde",
    "DPM++ 3M SDE Exponential": "dpmpp-3m-sde-exponential",
    "DPM++ SDE Karras": "dpmpp-sde-karras",
    "DPM++ 2S a Karras": "dpmpp-2s-a-karras",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "DDIM": "ddim",
    "LCM": "lcm",
    "k_euler_a": "euler-a",
    "k_dpmpp_2m_sde_exp": "dpmpp-2m-sde-exponential",
    "k_dpmpp_2s_a_ka": "dpmpp-2s-a-karras",
    "k_dpm_2_a_ka": "dpm2-a-karras",
    "k_lms_ka": "lms-karras",
    # ComfyUI's
    "euler": "euler",
    "euler_ancestral": "euler-a",
    "heun": "heun",
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2-a",
    "lms": "lms",
    "dpmpp_2s_ancestral": "dpmpp-2s-a",
    "dpmpp_sde": "dpmpp-sde",
    "dpmpp_sde_gpu": "dpmpp-sde",
    "dpmpp_2m": "dpmpp-2m",
    "dpmpp_2m_karras": "dpmpp-2m-karras",
    "dpmpp_2m_sde": "dpmpp-2m-sde",
    "dpmpp_2m_sde_gpu": "dpmpp-2m-sde",
    "dpmpp_2m_sde_gpu_karras": "dpmpp-2m-sde-karras",
    "dpmpp_2m_sde_heun": "dpmpp-2m-sde-heun",
    "dpmpp_2m_sde_heun_gpu": "dpmpp-2m-sde-heun",
    "dpmpp_3m_sde": "dpmpp-3m-sde",
    "dpmpp_3m_sde_gpu exponential": "dpmpp-3m-sde-exponential",
    "ddpm": "ddpm",
    "lcm": "lcm",
    "deis": "deis",
    "ddim": "ddim",
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    # k-diffusion's functions
    "sample_euler_ancestral": "euler-a",
    "sample_dpmpp_2m_sde": "dpmpp-2m-sde",
    "sample_dpm_2": "dpm2",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_others_call_it(name: str) -> None:
    assert Scheduler.from_config(CONFIG, name).name == NAMES[name]


@pytest.mark.parametrize("name", [*NAMES, *SAMPLERS, *CLASSES, *(entry.label for entry in SLUGS.values())])
def test_case_and_what_stands_between_words_do_not_matter(name: str) -> None:
    expected = Scheduler.from_config(CONFIG, name)
    words = name.replace("_", " ").replace("-", " ").split()
    for between, change in itertools.product(("", " ", "_", "-", "  "), (str.lower, str.upper, str.title)):
        assert Scheduler.from_config(CONFIG, f" {change(between.join(words))} ") == expected


@pytest.mark.parametrize("slug", SAMPLERS)
def test_the_label_is_a_name(slug: str) -> None:
    scheduler = Scheduler.from_config(CONFIG, slug)
    assert Scheduler.from_config(CONFIG, scheduler.label) == scheduler
    if scheduler.sampler.takes_timesteps:
        aligned = Scheduler.from_config(CONFIG, slug, spacing="ays")
        assert aligned == Scheduler.from_config(CONFIG, aligned.label)


def test_a_name_that_says_a_variant_sets_it() -> None:
    config = CONFIG | {"solver_type": "bh1"}
    kind = lambda name: Scheduler.from_config(config, name).sampler.solver_type  # type: ignore[attr-defined]  # noqa: E731
    assert (kind("unipc"), kind("uni_pc_bh1"), kind("uni_pc_bh2")) == ("bh1", "bh1", "bh2")
    assert (kind("dpmpp_2m_sde"), kind("dpmpp_2m_sde_heun")) == ("midpoint", "heun")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("DPM fast", "dpmpp-2m"),
        ("DPM adaptive", "dpmpp-2m"),
        ("k_dpm_ad", "dpmpp-2m"),
        ("Restart", "heun"),
        ("DDIM CFG++", "ddim"),
        ("euler_ancestral_cfg_pp", "euler-a"),
        ("heunpp2", "heun"),
        ("ipndm_v", "pndm"),
        ("res_multistep", "dpmpp-2m"),
        ("er_sde", "dpmpp-3m-sde"),
    ],
)
def test_samplers_of_others_that_are_not_here(name: str, nearest: str) -> None:
    message = rf"rt does not have the sampler '{name}' \(the nearest is '{nearest}'\)".replace("++", r"\+\+")
    with pytest.raises(ConfigError, match=message):
        Scheduler.from_config(CONFIG, name)
    assert nearest in SAMPLERS


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("euler_sgm_uniform", "trailing"),
        ("Euler Simple", "trailing"),
        ("dpmpp_2m normal", "linspace"),
        ("euler ddim_uniform", "leading"),
        ("dpmpp_2m_sde_gpu_beta", "karras"),
        ("DPM++ 2M Polyexponential", "exponential"),
    ],
)
def test_spacings_of_others_that_are_not_here(name: str, spacing: str) -> None:
    with pytest.raises(
        ConfigError, match=f"asks for a spacing that rt does not have; .*--spacing {spacing} "
    ):
        Scheduler.from_config(CONFIG, name)


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(ConfigError, match=r"unknown sampler 'dpmpp-2sd' \(did you mean 'dpmpp-2s'\?\)"):
        Scheduler.from_config(CONFIG, "dpmpp-2sd")
    for name in ("", " ", "k", "karras", "sample", "++", "é", "a" * 3000, "\x1b[31m\n\udcff"):
        check_message("unknown sampler", name)


def check_message(says: str, name: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        Scheduler.from_config(CONFIG, name, **options)
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_messages_are_short_and_on_one_line() -> None:
    for blank in (" " * 3000, "\n\t\r"):
        check_message("asks for a spacing that rt does not have", f"euler{blank}beta")
        check_message("rt does not have the sampler", f"dpm{blank}fast")
        check_message("spacing got", "euler", spacing=f"karras{blank}")
