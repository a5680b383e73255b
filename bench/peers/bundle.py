"""rt itself: a bundle through the public API, with any keywords of `Pipeline.__call__` that a variant is made of."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rt.bench.bundle import find_profile
from rt.bench.peers.peer import (
    GUIDANCE_SCALE,
    PICTURE,
    STEP,
    TEXT,
    UNET,
    VAE,
    Inputs,
    Outcome,
    Setting,
    timed,
)
from rt.conditioning import Conditioning
from rt.model import Component
from rt.noise import Generator
from rt.pipeline import Pipeline
from rt.samplers import Schedule
from rt.samplers.table import HISTORY, SAMPLES
from rt.session import Row, RowState, Session
from rt.shapes import ShapeProfile


class Variant:
    """A pipeline of ours whose calls have keywords that its parts know nothing of."""

    def __init__(self, pipeline: Pipeline, keywords: Mapping[str, Any]) -> None:
        self._pipeline = pipeline
        self._keywords = keywords
        profile = find_profile(pipeline.bundle)
        self._profile = ShapeProfile(profile.height, profile.width)

    def picture(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        output, seconds = timed(
            PICTURE,
            lambda: self._pipeline(
                inputs.prompt,
                self._profile.height,
                self._profile.width,
                inputs.steps,
                guidance_scale=GUIDANCE_SCALE,
                latents=inputs.noise,
                scheduler="ddim",
                output_type="np",
                **self._keywords,
            ),
        )
        step_s = output.timings.denoise_s / output.timings.steps
        return Outcome(output=output.images[0], seconds={**seconds, STEP: step_s})


class Bundle(Variant):
    """A pipeline of ours as it is, and a session of its engines."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline, {})
        self._session = Session(pipeline.engines, pipeline.bundle.manifest.model, self._profile)

    def text(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        engine = self._pipeline.engines.get(Component.TEXT_ENCODER)
        engine.inputs["tokens"][...] = inputs.tokens
        engine.outputs["states"].fill(np.nan)
        _, seconds = timed(TEXT, engine.enqueue)
        return Outcome(output=engine.outputs["states"][:1].copy(), seconds=seconds)

    def unet(self, inputs: Inputs) -> Outcome:
        """See `Peer`: the second of two steps of the session, with sampler and guidance."""
        uncond, cond = (Conditioning(states=states) for states in inputs.context)
        row = Row(
            schedule=_probe(inputs.timestep),
            noise=Generator(0),
            cond=cond,
            uncond=uncond,
            guidance_scale=1.0,
            latents=inputs.latents[0],
        )
        ends: list[float] = []

        def on_step(step: int, rows: Sequence[RowState]) -> bool:
            ends.append(time.perf_counter())
            return True

        [output] = self._session.denoise([row], on_step)
        return Outcome(output=output.copy(), seconds={UNET: ends[1] - ends[0]})

    def vae(self, inputs: Inputs) -> Outcome:
        """See `Peer`."""
        engine = self._pipeline.engines.get(Component.VAE_DECODER, self._profile)
        engine.inputs["latents"][...] = inputs.latents
        engine.outputs["image"].fill(np.nan)
        _, seconds = timed(VAE, engine.enqueue)
        return Outcome(output=engine.outputs["image"][0].copy(), seconds=seconds)


def load(setting: Setting) -> Variant:
    """Options: `bundle`, a folder; all others are keywords of each call of the pipeline."""
    keywords = dict(setting.options)
    pipeline = Pipeline.from_bundle(keywords.pop("bundle"), threads=setting.threads)
    return Variant(pipeline, keywords) if keywords else Bundle(pipeline)


def _probe(timestep: int) -> Schedule:
    """Two rows: the first leaves the sample as it is, the second makes it what the network predicts."""
    newest = np.eye(1, SAMPLES), np.eye(1, HISTORY)
    return Schedule(
        timesteps=np.full(2, timestep, np.float32),
        c_in=np.ones(2, np.float32),
        p=np.zeros(2, np.float32),
        q=np.ones(2, np.float32),
        a=np.concatenate([newest[0], np.zeros((1, SAMPLES))]).astype(np.float32),
        b=np.concatenate([np.zeros((1, HISTORY)), newest[1]]).astype(np.float32),
        n=np.zeros(2, np.float32),
        init_noise_sigma=1.0,
    )
