"""Prompts to pictures: tokens → conditioning → N × step → decode. Owns no numerics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from threading import RLock
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rt.arguments import (
    check_backend,
    check_callback,
    check_clip_skip,
    check_count,
    check_guidance,
    check_guidance_interval,
    check_inpainting,
    check_latents,
    check_negative_prompts,
    check_output_type,
    check_path,
    check_prompts,
    check_replaced,
    check_rng,
    check_scheduler,
    check_seeds,
    check_side,
    check_step_cache,
    check_tensor_inputs,
    check_timesteps,
    unknown_argument,
)
from rt.backends import AUTO
from rt.bundle import Bundle
from rt.conditioning import Conditioning
from rt.cuda import KernelLibrary
from rt.device_session import DeviceSession
from rt.engines import EngineKey, Engines
from rt.errors import ConfigError
from rt.images import to_pil
from rt.inpainting import Inpainting
from rt.model import Component
from rt.noise import Noise
from rt.picture import Picture
from rt.plan import plan
from rt.process import on_fork
from rt.samplers import Schedule, Scheduler, shorten
from rt.session import Loop, OnStep, Row, RowState, Session, check_finite
from rt.shapes import ShapeProfile, choose_size, split_batch
from rt.timings import Stopwatch, Timings
from rt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "latent"]
Callback = Callable[["Pipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
ImageCallback = Callable[["Pipeline", int, Any], object]


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineOutput:
    """What a call gives.

    Attributes:
        images: One a picture: PIL images, float32 (H, W, 3) in [0, 1] for "np", float32 (C, h, w) for "latent".
        seeds: The seed of each, also when none was given.
        timings: Where the time went.
    """

    images: list[Any]
    seeds: list[int]
    timings: Timings


class Pipeline:
    """A bundle, ready to draw. Calls from several threads take turns."""

    def __init__(self, bundle: Bundle, *, backend: str = AUTO, threads: int | None = None) -> None:
        check_backend(backend)
        self.bundle = bundle
        spec = bundle.manifest.model
        bundle.verify(f"tokenizer/{encoder.value}.json" for encoder in spec.text_encoders)
        self._tokenizers = {
            encoder: Tokenizer.open(bundle.path / "tokenizer" / f"{encoder.value}.json")
            for encoder in spec.text_encoders
        }
        self._profiles = list(
            dict.fromkeys(
                e.profile for e in bundle.manifest.engines if e.component is Component.UNET and e.profile
            )
        )
        # Of each text encoder's states, one for each number of layers that can be left out.
        self._text_rows = min(
            (
                output.shape[0]
                for engine in bundle.manifest.engines
                for output in engine.outputs
                if engine.component in spec.text_encoders and output.name == "states"
            ),
            default=1,
        )
        self._sessions: dict[ShapeProfile, Loop] = {}
        self._kernels: KernelLibrary | None = None
        self._interrupt = False
        self._lock = RLock()
        self._drawing = False
        self._closed = False
        on_fork(self, Pipeline._unlock)
        # The last step: there is nothing after it that could fail, and leave a device open.
        self.engines = Engines(bundle, backend, threads)

    def __repr__(self) -> str:
        return f"Pipeline({str(self.bundle.path)!r}, backend={self.engines.backend.name!r})"

    @classmethod
    def from_bundle(
        cls, path: str | PathLike[str], *, backend: str = AUTO, threads: int | None = None
    ) -> Pipeline:
        """Open the bundle at `path`; engines load, and their files are hashed, when first needed.

        For "auto" one is loaded at once where the bundle has compiled programs, to see whether they run here.

        Args:
            path: The directory that `rt build` wrote.
            backend: One of `rt.backends.BACKENDS`, or auto: the best for the bundle of those that are here.
            threads: Processors to use; by default OMP_NUM_THREADS, or all that this process may use, see
                `rt.processors`.

        Raises:
            BundleError, IntegrityError, IncompatibleBundleError: The bundle cannot be used.
            BackendUnavailableError: No engine is installed.
            ConfigError: A value that has no meaning.
        """
        return cls(Bundle.open(check_path(path)), backend=backend, threads=threads)

    def close(self) -> None:
        """Give sessions, engines and a GPU's memory back; a pipeline that is closed cannot draw."""
        if self._closed:
            return
        if self.engines.forked:
            self._closed = True
            return
        with self._turn(), ExitStack() as closing:  # from the last one to the first, past those that fail
            self._closed = True
            closing.callback(self.engines.close)
            for session in self._sessions.values():
                closing.callback(session.close)
            self._sessions.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def interrupt(self) -> None:
        """Stop the running call at its next step; it returns what it has."""
        self._interrupt = True

    def unet_calls(
        self, schedule: Schedule, count: int, height: int | None = None, width: int | None = None
    ) -> int:
        """How often drawing `count` pictures by `schedule` calls the U-Net: rows of the table times batches."""
        profiles = self._profiles_of(choose_size(self._profiles, height, width))
        return len(schedule) * len(split_batch(count, (profile.batch_size for profile in profiles)))

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        *,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        latents: NDArray[np.float32] | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_image_end: ImageCallback | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        seed: int | Sequence[int] | None = None,
        scheduler: str | Scheduler | None = None,
        image: Picture | None = None,
        mask_image: Picture | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        step_cache: int = 1,
        rng: str = "cpu",
        **unknown: object,
    ) -> PipelineOutput:
        """Draw `num_images_per_prompt` pictures of each prompt, prompt by prompt.

        Names and defaults are those of diffusers' pipeline for the model, such as `StableDiffusionPipeline.__call__`
        (https://huggingface.co/docs/diffusers/api/pipelines/stable_diffusion/text2img).

        Args:
            prompt: One or several; what does not fit into the model's tokens is dropped with a warning.
            height: In pixels; one that the bundle was built for. The first built size when left out.
            width: As `height`.
            num_inference_steps: Steps of the sampler; some samplers call the U-Net twice a step.
            timesteps: Custom timesteps instead, where the sampler takes them.
            guidance_scale: Strength of classifier-free guidance; 1 or less turns it off. When left out, 5 for XL and
                7.5 for the others, among them XL's inpainting.
            negative_prompt: What to keep away from, one for all prompts or one for each.
            num_images_per_prompt: Pictures of each prompt.
            eta: Noise of DDIM and TCD, from 0 to 1; other samplers have none and refuse all but 0.
            latents: Unit noise (N, C, h, w) to begin with, instead of the seeds'.
            output_type: "pil", "np" or "latent".
            callback_on_step_end: Called as (pipe, step, timestep, {"latents": (B, C, h, w)}) after each step of a
                batch; returns None, or a dict whose "latents" replace them.
            callback_on_step_end_tensor_inputs: ["latents"], or [] for a callback that does not look at them: on a GPU
                it then need not wait for each step.
            callback_on_image_end: Called as (pipe, index, image) when a picture is done, such as to save it at once:
                its place among all, and itself as in `PipelineOutput.images`. Those of a batch come one by one.
            guidance_rescale: φ of https://arxiv.org/abs/2305.08891, for zero-terminal-SNR models.
            clip_skip: How many of the last layers of each text encoder to leave out for the prompt, beyond those that
                the model leaves out anyway; the negative prompt is always read in full.
            seed: Of the first picture, the others count up from it; or one for each picture; random when left out.
            scheduler: Name of a sampler (`rt.samplers.SAMPLERS`, a class of diffusers, what A1111 or ComfyUI call
                it), or a `Scheduler`; the checkpoint's own when left out.
            image: For an inpainting model: the picture to change, resized to the built size. Its encoder gives a
                distribution. As diffusers does with a list of generators, a call takes one sample of it for all of its
                pictures, with the noise of the first one's seed after its latents. So those after the first depend on
                that seed, too, by the encoder's deviation: nothing to be seen in Stable Diffusion.
            mask_image: Bright where it is to be painted anew, from noise alone (diffusers' strength 1).
            guidance_interval: Start and stop of guidance in parts of the schedule, see `rt.samplers.shorten`; steps
                outside cost half, and the picture is another one.
            step_cache: Of so many steps only one runs the whole U-Net, see `rt.samplers.shorten`; for a bundle that
                was built with --step-cache. 1 runs it at every step; more is faster, and the picture is another one.
            rng: "cpu" or "cuda": whose random numbers the seeds mean, those of torch on a CPU, as diffusers recommends,
                or on an NVIDIA GPU. Either can be had on any machine.

        Raises:
            ArgumentError: For a keyword that does not exist, with the nearest that does.
            ConfigError, ShapeError: For a value that has no meaning.
            NumericsError: When a component gives NaN or Inf.
        """
        if unknown:
            raise unknown_argument(next(iter(unknown)), self.__call__)
        watch = Stopwatch()
        prompts = check_prompts(prompt)
        negatives = check_negative_prompts(negative_prompt, len(prompts))
        repeats = check_count(num_images_per_prompt, len(prompts))
        count = repeats * len(prompts)
        seeds = check_seeds(seed, count)
        stream = check_rng(rng)
        check_output_type(output_type)
        check_callback(callback_on_step_end, "callback_on_step_end")
        check_callback(callback_on_image_end, "callback_on_image_end")
        shown = check_tensor_inputs(callback_on_step_end_tensor_inputs)
        if guidance_scale is None:
            guidance_scale = self.bundle.manifest.model.default_guidance_scale
        guidance_scale, guidance_rescale = check_guidance(guidance_scale, guidance_rescale)
        guidance_interval = check_guidance_interval(guidance_interval)
        skip = check_clip_skip(clip_skip, self._text_rows)
        guided = guidance_scale > 1
        size = choose_size(self._profiles, check_side(height, "height"), check_side(width, "width"))
        shape = self.bundle.manifest.model.latent_shape(*size)
        given = check_latents(latents, (count, *shape))
        schedule = shorten(
            self._schedule(scheduler, num_inference_steps, timesteps, eta),
            guidance_interval=guidance_interval if guided else (0.0, 1.0),
            step_cache=check_step_cache(step_cache, built=self.bundle.manifest.config.step_cache),
        )
        hole = check_inpainting(image, mask_image, size, wanted=self.bundle.manifest.model.inpainting)

        with self._turn():
            self._interrupt = False
            first, start, inpainting = stream(seeds[0]), given[0], None
            with watch("load"):
                self._load(size, count, schedule, guided=guided, decode=output_type != "latent")
            with watch("text"):
                pairs = self._encode(prompts, negatives, skip, guided=guided)
                if hole is not None:
                    start = first.randn(shape) if start is None else start
                    inpainting = self._encode_picture(*hole, first)
            rows = (
                Row(
                    schedule=schedule,
                    noise=stream(seeds[index]) if index else first,
                    cond=pairs[index // repeats][0],
                    uncond=pairs[index // repeats][1],
                    guidance_scale=guidance_scale,
                    guidance_rescale=guidance_rescale,
                    latents=given[index] if index else start,
                    inpainting=inpainting,
                )
                for index in range(count)
            )
            images: list[Any] = []
            calls = 0
            for session, batch in self._batches(rows, count, size):
                with watch("denoise"):
                    session.run(batch, self._on_step(callback_on_step_end, shown, shape))
                calls += session.calls
                with watch("decode"):
                    finished = _FINISH[output_type](session)
                for _ in batch:
                    with watch("decode"):
                        images.append(next(finished))
                    if callback_on_image_end is not None:
                        callback_on_image_end(self, len(images) - 1, images[-1])
        return PipelineOutput(images=images, seeds=list(seeds[: len(images)]), timings=watch.timings(calls))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time: other threads wait, and a callback of the running call is told that it cannot."""
        with self._lock:
            if self._drawing:
                raise ConfigError("a callback cannot draw with the pipeline that calls it: open a second one")
            if self._closed:
                raise ConfigError("this pipeline is closed: open the bundle again")
            self.engines.activate()
            self._drawing = True
            try:
                yield
            finally:
                self._drawing = False

    def _unlock(self) -> None:
        """In a forked process, where a thread of the parent's that was drawing is no more."""
        self._lock = RLock()
        self._drawing = False

    def _load(
        self, size: tuple[int, int], count: int, schedule: Schedule, *, guided: bool, decode: bool
    ) -> None:
        batch_sizes = set(split_batch(count, (profile.batch_size for profile in self._profiles_of(size))))
        wanted: list[EngineKey] = [(encoder, None, False) for encoder in self._tokenizers]
        wanted += [(Component.UNET_TIME, None, False), (Component.UNET_CONTEXT, None, False)]
        programs = {step.program for step in plan([schedule], guided=guided)}
        wanted += [(component, ShapeProfile(*size, b), g) for b in batch_sizes for component, g in programs]
        if self.bundle.manifest.model.inpainting:
            wanted.append((Component.VAE_ENCODER, ShapeProfile(*size), False))
        if decode:
            wanted.append((Component.VAE_DECODER, ShapeProfile(*size), False))
        self.engines.load(wanted)

    def _schedule(
        self,
        scheduler: str | Scheduler | None,
        steps: int,
        timesteps: Sequence[int] | None,
        eta: float,
    ) -> Schedule:
        scheduler, timesteps = check_scheduler(scheduler), check_timesteps(timesteps)
        if not isinstance(scheduler, Scheduler):
            scheduler = Scheduler.from_config(self.bundle.manifest.model.scheduler, scheduler)
        return scheduler.schedule(
            len(timesteps) if timesteps is not None else steps, timesteps=timesteps, eta=eta
        )

    def _encode(
        self, prompts: Sequence[str], negatives: Sequence[str | None], skip: int, *, guided: bool
    ) -> list[tuple[Conditioning, Conditioning | None]]:
        """The conditional and the unconditional side of each prompt; equal texts are encoded once."""
        cache: dict[tuple[str, int], Conditioning] = {}

        def encode(text: str, skip: int = 0) -> Conditioning:
            if (text, skip) not in cache:
                cache[text, skip] = self._encode_one(text, skip)
            return cache[text, skip]

        def encode_negative(text: str | None, cond: Conditioning) -> Conditioning:
            if text is None and self.bundle.manifest.model.zero_negative:
                return cond.zeros()
            return encode(text or "")

        conds = [encode(prompt, skip) for prompt in prompts]
        if not guided:
            return [(cond, None) for cond in conds]
        return [(c, encode_negative(n, c)) for c, n in zip(conds, negatives, strict=True)]

    def _encode_one(self, text: str, skip: int) -> Conditioning:
        states: list[NDArray[np.float32]] = []
        pooled = None
        for encoder, tokenizer in self._tokenizers.items():
            engine = self.engines.get(encoder)
            tokens = tokenizer(text)
            if tokens.dropped and not states:
                logger.warning("%s", tokens.warning)
            engine.inputs["tokens"][0] = tokens.ids
            engine.enqueue()
            for output in engine.outputs.values():
                check_finite(output, encoder)
            states.append(engine.outputs["states"][skip].copy())
            if "pooled" in engine.outputs:
                pooled = engine.outputs["pooled"][0].copy()
        return Conditioning(states=np.concatenate(states, axis=-1), pooled=pooled)

    def _encode_picture(
        self, picture: NDArray[np.float32], hole: NDArray[np.float32], noise: Noise
    ) -> Inpainting:
        encoder = self.engines.get(Component.VAE_ENCODER, ShapeProfile(*hole.shape))
        np.copyto(encoder.inputs["image"][0], picture)
        encoder.enqueue()
        for output in encoder.outputs.values():
            check_finite(output, Component.VAE_ENCODER)
        factor = self.bundle.manifest.model.vae_scale_factor
        return Inpainting.drawn(
            hole[None, ::factor, ::factor], encoder.outputs["mean"][0], encoder.outputs["std"][0], noise
        )

    def _batches(
        self, rows: Iterator[Row], count: int, size: tuple[int, int]
    ) -> Iterator[tuple[Loop, Sequence[Row]]]:
        profiles = {profile.batch_size: profile for profile in self._profiles_of(size)}
        for batch_size in split_batch(count, profiles):
            if self._interrupt:
                return
            yield self._session(profiles[batch_size]), list(islice(rows, batch_size))

    def _session(self, profile: ShapeProfile) -> Loop:
        if profile not in self._sessions:
            self._sessions[profile] = self._open_session(profile)
        return self._sessions[profile]

    def _open_session(self, profile: ShapeProfile) -> Loop:
        spec = self.bundle.manifest.model
        if self.engines.place is None:
            return Session(self.engines, spec, profile)
        if self._kernels is None:
            device, images = self.engines.place.device, self.bundle.manifest.kernels
            self.bundle.verify(image.file for image in images if image.runs_on(device.capability))
            self._kernels = KernelLibrary(device, images, self.bundle.path)
            if not len(self._kernels):
                logger.info(
                    "this bundle has no kernels for a GPU, so the loop stays on the host and copies at each step; "
                    "build it with --backend %s",
                    self.engines.backend.name,
                )
        if not len(self._kernels):
            return Session(self.engines, spec, profile)
        return DeviceSession(self.engines, self._kernels, spec, profile)

    def _profiles_of(self, size: tuple[int, int]) -> list[ShapeProfile]:
        return [profile for profile in self._profiles if (profile.height, profile.width) == size]

    def _on_step(
        self, callback: Callback | None, shown: Sequence[str], shape: tuple[int, int, int]
    ) -> OnStep:
        def on_step(step: int, rows: Sequence[RowState]) -> bool:
            if callback is not None:
                seen = np.stack([row.latents for row in rows]) if shown else None
                given = {} if seen is None else {"latents": seen.copy()}
                result = callback(self, step, float(rows[0].schedule.timesteps[step]), given)
                for index, latents in enumerate(check_replaced(result, (len(rows), *shape))):
                    # A row that is steered rounds otherwise than one that is left alone.
                    if seen is None or not np.array_equal(latents, seen[index]):
                        rows[index].latents = latents
            return not self._interrupt

        return on_step


_FINISH: Mapping[OutputType, Callable[[Loop], Iterator[Any]]] = {
    "latent": lambda session: (latents.copy() for latents in session.latents()),
    "np": lambda session: (np.clip(image / 2 + 0.5, 0, 1) for image in session.images()),
    "pil": lambda session: (to_pil(pixels) for pixels in session.pixels()),
}
"""What becomes of a run, by `output_type`: picture by picture."""
