"""Arguments, seeds, outputs, callbacks, interruption and threads of `Pipeline.__call__`."""

from __future__ import annotations

import logging
import re
import string
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rt
from rt.backends import BACKENDS
from rt.backends.ort_cpu import OnnxRuntime
from rt.backends.views import DeviceSide
from rt.errors import (
    ArgumentError,
    BackendError,
    BackendUnavailableError,
    BundleError,
    ConfigError,
    NumericsError,
    ShapeError,
)
from rt.model import Component
from rt.philox import CudaGenerator
from rt.samplers import Scheduler
from rt.shapes import ShapeProfile

LATENTS = (4, 16, 16)
FAST: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(demo_bundle: Path) -> rt.Pipeline:
    return rt.Pipeline.from_bundle(demo_bundle)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture
def words(rng: np.random.Generator) -> Callable[[], str]:
    return lambda: " ".join(
        "".join(rng.choice(list(string.ascii_lowercase), n)) for n in rng.integers(1, 6, 3)
    )


WRONG: list[tuple[dict[str, Any], type[ConfigError], str]] = [
    (
        {"num_inference_step": 3},
        ArgumentError,
        "'num_inference_step' (did you mean 'num_inference_steps'?); valid: prompt, ",
    ),
    ({"promt": "x"}, ArgumentError, "'promt' (did you mean 'prompt'?)"),
    ({"guidance": 3}, ArgumentError, "'guidance' (did you mean 'guidance_"),
    ({"zzzzzz": 3}, ArgumentError, "unknown argument 'zzzzzz'; valid: "),
    ({"generator": 3}, ArgumentError, "'generator' (did you mean 'seed'?)"),
    ({"steps": 3}, ArgumentError, "'steps' (did you mean 'num_inference_steps'?)"),
    ({"cfg_scale": 3}, ArgumentError, "'cfg_scale' (did you mean 'guidance_scale'?)"),
    ({"sampler": "ddim"}, ArgumentError, "'sampler' (did you mean 'scheduler'?)"),
    ({"batch_size": 3}, ArgumentError, "'batch_size' (did you mean 'num_images_per_prompt'?)"),
    (
        {"guidance_interval": (0.8, 0.2)},
        ConfigError,
        "guidance_interval is (0.8, 0.2); it must be two numbers",
    ),
    (
        {"guidance_interval": (0.2, 1.2)},
        ConfigError,
        "guidance_interval is (0.2, 1.2); it must be two numbers",
    ),
    (
        {"guidance_interval": 0.5},
        ConfigError,
        "guidance_interval is 0.5; it must be two numbers with 0 <= start",
    ),
    (
        {"guidance_interval": (0.8, 0.2), "guidance_scale": 1.0},
        ConfigError,
        "guidance_interval is (0.8, 0.2)",
    ),
    ({"guidance_interval": "ab"}, ConfigError, "guidance_interval is 'ab'; it must be two numbers"),
    ({"guidance_interval": (0.4, 0.41)}, ConfigError, "holds none of the 2 steps: make it wider"),
    ({"step_cache": 0}, ConfigError, "step_cache is 0; it must be a whole number of at least 1"),
    ({"step_cache": 2.5}, ConfigError, "step_cache is 2.5; it must be a whole number of at least 1"),
    (
        {"step_cache": 3},
        ConfigError,
        "step_cache is 3, but this bundle has no shallow steps; build it again with",
    ),
    *(
        ({"clip_skip": wrong}, ConfigError, f"clip_skip is {wrong!r}; it must be a whole number from 0 to 3 ")
        for wrong in (-1, 4, True, 1.0, "2")
    ),
    ({"prompt": None}, ConfigError, "prompt is None; give a string or a non-empty list of strings"),
    ({"prompt": []}, ConfigError, "prompt is []; give a string"),
    ({"prompt": 3}, ConfigError, "prompt is 3; give a string"),
    ({"prompt": b"heart"}, ConfigError, "prompt is b'heart'; give a string"),
    ({"prompt": ["a", None]}, ConfigError, "prompt is ['a', None]; give a string"),
    (
        {"negative_prompt": ["a", "b"]},
        ConfigError,
        "2 negative prompts for 1 prompts; give one for all or one for each",
    ),
    (
        {"num_images_per_prompt": 0},
        ConfigError,
        "num_images_per_prompt is 0; it must be a whole number of at least 1",
    ),
    ({"num_images_per_prompt": 1.5}, ConfigError, "num_images_per_prompt is 1.5;"),
    ({"seed": [1, 2]}, ConfigError, "2 seeds for 1 pictures; give one for each, or the first one only"),
    ({"seed": []}, ConfigError, "0 seeds for 1 pictures"),
    ({"seed": 1.5}, ConfigError, "seed is 1.5; give a whole number"),
    ({"seed": "7"}, ConfigError, "seed is '7'; give a whole number"),
    ({"seed": [1.5]}, ConfigError, "seed is [1.5]; give a whole number"),
    ({"seed": 2**64}, ConfigError, f"seed {2**64} does not fit into 64 bits"),
    ({"output_type": "pt"}, ConfigError, "output_type 'pt' does not exist; use one of pil, np, latent"),
    (
        {"latents": np.zeros((2, *LATENTS))},
        ConfigError,
        "latents are (2, 4, 16, 16); this call needs (1, 4, 16, 16)",
    ),
    ({"latents": np.zeros(LATENTS)}, ConfigError, "latents are (4, 16, 16); this call needs (1, 4, 16, 16)"),
    (
        {"height": 512},
        ShapeError,
        "size 512 x any (height x width) is not in this bundle, which was built for 64 x 64",
    ),
    ({"height": 64, "width": 65}, ShapeError, "size 64 x 65"),
    (
        {"scheduler": "eular"},
        ConfigError,
        "unknown sampler 'eular' (did you mean 'euler'?); expected one of ddim, ",
    ),
    ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, ConfigError, "unknown sampler 'FlowMatchEuler"),
    (
        {"num_inference_steps": 0},
        ConfigError,
        "num_inference_steps got 0; expected a whole number from 1 to 1000",
    ),
    ({"num_inference_steps": 2.0}, ConfigError, "num_inference_steps got 2.0;"),
    ({"num_inference_steps": 1001}, ConfigError, "num_inference_steps got 1001;"),
    ({"eta": 0.5, "scheduler": "euler"}, ConfigError, "euler: eta got 0.5; only ddim and tcd have it"),
    ({"eta": 1.5, "scheduler": "ddim"}, ConfigError, "ddim: eta got 1.5; expected a number from 0 to 1"),
    (
        {"timesteps": [1, 2], "scheduler": "euler"},
        ConfigError,
        "timesteps got [1, 2]; expected each below the one before",
    ),
    ({"timesteps": [], "scheduler": "euler"}, ConfigError, "num_inference_steps got 0"),
    ({"timesteps": [2, 1], "scheduler": "pndm"}, ConfigError, "pndm: got timesteps, which it cannot take"),
]


@pytest.mark.parametrize(
    ("arguments", "error", "says"), WRONG, ids=[f"{i}-{next(iter(w[0]))}" for i, w in enumerate(WRONG)]
)
def test_what_has_no_meaning_is_refused_in_one_line(pipe, arguments, error, says):
    with pytest.raises(error, match=re.escape(says)) as caught:
        pipe(**{"prompt": "x", **FAST, **arguments})
    assert type(caught.value) is error
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_also_a_type_error(pipe):
    with pytest.raises(TypeError):
        pipe("x", promptt="y")


def test_what_cannot_be_opened(tmp_path, demo_bundle):
    with pytest.raises(BundleError, match="is not a bundle"):
        rt.Pipeline.from_bundle(tmp_path)
    with pytest.raises(
        ConfigError, match=re.escape("'openvin' does not exist (did you mean 'openvino'?); use one of auto,")
    ):
        rt.Pipeline.from_bundle(demo_bundle, backend="openvin")


def test_a_missing_engine_is_named_with_its_command(demo_bundle, monkeypatch):
    from rt.backends import openvino_cpu
    from rt.backends.openvino_cpu import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(openvino_cpu, "version", missing)
    with pytest.raises(BackendUnavailableError, match='openvino: not installed; run: pip install "openvino'):
        rt.Pipeline.from_bundle(demo_bundle, backend="openvino")
    assert rt.Pipeline.from_bundle(demo_bundle).engines.backend.name == "onnxruntime"


def test_seeds(pipe, words, rng):
    """Picture i of seed s is the picture of seed s + i, whatever is drawn with it."""
    prompt, seed = words(), int(rng.integers(2**62))
    four = pipe(prompt, seed=seed, num_images_per_prompt=4, output_type="latent", **FAST)
    assert four.seeds == [seed + i for i in range(4)]
    listed = pipe([prompt] * 2, seed=[seed + 3, seed], output_type="latent", **FAST)
    assert listed.seeds == [seed + 3, seed]
    np.testing.assert_allclose(listed.images, [four.images[3], four.images[0]], atol=1e-5)
    alone = pipe(prompt, seed=np.int64(seed + 2), output_type="latent", **FAST)
    assert alone.seeds == [seed + 2] and type(alone.seeds[0]) is int
    np.testing.assert_allclose(alone.images[0], four.images[2], atol=1e-5)
    assert np.abs(four.images[0] - four.images[1]).max() > 0.1


def test_pictures_come_prompt_by_prompt(pipe, words):
    prompts = [words(), words()]
    both = pipe(prompts, seed=[5, 6, 7, 8], num_images_per_prompt=2, output_type="latent", **FAST).images
    for i, picture in enumerate(both):
        alone = pipe(prompts[i // 2], seed=5 + i, output_type="latent", **FAST).images[0]
        np.testing.assert_allclose(picture, alone, atol=1e-5)
        other = pipe(prompts[1 - i // 2], seed=5 + i, output_type="latent", **FAST).images[0]
        assert np.abs(picture - other).max() > 1e-3


def test_zero_is_a_seed_and_none_is_a_random_one(pipe, words):
    prompt = words()
    assert pipe(prompt, seed=0, **FAST).seeds == [0]
    first, second = (pipe(prompt, output_type="latent", **FAST) for _ in range(2))
    assert first.seeds != second.seeds
    again = pipe(prompt, seed=first.seeds, output_type="latent", **FAST)
    np.testing.assert_array_equal(again.images, first.images)
    assert np.abs(first.images[0] - second.images[0]).max() > 0.1


def test_output_types(pipe, words, rng):
    arguments = {"prompt": words(), "seed": int(rng.integers(2**32)), "num_images_per_prompt": 3, **FAST}
    pil, array, latent = (pipe(**arguments, output_type=kind).images for kind in ("pil", "np", "latent"))
    assert [len(images) for images in (pil, array, latent)] == [3, 3, 3]
    for picture, pixels, latents in zip(pil, array, latent, strict=True):
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        assert (pixels.dtype, pixels.shape) == (np.float32, (64, 64, 3))
        assert 0 <= pixels.min() < pixels.max() <= 1
        assert (latents.dtype, latents.shape) == (np.float32, LATENTS)
        assert np.abs(np.asarray(picture) - pixels * 255.0).max() <= 0.5 + 1e-3
    assert not any(np.shares_memory(a, b) for a in latent for b in latent if a is not b)


def test_the_same_call_gives_the_same_bytes(pipe, demo_bundle, words, rng):
    arguments = {"prompt": words(), "seed": int(rng.integers(2**32)), "scheduler": "euler-a", **FAST}
    first = pipe(**arguments).images[0].tobytes()
    pipe(words(), seed=1, num_images_per_prompt=2, guidance_scale=1.0, **FAST)
    assert pipe(**arguments).images[0].tobytes() == first
    assert rt.Pipeline.from_bundle(demo_bundle)(**arguments).images[0].tobytes() == first


def test_both_backends_draw_the_same_picture(pipe, demo_bundle, words, rng):
    arguments = {
        "prompt": words(),
        "seed": int(rng.integers(2**32)),
        "output_type": "np",
        "num_inference_steps": 5,
    }
    other = rt.Pipeline.from_bundle(demo_bundle, backend="onnxruntime")
    assert np.abs(pipe(**arguments).images[0] - other(**arguments).images[0]).max() <= 2 / 255


def test_callback_sees_every_step_of_every_batch(pipe, words, rng):
    seen: list[tuple[int, float, tuple[int, ...]]] = []
    last: dict[int, Any] = {}

    def callback(given: rt.Pipeline, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        assert given is pipe
        assert list(tensors) == ["latents"]
        seen.append((step, timestep, tensors["latents"].shape))
        last[len(seen)] = tensors["latents"]

    config = pipe.bundle.manifest.model.scheduler
    scheduler = Scheduler.from_config(config, "heun")
    schedule = scheduler.schedule(4)
    result = pipe(
        words(), num_images_per_prompt=3, seed=5, num_inference_steps=4, scheduler=scheduler,
        callback_on_step_end=callback, output_type="latent",
    )  # fmt: skip
    expected = [(i, float(t), (size, *LATENTS)) for size in (2, 1) for i, t in enumerate(schedule.timesteps)]
    assert seen == expected
    np.testing.assert_array_equal(
        np.concatenate([last[len(schedule)], last[2 * len(schedule)]]), result.images
    )
    assert result.timings.steps == len(seen) == pipe.unet_calls(schedule, 3)


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_pictures_are_handed_over_as_they_are_done(pipe, words, output_type):
    seen: list[tuple[str, int]] = []
    given: list[Any] = []

    def keep(from_pipe: rt.Pipeline, index: int, image: Any) -> None:
        assert from_pipe is pipe
        seen.append(("image", index))
        given.append(image)

    images = pipe(
        words(), num_images_per_prompt=3, seed=5, output_type=output_type, callback_on_image_end=keep,
        callback_on_step_end=lambda p, step, t, kw: seen.append(("step", step)), **FAST,
    ).images  # fmt: skip
    steps = [("step", 0), ("step", 1)]
    assert seen == [*steps, ("image", 0), ("image", 1), *steps, ("image", 2)]
    assert all(one is other for one, other in zip(given, images, strict=True))


def test_an_error_when_a_picture_is_done_passes_through(pipe, words):
    with pytest.raises(LookupError, match="mine"):
        pipe(words(), callback_on_image_end=lambda *image: {}["mine"], **FAST)
    assert pipe(words(), **FAST).images


@pytest.mark.parametrize("name", ["dpmpp-sde", "unipc", "heun"])
def test_a_callback_that_only_looks_changes_nothing(pipe, words, name):
    """Nor does one that gives back what it was shown, as many do."""
    arguments = {"seed": 5, "num_inference_steps": 4, "scheduler": name, "output_type": "latent"}
    prompt = words()
    expected = pipe(prompt, **arguments).images
    for callback in (lambda p, step, t, given: None, lambda p, step, t, given: given):
        seen = pipe(prompt, callback_on_step_end=callback, **arguments).images
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("in_place", [False, True])
def test_callback_may_replace_the_latents(pipe, words, rng, in_place):
    other = rng.standard_normal((2, *LATENTS), dtype=np.float32)
    seen = []

    def callback(given: Any, step: int, timestep: float, tensors: dict[str, Any]) -> Any:
        seen.append(tensors["latents"].copy())
        if step != 2:
            return None
        if in_place:
            tensors["latents"][...] = other
            return tensors
        return {"latents": other}

    arguments = {"seed": 3, "num_images_per_prompt": 2, "scheduler": "ddim", "output_type": "latent"}
    prompt = words()
    replaced = pipe(prompt, num_inference_steps=3, callback_on_step_end=callback, **arguments)
    np.testing.assert_array_equal(replaced.images, other)
    middle = pipe(prompt, num_inference_steps=5, callback_on_step_end=callback, **arguments)
    plain = pipe(prompt, num_inference_steps=5, callback_on_step_end=lambda *step: {}, **arguments)
    assert np.abs(np.array(middle.images) - plain.images).max() > 0.1
    assert len(seen) == 8


def test_latents_of_another_shape_are_refused(pipe, words):
    with pytest.raises(
        ConfigError, match=re.escape("the callback gave latents (4, 16, 16); expected (1, 4, 16, 16)")
    ):
        pipe(words(), callback_on_step_end=lambda *s: {"latents": np.zeros((4, 16, 16), np.float32)}, **FAST)


def test_a_callback_cannot_draw_with_its_own_pipeline(pipe, words):
    with pytest.raises(ConfigError, match="a callback cannot draw with the pipeline that calls it"):
        pipe(words(), callback_on_step_end=lambda given, *s: given(words(), **FAST), **FAST)
    assert pipe(words(), **FAST).images


def test_no_noise_is_taken_by_samplers_that_add_none(pipe, words):
    arguments = {"prompt": words(), "seed": 3, "scheduler": "euler", "output_type": "latent", **FAST}
    np.testing.assert_array_equal(pipe(eta=0.0, **arguments).images[0], pipe(**arguments).images[0])


def test_an_error_in_the_callback_passes_through_and_the_pipeline_goes_on(pipe, words):
    def callback(*step: Any) -> None:
        raise LookupError("mine")

    prompt = words()
    before = pipe(prompt, seed=1, **FAST).images[0].tobytes()
    with pytest.raises(LookupError, match="mine"):
        pipe(prompt, seed=1, callback_on_step_end=callback, **FAST)
    assert pipe(prompt, seed=1, **FAST).images[0].tobytes() == before


def test_interrupt_from_another_thread_stops_at_the_next_step(pipe, words):
    reached, asked = threading.Event(), threading.Event()
    steps, kept = [], []

    def callback(given: rt.Pipeline, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        steps.append(step)
        kept.append(tensors["latents"].copy())
        if step == 3:
            reached.set()
            assert asked.wait(30)

    def other() -> None:
        assert reached.wait(30)
        pipe.interrupt()
        asked.set()

    thread = threading.Thread(target=other)
    thread.start()
    result = pipe(
        words(), num_images_per_prompt=4, num_inference_steps=50, seed=1,
        callback_on_step_end=callback, output_type="latent",
    )  # fmt: skip
    thread.join()
    assert steps == [0, 1, 2, 3]
    np.testing.assert_array_equal(result.images, kept[-1])
    assert result.seeds == [1, 2], "a seed for each picture that was drawn"
    assert len(pipe(words(), num_images_per_prompt=3, **FAST).images) == 3


def test_interrupt_while_idle_does_not_touch_the_next_call(pipe, words):
    pipe.interrupt()
    assert len(pipe(words(), num_images_per_prompt=3, **FAST).images) == 3


def test_threads_take_turns(pipe, words, rng):
    """Eight threads with nothing in common draw what one would."""
    calls = [
        {
            "prompt": words(),
            "negative_prompt": words() if i % 3 == 0 else None,
            "seed": int(rng.integers(2**32)),
            "scheduler": ("euler-a", "pndm", "ddim", "heun")[i % 4],
            "num_inference_steps": 2 + i % 3,
            "num_images_per_prompt": 1 + i % 2,
            "guidance_scale": 1.0 if i % 4 == 1 else 6.0,
        }
        for i in range(8)
    ]

    def draw(arguments: dict[str, Any]) -> list[bytes]:
        return [image.tobytes() for image in pipe(**arguments).images]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, calls))
    assert together == [draw(arguments) for arguments in calls]


def test_timings_add_up(pipe, words):
    pipe(words(), num_images_per_prompt=2, **FAST)
    started = time.perf_counter()
    timings = pipe(
        words(), num_images_per_prompt=2, num_inference_steps=6, callback_on_step_end=lambda *s: None
    ).timings
    wall = time.perf_counter() - started
    parts = timings.load_s + timings.text_s + timings.denoise_s + timings.decode_s
    assert min(timings.text_s, timings.denoise_s, timings.decode_s) > 0
    assert parts <= timings.total_s <= wall
    assert timings.total_s - parts < 0.1 * timings.total_s + 0.05
    assert timings.load_s < 0.2 * timings.total_s
    assert timings.steps == 6


def test_a_prompt_that_does_not_fit_is_cut_with_a_warning(pipe, caplog):
    long = "a red heart with " + " ".join(["blue"] * 40)
    with caplog.at_level(logging.WARNING, "rt"):
        pipe(long, seed=1, **FAST)
    (record,) = caplog.records
    assert record.getMessage().startswith("the prompt has ")
    caplog.clear()
    pipe("a red heart", seed=1, **FAST)
    assert not caplog.records


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_what_is_not_finite_is_an_error_with_its_component(pipe, component, words, monkeypatch):
    prompt = words()
    before = pipe(prompt, seed=1, **FAST).images[0].tobytes()
    profile = None if component == "text_encoder" else ShapeProfile(64, 64)
    engine = pipe.engines.get(Component(component), profile, guided=component == "unet")

    def broken() -> None:
        for output in engine.outputs.values():
            output.flat[-1] = np.nan

    with monkeypatch.context() as patch:
        patch.setattr(engine, "enqueue", broken)
        with pytest.raises(NumericsError, match=rf"^{component} gave NaN or Inf") as caught:
            pipe(prompt, seed=1, **FAST)
    assert "\n" not in str(caught.value)
    assert pipe(prompt, seed=1, **FAST).images[0].tobytes() == before


def test_given_latents_are_left_alone_and_may_be_of_any_float(pipe, words, rng):
    latents = rng.standard_normal((1, *LATENTS))
    before = latents.copy()
    prompt = words()
    double, single = (
        pipe(prompt, latents=array, seed=1, scheduler="euler-a", output_type="latent", **FAST).images[0]
        for array in (latents, latents.astype(np.float32))
    )
    np.testing.assert_array_equal(double, single)
    np.testing.assert_array_equal(latents, before)


def test_timesteps_say_how_many_steps_there_are(pipe, words):
    seen = []
    pipe(
        words(),
        timesteps=[900, 500, 20],
        scheduler="euler",
        callback_on_step_end=lambda p, i, t, kw: seen.append(t),
    )
    assert seen == [900, 500, 20]


def test_a_negative_prompt_serves_all_prompts(pipe, words):
    prompts, negative = [words(), words()], words()
    one = pipe(prompts, negative_prompt=negative, seed=4, output_type="latent", **FAST)
    each = pipe(prompts, negative_prompt=[negative] * 2, seed=4, output_type="latent", **FAST)
    np.testing.assert_array_equal(one.images, each.images)
    none = pipe(prompts, seed=4, output_type="latent", **FAST)
    empty = pipe(prompts, negative_prompt="", seed=4, output_type="latent", **FAST)
    np.testing.assert_array_equal(none.images, empty.images)
    assert np.abs(np.array(one.images) - none.images).max() > 1e-3


def test_repr(pipe, demo_bundle):
    assert repr(pipe) == f"Pipeline({str(demo_bundle)!r}, backend='openvino')"
    result = pipe("x", seed=1, **FAST)
    assert "seeds=[1]" in repr(result) and "denoise_s=" in repr(result.timings)


def test_pndm_goes_on_from_replaced_latents_as_diffusers_does(demo_bundle: Path, demo_model: Path) -> None:
    """Half the latents are replaced after step 2; row 4 of PLMS reads an output from before that."""
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(demo_model, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = PNDMScheduler.from_config(theirs.scheduler.config, skip_prk_steps=True)
    given = np.random.default_rng().standard_normal((1, 4, 16, 16)).astype(np.float32)

    def replaced(step: int, latents: Any) -> Any:
        if step == 2:
            latents[:, :, :8] = 0.5 * latents[:, :, :8] + 1.0
        return {"latents": latents}

    arguments = {"num_inference_steps": 10, "guidance_scale": 3.0}
    expected = theirs(
        "a red heart",
        latents=torch.from_numpy(given),
        output_type="np",
        callback_on_step_end=lambda pipe, step, t, kwargs: replaced(step, kwargs["latents"]),
        **arguments,
    ).images[0]
    got = rt.Pipeline.from_bundle(demo_bundle)(
        "a red heart",
        latents=given,
        output_type="np",
        scheduler="pndm",
        callback_on_step_end=lambda pipe, step, t, kwargs: replaced(step, kwargs["latents"]),
        **arguments,
    ).images[0]
    assert np.abs(got - expected).max() <= 2 / 255


@pytest.fixture
def device_pipe(demo_bundle, tmp_path, monkeypatch):
    """Engines of ONNX Runtime as those of a device, with the loop and its kernels there."""
    pytest.importorskip("triton")  # the kernels' references are in the kernels' files
    from .device_fakes import host_device, library

    class OnDevice(OnnxRuntime):
        name = "on-device"

        def open_device(self):
            return host_device()

        def load_on(self, device, path, inputs, outputs, *, dtype):
            return DeviceSide(path.stem, self.load(path, inputs, outputs, dtype=dtype, threads=2), device)

    monkeypatch.setitem(BACKENDS, OnDevice.name, OnDevice())
    monkeypatch.setattr("rt.pipeline.KernelLibrary", lambda device, *_: library(device, tmp_path))
    pipe = rt.Pipeline.from_bundle(demo_bundle, backend=OnDevice.name)
    yield pipe
    pipe.close()


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_the_loop_on_a_device_draws_the_same(device_pipe, demo_bundle, words, output_type):
    arguments = {
        "prompt": [words(), words()],
        "num_images_per_prompt": 2,  # one batch of two, twice
        "num_inference_steps": 4,
        "scheduler": "euler-a",
        "guidance_rescale": 0.5,
        "guidance_interval": (0.0, 0.6),
        "output_type": output_type,
        "seed": 3,
    }
    device = device_pipe.engines.place.device
    got = device_pipe(**arguments)
    assert got.timings.steps == 8
    allocated = device.allocated
    again = device_pipe(**arguments)
    assert device.allocated == allocated
    expected = rt.Pipeline.from_bundle(demo_bundle, backend="onnxruntime")(**arguments)
    limit = {"pil": 1, "np": 1e-3, "latent": 1e-3}[output_type]
    for one, other, same in zip(got.images, expected.images, again.images, strict=True):
        assert np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).max() <= limit
        np.testing.assert_array_equal(np.asarray(one), np.asarray(same))
    device_pipe.close()
    assert device.in_use == 0


def test_on_a_device_a_callback_that_does_not_look_makes_nobody_wait(device_pipe, words):
    calls, seen = [], []
    device = device_pipe.engines.place.device
    arguments = {
        "prompt": words(),
        "num_inference_steps": 6,
        "scheduler": "ddim",
        "output_type": "latent",
        "seed": 1,
    }

    def look(pipe, step, timestep, given):
        seen.append(given)
        calls.append([call.name for call in device.calls])
        device.calls = []

    device_pipe(callback_on_step_end=look, callback_on_step_end_tensor_inputs=[], **arguments)
    assert all("synchronise" not in names and "download" not in names for names in calls[1:])
    assert seen == [{}] * 6
    got = device_pipe(
        callback_on_step_end=lambda pipe, step, timestep, given: {"latents": 0.9 * given["latents"]},
        **arguments,
    )
    assert np.abs(got.images[0]).max() > 0


def test_interrupt_on_a_device(device_pipe, words):
    arguments = {"prompt": words(), "num_inference_steps": 9, "output_type": "latent"}
    stop = lambda pipe, step, timestep, given: pipe.interrupt() if step == 2 else None  # noqa: E731
    got = device_pipe(callback_on_step_end=stop, callback_on_step_end_tensor_inputs=[], **arguments)
    assert got.timings.steps == 3


def test_a_bundle_that_was_built_for_the_processor_is_looped_over_there(device_pipe, words, monkeypatch):
    monkeypatch.undo()
    assert len(device_pipe(words(), **FAST).images) == 1
    assert "kernel" not in {call.name for call in device_pipe.engines.place.device.calls}


@pytest.mark.parametrize("names", ["latents", ["prompt_embeds"]])
def test_what_a_callback_can_be_shown(pipe, words, names):
    with pytest.raises(
        ConfigError, match=r"callback_on_step_end_tensor_inputs is .*; use \[\"latents\"\] or \[\]"
    ):
        pipe(words(), callback_on_step_end_tensor_inputs=names, **FAST)


def test_engines_of_the_host_have_no_device_side(pipe):
    with pytest.raises(ConfigError, match="openvino runs on the host; use a backend of a GPU"):
        pipe.engines.on_device(Component.UNET_TIME)


def test_a_closed_pipeline_cannot_draw(demo_bundle, words):
    with rt.Pipeline.from_bundle(demo_bundle, backend="onnxruntime") as pipe:
        pipe(words(), **FAST)
    pipe.close()
    with pytest.raises(ConfigError, match="this pipeline is closed: open the bundle again"):
        pipe(words(), **FAST)


def test_replaced_latents_are_not_read_first(device_pipe, words):
    device, names = device_pipe.engines.place.device, []
    other = np.ones((1, *LATENTS), np.float32)

    def replace(pipe, step, timestep, given):
        names.append([call.name for call in device.calls])
        device.calls = []
        return {"latents": other}

    device_pipe(words(), callback_on_step_end=replace, callback_on_step_end_tensor_inputs=[], **FAST)
    assert "wait" in names[1] and "download" not in names[1]
    with pytest.raises(
        ConfigError, match=re.escape("the callback gave latents (4, 16, 16); expected (1, 4, 16, 16)")
    ):
        device_pipe(words(), callback_on_step_end=lambda *s: {"latents": other[0]}, **FAST)


def test_a_session_that_cannot_be_closed_does_not_keep_the_rest(device_pipe, words, monkeypatch):
    device = device_pipe.engines.place.device
    device_pipe(words(), num_images_per_prompt=3, **FAST)  # a batch of two and one of one
    *_, last = device_pipe._sessions.values()
    assert len(device_pipe._sessions) == 2
    close = last.close

    def stuck():
        close()
        raise BackendError("stuck")

    monkeypatch.setattr(last, "close", stuck)
    with pytest.raises(BackendError, match="stuck"):
        device_pipe.close()
    assert device.in_use == 0 and device.calls[-1].name == "close"
    device_pipe.close()
    with pytest.raises(ConfigError, match="this pipeline is closed"):
        device_pipe(words(), **FAST)


def test_a_bundle_that_cannot_be_opened_opens_no_device(demo_bundle, monkeypatch):
    def fails(path):
        raise BundleError("no tokenizer")

    monkeypatch.setattr("rt.pipeline.Tokenizer.open", fails)
    monkeypatch.setattr("rt.pipeline.Engines", lambda *_: pytest.fail("opened first"))
    with pytest.raises(BundleError, match="no tokenizer"):
        rt.Pipeline.from_bundle(demo_bundle)


def test_the_seeds_of_a_gpu_begin_from_its_noise(pipe, words):
    arguments = {"prompt": words(), "output_type": "latent", "num_inference_steps": 2, "scheduler": "ddim"}
    got = pipe(rng="cuda", seed=5, **arguments).images[0]
    given = CudaGenerator(5).randn((1, *got.shape))
    np.testing.assert_array_equal(got, pipe(latents=given, **arguments).images[0])
    assert np.abs(got - pipe(seed=5, **arguments).images[0]).max() > 0.1
    with pytest.raises(ConfigError, match=r"^rng 'gpu' does not exist; use one of cpu, cuda$"):
        pipe(rng="gpu", **arguments)
