"""Engines for tests of the loop, whose U-Net is some network that is not linear, and rows with nothing in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt.conditioning import Conditioning
from rt.model import Component, Family, ModelSpec
from rt.noise import Generator
from rt.samplers import Schedule, Scheduler, shorten
from rt.session import Row
from rt.shapes import ShapeProfile

Float32 = NDArray[np.float32]

BATCH, TOKENS, CONTEXT, POOLED = 5, 6, 8, 7
SPEC = ModelSpec(
    family=Family.SD1,
    latent_channels=4,
    vae_scale_factor=8,
    sample_size=8,
    scaling_factor=0.18215,
    text_encoders=(Component.TEXT_ENCODER,),
    max_tokens=TOKENS,
    context_size=CONTEXT,
    pooled_size=None,
    zero_negative=False,
    scheduler={
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "steps_offset": 1,
    },
)
PROFILE = ShapeProfile(48, 64, BATCH)
SHAPE = (4, 6, 8)


class FakeUNet:
    """Rows of any network: each depends on its own inputs alone, and not linearly.

    A full step also gives `deep`, half of its latents; a shallow one adds the `deep` that it reads to its prediction.
    """

    def __init__(self, *, guided: bool, pooled: bool = False, shallow: bool = False) -> None:
        rows = BATCH * (2 if guided else 1)
        # Both sides of a picture share a row of time, unless it is mixed with text.
        self.inputs: dict[str, Any] = {
            "latents": np.full((BATCH, *SHAPE), np.nan, np.float32),
            "time_0": np.full((rows if pooled else BATCH, 1, 1, 1), np.nan, np.float32),
            "context_0": np.full((rows, TOKENS, CONTEXT), np.nan, np.float32),
        }
        self.outputs: dict[str, Any] = {"prediction": np.full((rows, *SHAPE), np.nan, np.float32)}
        (self.inputs if shallow else self.outputs)["deep"] = np.full((rows, *SHAPE), np.nan, np.float32)
        self.poisoned: list[Callable[[], Sequence[int]]] = []
        self.calls = 0
        self.checks = True

    def enqueue(self) -> None:
        self.calls += 1
        for name, array in self.inputs.items():
            assert np.isfinite(array).all() or not self.checks, f"{name} was not written"
        prediction = self.outputs["prediction"]
        for row, context in enumerate(self.inputs["context_0"]):
            time = self.inputs["time_0"]
            x, t = self.inputs["latents"][row % BATCH], time[row % len(time), 0]
            with np.errstate(invalid="ignore"):
                prediction[row] = np.tanh(
                    x * context.mean() + np.roll(x, 1, -1) * context[0, 0] + t / 500 - 1
                )
            if "deep" in self.inputs:
                prediction[row] += self.inputs["deep"][row]
            else:
                self.outputs["deep"][row] = x / 2
        for rows in self.poisoned:
            for row in rows():
                prediction[row::BATCH] = np.nan


class FakeTime:
    """Gives each timestep back as its only feature, plus what it is told of the text and the picture's size."""

    def __init__(self, *, pooled: bool) -> None:
        self.inputs = {"timestep": np.full(3, np.nan, np.float32)}
        if pooled:
            self.inputs["pooled"] = np.full((3, POOLED), np.nan, np.float32)
            self.inputs["sizes"] = np.full((3, 6), np.nan, np.float32)
        self.outputs = {"time_0": np.full((3, 1, 1, 1), np.nan, np.float32)}

    def enqueue(self) -> None:
        features = self.inputs["timestep"].copy()
        if "pooled" in self.inputs:
            assert (self.inputs["sizes"] == [48, 64, 0, 0, 48, 64]).all()
            features += 1000 * self.inputs["pooled"][:, 0]
        self.outputs["time_0"][:, 0, 0, 0] = features


class FakeContext:
    """Gives the states back, doubled."""

    def __init__(self) -> None:
        self.inputs = {"context": np.full((1, TOKENS, CONTEXT), np.nan, np.float32)}
        self.outputs = {"context_0": np.full((1, TOKENS, CONTEXT), np.nan, np.float32)}
        self.calls = 0

    def enqueue(self) -> None:
        self.calls += 1
        np.multiply(self.inputs["context"], 2, out=self.outputs["context_0"])


class FakeDecoder:
    """Three of the channels, each pixel as often as the autoencoder makes it larger, beyond [-1, 1] in places."""

    def __init__(self) -> None:
        self.inputs = {"latents": np.full((1, *SHAPE), np.nan, np.float32)}
        self.outputs = {"image": np.full((1, PROFILE.height, PROFILE.width, 3), np.nan, np.float32)}
        self.poisoned = False
        self.calls = 0

    def enqueue(self) -> None:
        self.calls += 1
        large = self.inputs["latents"][0, :3].repeat(8, axis=1).repeat(8, axis=2)
        self.outputs["image"][0] = np.moveaxis(large, 0, -1) / 2
        if self.poisoned:
            self.outputs["image"][0, 5, 5, 1] = np.inf


class FakeEngines:
    def __init__(self, *, pooled: bool = False) -> None:
        self.loaded = {guided: FakeUNet(guided=guided, pooled=pooled) for guided in (False, True)}
        self.shallow = {g: FakeUNet(guided=g, pooled=pooled, shallow=True) for g in (False, True)}
        self.time, self.context, self.decoder = FakeTime(pooled=pooled), FakeContext(), FakeDecoder()

    def get(self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False) -> Any:
        once = {Component.UNET_TIME: self.time, Component.UNET_CONTEXT: self.context}
        if component in once:
            assert profile is None and not guided
            return once[component]
        if component is Component.VAE_DECODER:
            assert profile == ShapeProfile(PROFILE.height, PROFILE.width) and not guided
            return self.decoder
        assert profile == PROFILE
        return {Component.UNET: self.loaded, Component.UNET_SHALLOW: self.shallow}[component][guided]


def schedule_of(name: str, steps: int) -> Schedule:
    return Scheduler.from_config(SPEC.scheduler, name).schedule(steps)


def states(rng: np.random.Generator) -> Conditioning:
    return Conditioning(states=rng.standard_normal((TOKENS, CONTEXT), dtype=np.float32))


Make = Callable[[], Row]


def recipes(rng: np.random.Generator, *, guided: bool) -> list[Make]:
    """A full batch of rows that have nothing in common; each call of one starts its noise anew."""
    makes = []
    names = rng.choice(
        ["ddim", "pndm", "euler-a", "heun", "dpmpp-2m-sde", "unipc", "lms", "lcm"], BATCH, replace=False
    )
    for name, steps in zip(names, rng.permutation([1, 3, 8, 13, 21]), strict=True):
        row = Row(
            schedule=schedule_of(str(name), int(steps)),
            noise=Generator(0),
            cond=states(rng),
            uncond=states(rng) if guided else None,
            guidance_scale=float(rng.uniform(1.5, 9)),
            guidance_rescale=float(rng.choice([0.0, 0.7])),
            latents=rng.standard_normal(SHAPE, dtype=np.float32) if rng.random() < 0.3 else None,
        )
        seed = int(rng.integers(2**32))
        makes.append(lambda row=row, seed=seed: replace(row, noise=Generator(seed)))
    return makes


def counts(engines: FakeEngines) -> dict[str, int]:
    return {
        "guided": engines.loaded[True].calls,
        "unguided": engines.loaded[False].calls,
        "shallow guided": engines.shallow[True].calls,
        "shallow unguided": engines.shallow[False].calls,
    }


def shortened(make: Make, steps: int, **shortcuts: Any) -> Row:
    return replace(make(), schedule=shorten(schedule_of("euler", steps), **shortcuts))
