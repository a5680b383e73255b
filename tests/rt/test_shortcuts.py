"""Guidance interval and step caching, from build to picture, against diffusers made to do the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from PIL import Image

import rt
from rt.bench.bundle import measure
from rt.bench.report import Settings
from rt.bundle import Bundle
from rt.cli.inspect import command as inspect
from rt.cli.run import command as run
from rt.model import Component
from rt.verify import verify

STEPS, PROMPT = 10, "a fox left of a sunflower"


@pytest.fixture(scope="module")
def bundle(build_bundle: Callable[..., Path], demo_model: Path) -> Path:
    return build_bundle(demo_model, batch_size=(1, 2), step_cache=True)


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> rt.Pipeline:
    return rt.Pipeline.from_bundle(bundle)


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(
        demo_model, safety_checker=None, torch_dtype=torch.float32
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def drawn_by_diffusers(
    reference: StableDiffusionPipeline, seed: int, guided: list[bool], full: list[bool], scale: float
) -> np.ndarray:
    """Every step computed whole, and then made what a shortcut makes of it.

    A step without guidance has a scale just above 1, which keeps both halves and follows the prompt. A shallow step
    gets, at the last resnet, the deep channels that the last full step had there.
    """
    last = reference.unet.up_blocks[-1].resnets[-1]
    skip = reference.unet.conv_in.out_channels
    kept: list[torch.Tensor] = []
    step = 0

    def join(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        joined, *rest = inputs
        if full[step]:
            kept[:] = [joined[:, :-skip].clone()]
        return (torch.cat([kept[0], joined[:, -skip:]], dim=1), *rest)

    def scale_at(index: int) -> float:
        return scale if guided[index] else 1 + 1e-7

    def after(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal step
        step = index + 1
        if step < len(guided):
            pipe._guidance_scale = scale_at(step)
        return values

    hook = last.register_forward_pre_hook(join)
    try:
        image: np.ndarray = reference(
            PROMPT,
            num_inference_steps=len(guided),
            guidance_scale=scale_at(0),
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            callback_on_step_end=after,
        ).images[0]
    finally:
        hook.remove()
    return image


def marks(text: str) -> list[bool]:
    return [mark == "x" for mark in text]


@pytest.mark.parametrize(
    ("shortcuts", "guided", "full"),
    [
        ({}, "xxxxxxxxxx", "xxxxxxxxxx"),
        ({"guidance_interval": (0.2, 0.7)}, "..xxxxx...", "xxxxxxxxxx"),
        ({"step_cache": 3}, "xxxxxxxxxx", "x..x..x..x"),
        ({"guidance_interval": (0.2, 0.7), "step_cache": 2}, "..xxxxx...", "x.x.x.xx.x"),
    ],
)
def test_same_picture_as_diffusers_made_to_do_the_same(
    pipe: rt.Pipeline, reference: StableDiffusionPipeline, shortcuts: dict[str, Any], guided: str, full: str
) -> None:
    seed = int(np.random.default_rng().integers(2**31))
    expected = drawn_by_diffusers(reference, seed, marks(guided), marks(full), 4.0)
    result = pipe(
        PROMPT, num_inference_steps=STEPS, guidance_scale=4.0, seed=seed, output_type="np", **shortcuts
    )
    assert np.abs(result.images[0] - expected).max() * 255 < 2
    assert result.timings.steps == STEPS


def test_pictures_do_not_depend_on_their_batch(pipe: rt.Pipeline) -> None:
    common: dict[str, Any] = {
        "num_inference_steps": 6, "guidance_interval": (0.3, 0.9), "step_cache": 2, "output_type": "latent",
    }  # fmt: skip
    three = pipe(PROMPT, seed=5, num_images_per_prompt=3, **common).images
    for index in range(3):
        np.testing.assert_allclose(three[index], pipe(PROMPT, seed=5 + index, **common).images[0], atol=2e-3)


def test_without_guidance_the_interval_does_not_matter(pipe: rt.Pipeline) -> None:
    common: dict[str, Any] = {
        "num_inference_steps": 3,
        "seed": 1,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    plain = pipe(PROMPT, **common).images[0]
    np.testing.assert_array_equal(plain, pipe(PROMPT, guidance_interval=(0.0, 0.01), **common).images[0])


def test_only_the_engines_that_are_needed_load(bundle: Path) -> None:
    def loaded(**arguments: Any) -> set[str]:
        pipe = rt.Pipeline.from_bundle(bundle)
        pipe(PROMPT, num_inference_steps=4, output_type="latent", **arguments)
        return {name for name in pipe.engines._loaded if name.startswith(("unet-", "unet_shallow"))}

    guided, plain = "1x64x64-guided", "1x64x64"
    assert loaded() == {f"unet-{guided}"}
    assert loaded(guidance_scale=1.0, step_cache=2) == {f"unet-{plain}", f"unet_shallow-{plain}"}
    assert loaded(guidance_interval=(0.0, 0.5)) == {f"unet-{guided}", f"unet-{plain}"}
    assert loaded(guidance_interval=(0.0, 0.25), step_cache=3) == {
        f"unet-{guided}", f"unet-{plain}", f"unet_shallow-{plain}",
    }  # fmt: skip


def test_the_bundle_holds_shallow_steps_and_verifies(bundle: Path, demo_bundle: Path) -> None:
    opened, plain = Bundle.open(bundle), Bundle.open(demo_bundle)
    shallow = [engine for engine in opened.manifest.engines if engine.component is Component.UNET_SHALLOW]
    assert len(shallow) == 4 and opened.manifest.config.step_cache
    assert all([record.name for record in engine.passes] == ["shallow"] for engine in shallow)
    assert not any("deep" in {spec.name for spec in e.outputs} for e in plain.manifest.engines)
    weights = "engines/unet.weights"
    assert opened.manifest.files[weights] == plain.manifest.files[weights], "they cost a graph, no weights"
    assert len([*verify(opened, rt.Pipeline.from_bundle(bundle).engines.backend)]) == len(
        opened.manifest.engines
    )


def test_inspect_says_which_bundle_can(bundle: Path, demo_bundle: Path) -> None:
    can, cannot = (CliRunner().invoke(inspect, [str(path)]).output for path in (bundle, demo_bundle))
    assert "rt run --step-cache" in can and "unet_shallow-2x64x64-guided" in can
    assert "step-cache" not in cannot


def test_bench_measures_shallow_steps(bundle: Path) -> None:
    report = measure(bundle, Settings(steps=2, guidance_scale=4, warmup=1, iterations=3))
    medians = {stage.name: stage.samples.median for stage in report.stages}
    for kind in ("guided", "unguided"):
        assert medians[f"U-Net shallow step, {kind}"] < medians[f"U-Net step, {kind}"]


def test_the_command_draws_with_both_and_says_so_in_the_picture(bundle: Path, tmp_path: Path) -> None:
    shortcuts = ["--guidance-interval", "0.2:0.8", "--step-cache", "2"]
    common = ["-p", PROMPT, "--steps", "5", "--seed", "3", "-q", "--json", "-o"]
    for name, options in (("short.png", shortcuts), ("plain.png", [])):
        result = CliRunner().invoke(run, [str(bundle), *common, str(tmp_path / name), *options])
        assert result.exception is None, result.output
        assert json.loads(result.stdout)["timings"]["steps"] == 5
    with Image.open(tmp_path / "short.png") as short, Image.open(tmp_path / "plain.png") as plain:
        assert "CFG interval: 0.2 to 0.8, Step cache: 2, " in short.info["parameters"]
        assert "interval" not in plain.info["parameters"] and "cache" not in plain.info["parameters"]
        assert not np.array_equal(np.asarray(short), np.asarray(plain))


@pytest.mark.parametrize("text", ["0.5", "a:b", "0.1:0.2:0.3", ""])
def test_an_interval_that_is_none_is_refused(text: str) -> None:
    result = CliRunner().invoke(run, ["bundle", "-p", "x", "--guidance-interval", text])
    assert result.exit_code == 2 and f"{text!r} is not START:STOP, such as 0.2:0.8" in result.output
