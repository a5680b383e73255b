"""The loop over rows: what a row gives does not depend on its neighbours, on padding or on earlier runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rt.bundle import Bundle
from rt.engines import Engines
from rt.errors import ConfigError, NumericsError
from rt.model import Component, Family, ModelSpec
from rt.noise import Generator
from rt.samplers import Schedule, Scheduler
from rt.session import Conditioning, Row, Session
from rt.shapes import ShapeProfile
from rt.trajectory import Trajectory

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

    `poison` is what it gives in the rows from `drawn` on, which nobody should look at.
    """

    def __init__(self, *, guided: bool, pooled: bool = False) -> None:
        rows = BATCH * (2 if guided else 1)
        self.inputs: dict[str, Any] = {
            "latents": np.full((BATCH, *SHAPE), np.nan, np.float32),
            "time": np.full((rows, 1), np.nan, np.float32),
            "context": np.full((rows, TOKENS, CONTEXT), np.nan, np.float32),
        }
        if pooled:
            self.inputs["pooled"] = np.full((rows, POOLED), np.nan, np.float32)
            self.inputs["sizes"] = np.full((rows, 6), np.nan, np.float32)
        self.outputs: dict[str, Any] = {"prediction": np.full((rows, *SHAPE), np.nan, np.float32)}
        self.poisoned: list[Callable[[], Sequence[int]]] = []
        self.calls = 0

    def enqueue(self) -> None:
        self.calls += 1
        for name, array in self.inputs.items():
            assert np.isfinite(array).all(), f"{name} was not written"
        prediction = self.outputs["prediction"]
        for row, context in enumerate(self.inputs["context"]):
            x, t = self.inputs["latents"][row % BATCH], self.inputs["time"][row, 0]
            prediction[row] = np.tanh(x * context.mean() + np.roll(x, 1, -1) * context[0, 0] + t / 500 - 1)
        for rows in self.poisoned:
            for row in rows():
                prediction[row::BATCH] = np.nan


class FakeTime:
    """Gives each timestep back as its only feature."""

    def __init__(self) -> None:
        self.inputs = {"timestep": np.full(3, np.nan, np.float32)}
        self.outputs = {"time": np.full((3, 1), np.nan, np.float32)}

    def enqueue(self) -> None:
        self.outputs["time"][:, 0] = self.inputs["timestep"]


class FakeEngines:
    def __init__(self, *, pooled: bool = False) -> None:
        self.loaded = {guided: FakeUNet(guided=guided, pooled=pooled) for guided in (False, True)}

    def get(
        self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False
    ) -> FakeUNet | FakeTime:
        if component is Component.UNET_TIME:
            return FakeTime()
        assert (component, profile) == (Component.UNET, PROFILE)
        return self.loaded[guided]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines()


@pytest.fixture
def session(engines: FakeEngines) -> Session:
    return Session(engines, SPEC, PROFILE)  # type: ignore[arg-type]


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


def denoise(session: Session, makes: Sequence[Make]) -> list[Float32]:
    return [latents.copy() for latents in session.denoise([make() for make in makes])]


@pytest.mark.parametrize("guided", [False, True])
def test_a_row_does_not_know_its_neighbours(session, rng, guided):
    makes = recipes(rng, guided=guided)
    together = denoise(session, makes)
    for count in range(1, BATCH + 1):
        order = rng.permutation(BATCH)[:count]
        some = denoise(session, [makes[i] for i in order])
        for got, i in zip(some, order, strict=True):
            np.testing.assert_array_equal(got, together[i])


@pytest.mark.parametrize("guided", [False, True])
def test_rows_without_a_picture_and_finished_rows_do_not_matter(engines, session, rng, guided):
    makes = recipes(rng, guided=guided)[:3]
    clean = denoise(session, makes)
    unet = engines.loaded[guided]
    unet.poisoned.append(lambda: range(3, BATCH))
    rows = [make() for make in makes]
    calls = unet.calls
    unet.poisoned.append(lambda: [i for i, row in enumerate(rows) if unet.calls - calls > len(row.schedule)])
    for got, expected in zip(session.denoise(rows), clean, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_the_unet_is_called_as_often_as_the_longest_row_needs(engines, session, rng):
    makes = recipes(rng, guided=True)
    rows = [make() for make in makes]
    session.denoise(rows)
    assert engines.loaded[True].calls == max(len(row.schedule) for row in rows)
    assert engines.loaded[False].calls == 0


def test_a_failed_run_leaves_nothing_behind(engines, session, rng):
    makes = recipes(rng, guided=True)
    expected = denoise(session, makes)
    unet = engines.loaded[True]
    unet.poisoned.append(lambda: [BATCH - 1])
    with pytest.raises(NumericsError, match="unet gave NaN or Inf at step 1 of"):
        session.denoise([make() for make in makes])
    unet.poisoned.clear()
    unet.outputs["prediction"].fill(np.nan)
    unet.inputs["context"].fill(np.nan)
    for got, want in zip(denoise(session, makes), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_the_network_is_told(engines, session, rng):
    """Scaled latents and timestep of each row; unconditional rows first, then the prompts; the last is repeated."""
    makes = recipes(rng, guided=True)[:3]
    rows, unet, seen = [make() for make in makes], engines.loaded[True], []
    run = unet.enqueue
    unet.enqueue = lambda: (seen.append({k: v.copy() for k, v in unet.inputs.items()}), run())
    session.denoise(rows)
    padded = [*rows, rows[-1], rows[-1]]
    for inputs in seen:
        np.testing.assert_array_equal(inputs["context"][:BATCH], [row.uncond.states for row in padded])
        np.testing.assert_array_equal(inputs["context"][BATCH:], [row.cond.states for row in padded])
    for i, make in enumerate(makes):
        row = make()
        start = row.noise.randn(SHAPE) if row.latents is None else row.latents
        first = start * np.float32(row.schedule.init_noise_sigma) * row.schedule.c_in[0]
        np.testing.assert_allclose(seen[0]["latents"][i], first, rtol=1e-6)
        for place in (i, BATCH + i):
            told = [inputs["time"][place, 0] for inputs in seen[: len(row.schedule)]]
            np.testing.assert_array_equal(told, row.schedule.timesteps)


def test_rows_with_guidance_and_without_do_not_mix(engines, session, rng):
    guided, plain = recipes(rng, guided=True)[0](), recipes(rng, guided=False)[0]()
    for rows in ([guided, plain], [plain, guided]):
        with pytest.raises(ConfigError, match="cannot share a run"):
            session.denoise(rows)
    assert engines.loaded[True].calls == engines.loaded[False].calls == 0


def test_guidance_of_one_is_the_prompt_alone(session, rng):
    """Which of the two outputs is the prompt's, seen from the side of the result."""
    for make in recipes(rng, guided=True):
        row = replace(make(), guidance_scale=1.0, guidance_rescale=0.0)
        alone = session.denoise([replace(make(), uncond=None)])[0].copy()
        both = session.denoise([row])[0]
        np.testing.assert_allclose(both, alone, atol=1e-3 * np.abs(alone).max())


@pytest.mark.parametrize("guided", [False, True])
def test_sdxl_is_told_the_pooled_text_and_the_size(rng, guided):
    engines = FakeEngines(pooled=True)
    pooled = rng.standard_normal((4, POOLED), dtype=np.float32)
    cond, uncond, cond2, uncond2 = (replace(states(rng), pooled=p) for p in pooled)
    rows = [
        Row(
            schedule=schedule_of("euler", 2),
            noise=Generator(0),
            cond=c,
            uncond=u if guided else None,
            guidance_scale=5.0,
        )
        for c, u in ((cond, uncond), (cond2, uncond2))
    ]
    Session(engines, SPEC, PROFILE).denoise(rows)  # type: ignore[arg-type]
    inputs = engines.loaded[guided].inputs
    assert (inputs["sizes"] == [48, 64, 0, 0, 48, 64]).all()
    expected = [pooled[0], *[pooled[2]] * 4]
    np.testing.assert_array_equal(
        inputs["pooled"], [pooled[1], *[pooled[3]] * 4, *expected] if guided else expected
    )


def test_on_step_stops_the_run(engines, session, rng):
    makes = recipes(rng, guided=True)
    rows = [make() for make in makes]
    stop = int(rng.integers(20))
    seen, kept = [], {}

    def on_step(step: int, trajectories: Sequence[Trajectory]) -> bool:
        seen.append(step)
        assert [t.position for t in trajectories] == [min(step + 1, len(row.schedule)) for row in rows]
        kept.update({i: t.latents.copy() for i, t in enumerate(trajectories)})
        return step < stop

    got = session.denoise(rows, on_step)
    assert seen == list(range(stop + 1))
    assert engines.loaded[True].calls == stop + 1
    for i, latents in enumerate(got):
        np.testing.assert_array_equal(latents, kept[i])


def test_buffers_are_never_replaced(engines, session, rng):
    def arrays() -> dict[str, tuple[int, int]]:
        return {
            f"{guided} {name}": (id(array), array.ctypes.data)
            for guided, unet in engines.loaded.items()
            for name, array in (unet.inputs | unet.outputs).items()
        }

    before = arrays()
    where = [latents.ctypes.data for latents in session.denoise([m() for m in recipes(rng, guided=True)])]
    for guided in (False, True, True):
        session.denoise([make() for make in recipes(rng, guided=guided)[: rng.integers(1, BATCH + 1)]])
    assert arrays() == before
    assert len(set(where)) == BATCH


def test_rows_of_a_real_bundle(demo_bundle: Path, rng):
    """Two rows that differ in everything, together and each alone, on a real engine with a batch of two."""
    bundle = Bundle.open(demo_bundle)
    spec = bundle.manifest.model
    profile = next(e.profile for e in bundle.manifest.engines if e.profile and e.profile.batch_size == 2)
    engines = Engines(bundle)
    session = Session(engines, spec, profile)
    unet = engines.get(Component.UNET, profile, guided=True)
    pointers = {name: (id(a), a.ctypes.data) for name, a in ({**unet.inputs, **unet.outputs}).items()}

    def conditioning() -> Conditioning:
        return Conditioning(
            states=rng.standard_normal((spec.max_tokens, spec.context_size), dtype=np.float32)
        )

    schedules = [
        Scheduler.from_config(spec.scheduler, name).schedule(n) for name, n in (("euler-a", 4), ("pndm", 9))
    ]
    texts = [(conditioning(), conditioning()) for _ in schedules]
    seeds = [int(seed) for seed in rng.integers(2**32, size=2)]

    def row(i: int) -> Row:
        (cond, uncond), scale = texts[i], (2.5, 8.0)[i]
        noise = Generator(seeds[i])
        return Row(schedule=schedules[i], noise=noise, cond=cond, uncond=uncond, guidance_scale=scale)

    together = [latents.copy() for latents in session.denoise([row(0), row(1)])]
    swapped = [latents.copy() for latents in session.denoise([row(1), row(0)])]
    for i in range(2):
        alone = session.denoise([row(i)])[0]
        largest = np.abs(alone).max()
        assert np.abs(alone - together[i]).max() <= 1e-6 * largest
        assert np.abs(alone - swapped[1 - i]).max() <= 1e-6 * largest
    assert pointers == {name: (id(a), a.ctypes.data) for name, a in ({**unet.inputs, **unet.outputs}).items()}
