"""Every default of `Pipeline.__call__` and of `rt run` is that of diffusers' pipeline for the same model."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import rt
from rt.cli.run import command
from rt.model import Component, Family, ModelSpec

PIPELINES = {
    (Family.SD1, False): "StableDiffusionPipeline",
    (Family.SD1, True): "StableDiffusionInpaintPipeline",
    (Family.SD2, False): "StableDiffusionPipeline",
    (Family.SD2, True): "StableDiffusionInpaintPipeline",
    (Family.SDXL, False): "StableDiffusionXLPipeline",
    (Family.SDXL, True): "StableDiffusionXLInpaintPipeline",
}

ONLY_OURS = {
    "seed": "in place of a generator",
    "scheduler": "in place of an attribute",
    "rng": "whose random numbers seeds mean",
    "guidance_interval": "all steps, which is off",
    "step_cache": "each step, which is off",
    "image": "one call is for text to image and for inpainting",
    "mask_image": "one call is for text to image and for inpainting",
    "callback_on_image_end": "None, which is off; they give all pictures at the end",
    "guidance_rescale": "0, which is off, and StableDiffusionInpaintPipeline does not have it",
}
ONLY_THEIRS = {
    "strength": "1 here; XL's inpainting has 0.9999, which leaves out the first of 50 steps",
    "sigmas": "not here",
    "generator": "seed",
    "return_dict": "there is one form of results",
    "cross_attention_kwargs": "fixed by the build",
    "masked_image_latents": "not here",
    "padding_mask_crop": "not here; None is off",
    "denoising_start": "not here; None is off",
    "denoising_end": "not here; None is off",
    "original_size": "the size of the picture, as when they leave it out",
    "target_size": "as original_size",
    "crops_coords_top_left": "(0, 0), as theirs",
    "negative_original_size": "as original_size",
    "negative_target_size": "as original_size",
    "negative_crops_coords_top_left": "(0, 0), as theirs",
    "aesthetic_score": "of refiners, which are not supported",
    "negative_aesthetic_score": "of refiners, which are not supported",
    **dict.fromkeys(("prompt_2", "negative_prompt_2"), "the first prompt, as when they leave it out"),
    **dict.fromkeys(
        (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
            "ip_adapter_image",
            "ip_adapter_image_embeds",
        ),
        "not here; None is off",
    ),
}


def defaults(function: Any) -> dict[str, Any]:
    named = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
    }
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in named.items()}


def spec_of(family: Family, *, inpainting: bool) -> ModelSpec:
    return ModelSpec(
        family=family,
        inpainting=inpainting,
        latent_channels=4,
        vae_scale_factor=8,
        sample_size=64,
        scaling_factor=0.18215,
        text_encoders=(Component.TEXT_ENCODER,),
        max_tokens=77,
        context_size=768,
        pooled_size=None,
        zero_negative=False,
        scheduler={},
    )


@pytest.mark.parametrize(("family", "inpainting"), PIPELINES)
def test_every_default_is_that_of_diffusers(family, inpainting):
    spec = spec_of(family, inpainting=inpainting)
    theirs = defaults(getattr(diffusers, PIPELINES[family, inpainting]).__call__)
    ours = defaults(rt.Pipeline.__call__)
    assert ours.pop("guidance_scale") is None
    ours["guidance_scale"] = spec.default_guidance_scale
    assert ours.pop("prompt") is inspect.Parameter.empty, "there is nothing to draw without one"
    for name, value in ours.items():
        assert name in theirs or name in ONLY_OURS, name
        assert value == theirs.get(name, value), name
    assert theirs.keys() - ours.keys() - {"prompt"} <= ONLY_THEIRS.keys()
    assert ours.keys().isdisjoint(ONLY_THEIRS)
    assert ours.keys() >= ONLY_OURS.keys()


def test_every_default_of_the_command_line_is_that_of_the_library():
    """Where both have the argument; what is `rt run`'s alone has no part in what is drawn."""
    ours = defaults(rt.Pipeline.__call__)
    names = {"steps": "num_inference_steps", "mask": "mask_image"}
    compared = set()
    for option, value in command.make_context("run", ["bundle", "--prompt", "a"]).params.items():
        name = names.get(option, option)
        if name in ours:
            assert (list(value) if isinstance(value, tuple) else value) == ours[name], name
            compared.add(name)
    assert compared >= {
        "height", "width", "num_inference_steps", "guidance_scale", "guidance_rescale", "negative_prompt", "seed",
        "num_images_per_prompt", "scheduler", "rng", "step_cache", "guidance_interval", "image", "mask_image",
        "clip_skip",
    }  # fmt: skip


def test_the_guidance_of_the_family_is_used(tiny_bundle, monkeypatch):
    arguments = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    with rt.Pipeline.from_bundle(tiny_bundle) as pipe:
        np.testing.assert_array_equal(
            pipe("a", **arguments).images[0], pipe("a", guidance_scale=7.5, **arguments).images[0]
        )
        monkeypatch.setattr(ModelSpec, "default_guidance_scale", 3.25)
        np.testing.assert_array_equal(
            pipe("a", **arguments).images[0], pipe("a", guidance_scale=3.25, **arguments).images[0]
        )


def test_the_metadata_say_the_guidance_that_was_used(tiny_bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(ModelSpec, "default_guidance_scale", 3.25)
    for name, option in (("family", []), ("given", ["--guidance-scale", "6"])):
        path = tmp_path / f"{name}.png"
        arguments = [tiny_bundle, "--prompt", "a", "--steps", 2, "-o", path, *option]
        CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert "CFG scale: 3.25" in Image.open(tmp_path / "family.png").text["parameters"]
    assert "CFG scale: 6" in Image.open(tmp_path / "given.png").text["parameters"]


def test_tcd_draws_without_noise_unless_asked(tiny_bundle):
    """diffusers' pipelines pass their eta of 0 on to TCDScheduler, whose own is 0.3."""
    arguments = {"num_inference_steps": 3, "seed": 1, "output_type": "latent", "scheduler": "tcd"}
    with rt.Pipeline.from_bundle(tiny_bundle) as pipe:
        plain, zero, some = (
            pipe("a", **arguments, **eta).images[0] for eta in ({}, {"eta": 0.0}, {"eta": 0.3})
        )
    np.testing.assert_array_equal(plain, zero)
    assert np.abs(plain - some).max() > 1e-3
