"""An inpainting model paints what diffusers paints: on random weights, picture by picture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from rt.bench.bundle import measure
from rt.bench.report import Settings
from rt.errors import ConfigError, NumericsError
from rt.inpainting import Inpainting, cut_out
from rt.noise import Generator
from rt.pipeline import Pipeline

SIDE = 64


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a small random U-Net of nine input channels."""
    root = Path(shutil.copytree(demo_model, tmp_path_factory.mktemp("inpainting") / "model"))
    context = UNet2DConditionModel.load_config(demo_model, subfolder="unet")["cross_attention_dim"]
    torch.manual_seed(np.random.default_rng().integers(2**31))
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=9,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=4,
    )
    shutil.rmtree(root / "unet")
    unet.save_pretrained(root / "unet")
    index = (root / "model_index.json").read_text()
    (root / "model_index.json").write_text(
        index.replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
    )
    return root


@pytest.fixture(scope="module")
def bundle(model: Path, build_bundle: Callable[..., Path]) -> Path:
    return build_bundle(model, batch_size=(2,))


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle)


@pytest.fixture(scope="module")
def reference(model: Path) -> StableDiffusionInpaintPipeline:
    loaded = StableDiffusionInpaintPipeline.from_pretrained(
        model, safety_checker=None, torch_dtype=torch.float32
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def picture(side: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng().integers(0, 256, (side, side, 3), dtype=np.uint8))


def mask(side: int = SIDE) -> Image.Image:
    """A grey blob with a soft edge, so that its threshold shows."""
    y, x = np.mgrid[:side, :side] / side
    centre = np.random.default_rng().uniform(0.3, 0.7, 2)
    return Image.fromarray(
        (255 * np.exp(-8 * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2))).astype(np.uint8)
    )


@pytest.mark.parametrize(("guidance", "eta"), [(1.0, 0.0), (5.0, 0.0), (5.0, 1.0)])
def test_same_picture(
    pipe: Pipeline, reference: StableDiffusionInpaintPipeline, guidance: float, eta: float
) -> None:
    image, hole, seed = picture(), mask(), int(np.random.default_rng().integers(2**31))
    common = {"num_inference_steps": 6, "guidance_scale": guidance, "output_type": "np", "eta": eta}
    reference.scheduler = DDIMScheduler.from_config(reference.scheduler.config)
    expected = reference(
        "a red heart",
        image=image,
        mask_image=hole,
        height=SIDE,
        width=SIDE,
        generator=torch.Generator().manual_seed(seed),
        **common,
    ).images[0]
    found = pipe("a red heart", image=image, mask_image=hole, seed=seed, scheduler="ddim", **common).images[0]
    assert np.abs(found - expected).max() * 255 < 0.5


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("prompts", [["a star"], ["a red heart", "a star"]])
def test_several_pictures_are_those_of_a_list_of_generators(
    pipe: Pipeline, reference: StableDiffusionInpaintPipeline, prompts: list[str], given: bool
) -> None:
    """The encoder is sampled once, by the first one; the sampler's noise shows what each has left."""
    image, hole, seed = picture(), mask(), int(np.random.default_rng().integers(2**31))
    count = 4 // len(prompts)
    latents = np.random.default_rng().standard_normal((4, 4, 16, 16), np.float32) if given else None
    common = {"num_inference_steps": 4, "guidance_scale": 3.0, "eta": 1.0, "num_images_per_prompt": count}
    reference.scheduler = DDIMScheduler.from_config(reference.scheduler.config)
    expected = reference(
        prompts,
        image=image,
        mask_image=hole,
        height=SIDE,
        width=SIDE,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(4)],
        latents=None if latents is None else torch.from_numpy(latents),
        output_type="np",
        **common,
    ).images
    found = pipe(
        prompts,
        image=image,
        mask_image=hole,
        seed=seed,
        latents=latents,
        scheduler="ddim",
        output_type="np",
        **common,
    ).images
    assert np.abs(np.array(found) - expected).max() * 255 < 0.5


def test_the_mask_matters(pipe: Pipeline) -> None:
    image = picture()
    common = {"num_inference_steps": 3, "seed": 1, "image": image, "output_type": "latent"}
    everything = pipe("a star", mask_image=Image.new("L", (SIDE, SIDE), 255), **common).images[0]
    nothing = pipe("a star", mask_image=Image.new("L", (SIDE, SIDE), 0), **common).images[0]
    assert np.abs(everything - nothing).max() > 1e-2


@pytest.mark.parametrize("side", [SIDE, 100])
def test_cut_out_is_diffusers_preprocessing(side: int) -> None:
    image, hole = picture(side), mask(side).convert("RGB")
    masks = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    expected_hole = masks.preprocess(hole, SIDE, SIDE)
    expected = VaeImageProcessor().preprocess(image, SIDE, SIDE) * (expected_hole < 0.5)
    pixels, found = cut_out(image, hole, SIDE, SIDE)
    np.testing.assert_array_equal(found, expected_hole[0, 0].numpy())
    np.testing.assert_allclose(pixels, expected[0].permute(1, 2, 0).numpy(), atol=1e-6)


def test_around_is_a_sample_of_the_encoder() -> None:
    mean, std = np.random.default_rng().normal(size=(2, 4, 8, 8)).astype(np.float32)
    drawn = Inpainting.drawn(np.zeros((1, 8, 8), np.float32), mean, std, Generator(5)).around
    np.testing.assert_allclose(drawn, mean + std * Generator(5).randn((4, 8, 8)), rtol=1e-6)


def test_a_mask_of_zero_and_one_out_of_255_is_refused(pipe: Pipeline) -> None:
    ones = np.ones((SIDE, SIDE), np.uint8)
    with pytest.raises(
        ConfigError, match="mask_image has no level above 1 of 255, so that nothing would be painted"
    ):
        pipe("a star", image=picture(), mask_image=ones)
    np.testing.assert_array_equal(cut_out(picture(), ones.astype(bool), SIDE, SIDE)[1], 1)


@pytest.mark.parametrize("given", [{}, {"image": "x.png"}, {"mask_image": "x.png"}])
def test_both_pictures_are_needed(pipe: Pipeline, given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="give it image and mask_image"):
        pipe("a star", **given)


def test_a_text_to_image_bundle_takes_no_picture(demo_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="draws from the prompt alone"):
        Pipeline.from_bundle(demo_bundle)("a star", image=picture())


def test_an_encoder_that_overflows_is_named(bundle: Path) -> None:
    broken = Pipeline.from_bundle(bundle)
    schedule = broken._schedule(None, 2, None, None)
    broken._load((SIDE, SIDE), 1, schedule, guided=False, decode=False)
    record = next(name for name in broken.engines._loaded if name.startswith("vae_encoder"))
    broken.engines._loaded[record].outputs["mean"][...] = np.nan
    broken.engines._loaded[record].enqueue = lambda: None
    with pytest.raises(NumericsError, match="vae_encoder"):
        broken("a star", image=picture(), mask_image=mask(), guidance_scale=1)


def test_bench_measures_the_encoder_too(bundle: Path) -> None:
    settings = Settings(steps=1, guidance_scale=5.0, warmup=0, iterations=1)
    names = [stage.name for stage in measure(bundle, settings, batch_size=2, quiet=True).stages]
    assert "VAE encoder" in names and "end to end" in names


def test_command_line(bundle: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "in.png")
    mask().save(tmp_path / "mask.png")

    def rt(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "rt",
            "run",
            str(bundle),
            "--prompt",
            "a star",
            "--steps",
            "2",
            *arguments,
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    drawn = rt("--image", "in.png", "--mask", "mask.png", "-o", "out.png")
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "out.png") as opened:
        assert opened.size == (SIDE, SIDE)
    os.mkfifo(tmp_path / "pipe.png")
    endless = rt("--image", "pipe.png", "--mask", "/dev/zero", "-o", "other.png")
    assert endless.returncode == 2
    assert endless.stderr == "error: image pipe.png cannot be read: a pipe, not a file\n"
    refused = rt("--image", "in.png", "-o", "other.png")
    assert refused.returncode == 2 and "--image and --mask" in refused.stderr
    assert not (tmp_path / "other.png").exists()
