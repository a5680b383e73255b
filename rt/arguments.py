"""What a call of the pipeline was given, checked and brought into one form."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from rt.errors import ArgumentError, ConfigError, nearest
from rt.inpainting import Picture, cut_out
from rt.noise import Generator, Noise
from rt.philox import CudaGenerator

OUTPUT_TYPES = ("pil", "np", "latent")
RNGS: Mapping[str, Callable[[int], Noise]] = {"cpu": Generator, "cuda": CudaGenerator}
"""Whose random numbers a seed means."""

# What other tools call the same thing.
_ALIASES = {
    "generator": "seed",
    "seeds": "seed",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "sampler": "scheduler",
    "clip_stop_at_last_layers": "clip_skip",
    "n": "num_images_per_prompt",
    "batch_size": "num_images_per_prompt",
    "prompts": "prompt",
    "mask": "mask_image",
    "init_image": "image",
}


def unknown_argument(name: str, function: Callable[..., object]) -> ArgumentError:
    """For a keyword that `function` does not take, with the nearest that it does."""
    valid = [argument for argument in function.__annotations__ if argument not in ("unknown", "return")]
    hint = f" (did you mean {_ALIASES[name]!r}?)" if name in _ALIASES else nearest(name, valid)
    return ArgumentError(f"unknown argument {name!r}{hint}; valid: {', '.join(valid)}")


def check_prompts(prompt: object) -> list[str]:
    """One prompt or several, as a list."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ConfigError(f"prompt is {prompt!r}; give a string or a non-empty list of strings")
    return prompts


def check_negative_prompts(negative: str | Sequence[str] | None, count: int) -> list[str | None]:
    """One for each of `count` prompts; None where none was given, which is not the same as ""."""
    if negative is None or isinstance(negative, str):
        return [negative] * count
    if not isinstance(negative, Sequence) or not all(isinstance(text, str) for text in negative):
        raise ConfigError(
            f"negative_prompt is {negative!r}; give a string, or a list with one for each prompt"
        )
    if len(negative) != count:
        raise ConfigError(
            f"{len(negative)} negative prompts for {count} prompts; give one for all or one for each"
        )
    return list(negative)


def check_count(num_images_per_prompt: object) -> int:
    """Pictures of one prompt."""
    if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
        raise ConfigError(
            f"num_images_per_prompt is {num_images_per_prompt!r}; it must be a whole number of at least 1"
        )
    return int(num_images_per_prompt)


def check_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One for each picture: picture i has seed + i, so that it does not depend on how many are drawn with it."""
    if seed is None:
        seed = secrets.randbits(32)
    if isinstance(seed, Integral):
        return [int(seed) + index for index in range(count)]
    if not isinstance(seed, Sequence) or not all(isinstance(value, Integral) for value in seed):
        raise ConfigError(f"seed is {seed!r}; give a whole number, or one for each picture")
    if len(seed) != count:
        raise ConfigError(f"{len(seed)} seeds for {count} pictures; give one for each, or the first one only")
    return [int(value) for value in seed]


def check_guidance(scale: object, rescale: object) -> tuple[float, float]:
    """Scale and rescale as numbers that mean something."""
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ConfigError(
            f"guidance_scale is {scale!r}; it must be a finite number, 1 or less for no guidance"
        )
    if not isinstance(rescale, Real) or not 0 <= float(rescale) <= 1:
        raise ConfigError(f"guidance_rescale is {rescale!r}; it must be a number from 0 (off) to 1")
    return float(scale), float(rescale)


def check_guidance_interval(interval: object) -> tuple[float, float]:
    """Start and stop in parts of the schedule."""
    given = list(interval) if isinstance(interval, Sequence) and not isinstance(interval, str) else []
    if (
        len(given) != 2
        or not all(isinstance(part, int | float) for part in given)
        or not 0 <= given[0] < given[1] <= 1
    ):
        raise ConfigError(
            f"guidance_interval is {interval!r}; it must be two numbers with 0 <= start < stop <= 1, such as 0.2, 0.8"
        )
    return float(given[0]), float(given[1])


def check_step_cache(step_cache: object, *, built: bool) -> int:
    """One step of so many is full; a bundle must have been `built` for more than one."""
    if not isinstance(step_cache, Integral) or step_cache < 1:
        raise ConfigError(
            f"step_cache is {step_cache!r}; it must be a whole number of at least 1, where 1 turns it off"
        )
    steps = int(step_cache)
    if steps > 1 and not built:
        raise ConfigError(
            f"step_cache is {steps}, but this bundle has no shallow steps; build it again with --step-cache"
        )
    return steps


def check_clip_skip(clip_skip: object, rows: int) -> int:
    """The row to take of the text encoders' states, of which a bundle has `rows`; None is the first."""
    if clip_skip is None:
        return 0
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, Integral) or not 0 <= int(clip_skip) < rows:
        raise ConfigError(
            f"clip_skip is {clip_skip!r}; it must be a whole number from 0 to {rows - 1} for this bundle, how many of "
            "the last layers of its text encoder to leave out, or None"
        )
    return int(clip_skip)


def check_rng(rng: str) -> Callable[[int], Noise]:
    """Seed to stream; one of `RNGS`."""
    if rng not in RNGS:
        raise ConfigError(f"rng {rng!r} does not exist; use one of {', '.join(RNGS)}")
    return RNGS[rng]


def check_output_type(output_type: str) -> None:
    """One of `OUTPUT_TYPES`."""
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type {output_type!r} does not exist; use one of {', '.join(OUTPUT_TYPES)}")


def check_tensor_inputs(names: Sequence[str]) -> Sequence[str]:
    """What a callback is shown: "latents" or nothing."""
    if isinstance(names, str) or not set(names) <= {"latents"}:
        raise ConfigError(f'callback_on_step_end_tensor_inputs is {names!r}; use ["latents"] or []')
    return names


def check_latents(
    latents: NDArray[np.float32] | None, expected: tuple[int, ...]
) -> Sequence[NDArray[np.float32] | None]:
    """One (C, h, w) a picture, or None for each where none were given; `expected` is (N, C, h, w)."""
    if latents is None:
        return [None] * expected[0]
    given = np.asarray(latents, np.float32)
    if given.shape != expected:
        raise ConfigError(
            f"latents are {given.shape}; this call needs {expected}: pictures, channels, rows, columns"
        )
    return list(given)


def check_inpainting(
    image: Picture | None, mask_image: Picture | None, size: tuple[int, int], *, wanted: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """The picture with a hole and the hole, see `cut_out`, for a model that wants them; None for one that does not."""
    given = [name for name, value in (("image", image), ("mask_image", mask_image)) if value is not None]
    if wanted and len(given) < 2:
        raise ConfigError(
            "this bundle paints into a picture: give it image and mask_image (rt run: --image and --mask)"
        )
    if given and not wanted:
        raise ConfigError(f"{given[0]} is for an inpainting model; this bundle draws from the prompt alone")
    return cut_out(image, mask_image, *size) if wanted else None
