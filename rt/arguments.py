"""What a call of the pipeline was given, checked and brought into one form."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt.errors import ArgumentError, ConfigError, nearest, shown
from rt.inpainting import cut_out
from rt.noise import Generator, Noise, bits_of
from rt.philox import CudaGenerator
from rt.picture import Picture
from rt.samplers import Scheduler
from rt.whole import is_whole

MOST_PICTURES = 65_536
"""Of one call, which keeps them all."""
LARGEST = float(np.finfo(np.float32).max)
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


def check_path(path: object) -> str:
    """Of a bundle."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError(f"the path of the bundle is {shown(path)}; give a string or a pathlib.Path")
    return text


def check_backend(backend: object) -> None:
    """A name; whether there is one of it is for `rt.backends.choose` to say."""
    if not isinstance(backend, str):
        raise ConfigError(f"backend is {shown(backend)}; give its name, or auto")


def check_prompts(prompt: object) -> list[str]:
    """One prompt or several, as a list."""
    prompts = [prompt] if isinstance(prompt, str) else _listed(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ConfigError(f"prompt is {shown(prompt)}; give a string or a non-empty list of strings")
    return [_unicode(text, "prompt") for text in prompts]


def check_negative_prompts(negative: object, count: int) -> list[str | None]:
    """One for each of `count` prompts; None where none was given, which is not the same as ""."""
    if negative is None:
        return [None] * count
    given = [negative] * count if isinstance(negative, str) else _listed(negative)
    if given is None or not all(isinstance(text, str) for text in given):
        raise ConfigError(
            f"negative_prompt is {shown(negative)}; give a string, or a list with one for each prompt"
        )
    if len(given) != count:
        raise ConfigError(
            f"{len(given)} negative prompts for {count} prompts; give one for all or one for each"
        )
    return [_unicode(text, "negative_prompt") for text in given]


def check_count(num_images_per_prompt: object, prompts: int) -> int:
    """Pictures of one prompt, of which there are so many."""
    if not is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
        raise ConfigError(
            f"num_images_per_prompt is {shown(num_images_per_prompt)}; it must be a whole number of at least 1"
        )
    if num_images_per_prompt * prompts > MOST_PICTURES:
        raise ConfigError(
            f"num_images_per_prompt is {shown(num_images_per_prompt)}; a call draws at most {MOST_PICTURES} pictures: "
            f"make several, each with a seed of its own"
        )
    return int(num_images_per_prompt)


def check_side(pixels: object, name: str) -> int | None:
    """Height or width; whether it was built is for `rt.shapes.choose_size` to say."""
    if pixels is None:
        return None
    if not is_whole(pixels):
        raise ConfigError(f"{name} is {shown(pixels)}; it must be a whole number of pixels, or None")
    if not 1 <= pixels < 2**31:
        raise ConfigError(f"{name} is {shown(pixels)}; it must be a size that was built, see rt inspect")
    return int(pixels)


def check_seeds(seed: object, count: int) -> list[int]:
    """One for each picture: picture i has seed + i, so that it does not depend on how many are drawn with it."""
    if seed is None:
        seed = secrets.randbits(32)
    if is_whole(seed):
        seeds = [int(seed) + index for index in range(count)]
    else:
        given = _listed(seed)
        if given is None or not all(map(is_whole, given)):
            raise ConfigError(f"seed is {shown(seed)}; give a whole number, or one for each picture")
        if len(given) != count:
            raise ConfigError(
                f"{len(given)} seeds for {count} pictures; give one for each, or the first one only"
            )
        seeds = [int(value) for value in given]
    for each in seeds:
        bits_of(each)  # raises for one that does not fit
    return seeds


def check_guidance(scale: object, rescale: object) -> tuple[float, float]:
    """Scale and rescale as numbers that mean something."""
    strength, part = _number(scale), _number(rescale)
    if strength is None or abs(strength) > LARGEST:
        raise ConfigError(
            f"guidance_scale is {shown(scale)}; it must be a finite number, 1 or less for no guidance"
        )
    if part is None or not 0 <= part <= 1:
        raise ConfigError(f"guidance_rescale is {shown(rescale)}; it must be a number from 0 (off) to 1")
    return strength, part


def check_guidance_interval(interval: object) -> tuple[float, float]:
    """Start and stop in parts of the schedule."""
    start, stop = map(_number, given) if (given := _listed(interval)) and len(given) == 2 else (None, None)
    if start is None or stop is None or not 0 <= start < stop <= 1:
        raise ConfigError(
            f"guidance_interval is {shown(interval)}; "
            f"it must be two numbers with 0 <= start < stop <= 1, such as 0.2, 0.8"
        )
    return start, stop


def check_step_cache(step_cache: object, *, built: bool) -> int:
    """One step of so many is full; a bundle must have been `built` for more than one."""
    if not is_whole(step_cache) or step_cache < 1:
        raise ConfigError(
            f"step_cache is {shown(step_cache)}; it must be a whole number of at least 1, where 1 turns it off"
        )
    if step_cache > 1 and not built:
        raise ConfigError(
            f"step_cache is {shown(step_cache)}, but this bundle has no shallow steps; "
            f"build it again with --step-cache"
        )
    return min(int(step_cache), 2**31)


def check_timesteps(timesteps: object) -> list[Any] | None:
    """A list; what is in it, and whether the sampler takes it, is for `Scheduler.schedule` to say."""
    if timesteps is None:
        return None
    given = _listed(timesteps.tolist() if isinstance(timesteps, np.ndarray) else timesteps)
    if given is None:
        raise ConfigError(f"timesteps is {shown(timesteps)}; give a list of falling whole numbers, or None")
    return given


def check_scheduler(scheduler: object) -> str | Scheduler | None:
    """A sampler or its name; whether there is one of it is for `Scheduler.from_config` to say."""
    if scheduler is not None and not isinstance(scheduler, str | Scheduler):
        raise ConfigError(
            f"scheduler is {shown(scheduler)}; give the name of a sampler, an rt.Scheduler, or None"
        )
    return scheduler


def check_clip_skip(clip_skip: object, rows: int) -> int:
    """The row to take of the text encoders' states, of which a bundle has `rows`; None is the first."""
    if clip_skip is None:
        return 0
    if not is_whole(clip_skip) or not 0 <= clip_skip < rows:
        raise ConfigError(
            f"clip_skip is {shown(clip_skip)}; it must be a whole number from 0 to {rows - 1} for this bundle, how "
            "many of the last layers of its text encoder to leave out, or None"
        )
    return int(clip_skip)


def check_rng(rng: object) -> Callable[[int], Noise]:
    """Seed to stream; one of `RNGS`."""
    if not isinstance(rng, str) or rng not in RNGS:
        raise ConfigError(f"rng {shown(rng)} does not exist; use one of {', '.join(RNGS)}")
    return RNGS[rng]


def check_output_type(output_type: object) -> None:
    """One of `OUTPUT_TYPES`."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ConfigError(
            f"output_type {shown(output_type)} does not exist; use one of {', '.join(OUTPUT_TYPES)}"
        )


def check_callback(callback: object, name: str) -> None:
    """A function, or None."""
    if callback is not None and not callable(callback):
        raise ConfigError(f"{name} is {shown(callback)}; give a function, or None")


def check_tensor_inputs(names: object) -> Sequence[str]:
    """What a callback is shown: "latents" or nothing."""
    given = _listed(names)
    if given is None or not all(isinstance(name, str) and name == "latents" for name in given):
        raise ConfigError(f'callback_on_step_end_tensor_inputs is {shown(names)}; use ["latents"] or []')
    return given


def check_replaced(result: object, expected: tuple[int, ...]) -> Sequence[NDArray[np.float32]]:
    """The latents (B, C, h, w) that a callback returned, none where it returned none; `expected` is their shape."""
    if result is None:
        return ()
    if not isinstance(result, Mapping) or not all(isinstance(key, str) for key in result):
        raise ConfigError(f"the callback returned {shown(result)}; expected None, or a dict with latents")
    if others := [key for key in result if key != "latents"]:
        raise ConfigError(
            f"the callback returned {', '.join(map(shown, others))}; it can replace latents only"
        )
    return (
        list(_latents(result["latents"], expected, "the callback gave latents", "expected")) if result else ()
    )


def check_latents(latents: object, expected: tuple[int, ...]) -> Sequence[NDArray[np.float32] | None]:
    """One (C, h, w) a picture, or None for each where none were given; `expected` is (N, C, h, w)."""
    if latents is None:
        return [None] * expected[0]
    return list(_latents(latents, expected, "latents are", "this call needs"))


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


def _number(value: Any) -> float | None:
    """As a finite float; None for what is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _listed(value: Any) -> list[Any] | None:
    """What is a list of a sensible length; None for what is none. Text and bytes are sequences to Python alone."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        return None
    try:
        return list(value) if len(value) <= MOST_PICTURES else None
    except OverflowError:  # a range may be longer than Python counts
        return None


def _unicode(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{name} is not a string of valid Unicode: {shown(text)}; on a command line, type it in UTF-8"
        ) from None
    return text


def _latents(given: object, expected: tuple[int, ...], they: str, needed: str) -> NDArray[np.float32]:
    """Finite float32 of a shape; `they` and `needed` are how the sentence begins and goes on that says otherwise."""
    try:
        if isinstance(given, Sequence) and len(given) != expected[0]:  # before it is copied
            raise ConfigError(
                f"{they} {len(given)} of something; {needed} {expected}: pictures, channels, rows, columns"
            )
        array = np.asarray(given)
    except ConfigError:
        raise
    except Exception as error:  # an object's own, or ragged lists
        raise ConfigError(f"{they} no array ({type(error).__name__}); {needed} {expected}") from None
    if array.shape != expected:
        raise ConfigError(f"{they} {array.shape}; {needed} {expected}: pictures, channels, rows, columns")
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"{they} {array.dtype}; {needed} floats {expected}")
    with np.errstate(over="ignore"):
        floats = array.astype(np.float32)
    if not np.isfinite(floats).all():
        raise ConfigError(
            f"{they} not all finite; {needed} {expected} without NaN, Inf or what float32 cannot hold"
        )
    return floats
