"""`rt run`: bundle and prompt to pictures on disk."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

import rt
from rt.arguments import RNGS, check_count, check_negative_prompts, check_prompts, check_seeds
from rt.bundle import LoraRecord
from rt.cli.options import backend_option
from rt.cli.streams import hand_out
from rt.errors import ConfigError
from rt.images import ImageMetadata, OutputPattern, save
from rt.model import Family
from rt.pipeline import Pipeline
from rt.progress import progress
from rt.samplers import SAMPLERS, SPACINGS, Scheduler
from rt.sheet import sheet


def interval(text: str) -> tuple[float, float]:
    """`0.2:0.8` as numbers."""
    try:
        start, stop = (float(part) for part in text.split(":"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not START:STOP, such as 0.2:0.8") from None
    return start, stop


@click.command(short_help="Draw pictures with a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-p", "--prompt", "prompts", multiple=True, required=True, help="What to draw; may be repeated."
)
@click.option("--negative-prompt", help="What to keep away from.")
@click.option(
    "--steps", "--num-inference-steps", type=int, default=50, show_default=True, help="Of the sampler."
)
@click.option(
    "--guidance-scale",
    type=float,
    help="1 turns guidance off.  [default: 7.5, and 5 for XL but its inpainting]",
)
@click.option(
    "--guidance-rescale", type=float, default=0.0, help="For zero-terminal-SNR models, such as 0.7."
)
@click.option(
    "--guidance-interval",
    type=interval,
    metavar="START:STOP",
    default="0:1",
    help="Guide only this part of the steps, such as 0.2:0.8; faster, another picture.  [default: all]",
)
@click.option(
    "--step-cache",
    type=int,
    metavar="N",
    default=1,
    help="Run the whole U-Net at one of N steps; faster, another picture.  [default: each]",
)
@click.option(
    "--clip-skip",
    type=int,
    metavar="N",
    help="Leave out the last N layers of the text encoders, as diffusers counts them.  [default: the model's]",
)
@click.option("--seed", type=int, help="Of the first picture; the others count up.  [default: random]")
@click.option(
    "--rng",
    type=click.Choice([*RNGS]),
    default="cpu",
    help="Whose random numbers the seed means: torch's on a CPU or on an NVIDIA GPU, here or there.  [default: cpu]",
)
@click.option(
    "--scheduler",
    help=f"Sampler: {', '.join(SAMPLERS)}, also with -karras or -exponential; "
    "or its name in diffusers, A1111 or ComfyUI.  [default: the model's]",
)
@click.option("--spacing", type=click.Choice(SPACINGS), help="Of the timesteps.  [default: the model's]")
@click.option("--image", type=click.Path(path_type=Path), help="Picture to change, for an inpainting model.")
@click.option("--mask", type=click.Path(path_type=Path), help="Bright where it is to be painted anew.")
@click.option("-n", "--num-images-per-prompt", type=int, default=1, show_default=True, help="Of each.")
@click.option("--height", type=int, help="Pixels; one that was built.")
@click.option("--width", type=int, help="Pixels; one that was built.")
@click.option(
    "-o", "--output", default="", help="File, directory or pattern with {seed} {index} {date} {prompt_hash}."
)
@click.option("--sheet", "page", help="Also all pictures on one page, with their prompts: a file as in -o.")
@backend_option
@click.option(
    "--threads",
    type=int,
    help="Processors to use.  [default: OMP_NUM_THREADS, or all allowed]",
)
@click.option("--no-metadata", is_flag=True, help="Leave the prompt and the settings out of the file.")
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option("--json", "as_json", is_flag=True, help="Print paths, seeds and timings as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    negative_prompt: str | None,
    steps: int,
    guidance_scale: float | None,
    guidance_rescale: float,
    guidance_interval: tuple[float, float],
    step_cache: int,
    clip_skip: int | None,
    seed: int | None,
    rng: str,
    scheduler: str | None,
    spacing: str | None,
    image: Path | None,
    mask: Path | None,
    num_images_per_prompt: int,
    height: int | None,
    width: int | None,
    output: str,
    page: str | None,
    backend: str,
    threads: int | None,
    no_metadata: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Draw pictures of --prompt with BUNDLE and print their paths."""
    if not all(prompt.strip() for prompt in prompts):
        raise ConfigError('the prompt is empty; say what to draw: --prompt "a red heart"')
    check_prompts(prompts)
    check_negative_prompts(negative_prompt, len(prompts))
    count = check_count(num_images_per_prompt, len(prompts)) * len(prompts)
    seeds = check_seeds(seed, count)
    pipe = Pipeline.from_bundle(bundle, backend=backend, threads=threads)
    if guidance_scale is None:
        guidance_scale = pipe.bundle.manifest.model.default_guidance_scale
    sampler = Scheduler.from_config(pipe.bundle.manifest.model.scheduler, scheduler, spacing=spacing)
    asked = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
    calls = pipe.unet_calls(sampler.schedule(steps), count, height, width)
    paths = OutputPattern(output or "./").paths(seeds, asked)
    pages = []
    if page is not None:
        pages = OutputPattern(page, in_folder="sheet.png").paths(seeds[:1], prompts[:1])
    if not {os.path.realpath(path) for path in paths}.isdisjoint(map(os.path.realpath, pages)):
        raise ConfigError(f"{pages[0]} would be a picture and the sheet: give --sheet another name")
    _check_free(paths, "-o", force=force)
    _check_free(pages, "--sheet", force=force)
    source = pipe.bundle.manifest.source
    settings: dict[str, object] = {"CFG Rescale": guidance_rescale} if guidance_rescale else {}
    if guidance_interval != (0, 1) and guidance_scale > 1:
        settings["CFG interval"] = " to ".join(f"{part:g}" for part in guidance_interval)
    if step_cache > 1:
        settings["Step cache"] = step_cache
    if clip_skip:  # other tools begin to count at the last layer
        settings["Clip skip"] = clip_skip + (2 if pipe.bundle.manifest.model.family is Family.SDXL else 1)
    if rng == "cpu":  # other tools take it for a GPU's where nothing is said
        settings["RNG"] = "CPU"

    def keep(pipe: Pipeline, index: int, picture: Any) -> None:
        metadata = ImageMetadata(
            prompt=asked[index],
            negative_prompt=negative_prompt or "",
            steps=steps,
            sampler=sampler.label,
            guidance_scale=guidance_scale,
            seed=seeds[index],
            width=picture.width,
            height=picture.height,
            model=Path(source.name).stem,
            model_hash=source.model_hash,
            version=f"rt {rt.__version__}",
            extra={**settings, **_loras(source.loras)},
        )
        save(paths[index], np.asarray(picture), metadata=None if no_metadata else metadata, overwrite=force)
        if not as_json:
            with bar.above():
                hand_out(str(paths[index]))

    with progress("draw", total=calls, quiet=quiet) as bar:
        result = pipe(
            prompts,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            step_cache=step_cache,
            clip_skip=clip_skip,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            seed=seeds,
            rng=rng,
            scheduler=sampler,
            image=image,
            mask_image=mask,
            callback_on_step_end=lambda *step: bar.advance(),
            callback_on_step_end_tensor_inputs=[],
            callback_on_image_end=keep,
        )
    for path in pages:
        save(path, np.asarray(sheet(result.images, asked)), overwrite=force)
    if as_json:
        summary = {
            "images": [
                {"path": str(path), "seed": used, "prompt": prompt}
                for path, used, prompt in zip(paths, seeds, asked, strict=True)
            ],
            "sheet": str(pages[0]) if pages else None,
            "scheduler": sampler.name,
            "backend": pipe.engines.backend.name,
            "backend_reason": pipe.engines.reason,
            "timings": asdict(result.timings),
        }
        hand_out(*json.dumps(summary, indent=1).splitlines())


def _loras(loras: tuple[LoraRecord, ...]) -> dict[str, str]:
    """As A1111 writes them, and their scales, which it has in the prompt."""
    names = [Path(lora.name).stem for lora in loras]
    hashes = [f"{name}: {lora.sha256[:10]}" for name, lora in zip(names, loras, strict=True)]
    scales = [f"{name}: {lora.scale:g}" for name, lora in zip(names, loras, strict=True)]
    return {"Lora hashes": ", ".join(hashes), "Lora scales": ", ".join(scales)} if loras else {}


def _check_free(paths: list[Path], option: str, *, force: bool) -> None:
    """Know that the files of `option` are free and have a folder, before minutes are spent on drawing them."""
    for path in paths:
        try:
            if path.is_dir():
                raise ConfigError(f"{path} is a folder: choose another {option}")
            if os.path.lexists(path) and not force:
                raise ConfigError(f"{path} exists: choose another {option} or overwrite it with --force")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise ConfigError(f"cannot write {path}: no permission; choose another {option}")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; choose another {option}") from None
