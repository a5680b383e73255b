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
from rt.conditioning import Conditioning
from rt.engines import Engines
from rt.errors import ConfigError, NumericsError
from rt.model import Component, Family, ModelSpec
from rt.noise import Generator
from rt.samplers import Schedule, Scheduler, shorten
from rt.session import Row, Session
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

    def enqueue(self) -> None:
        self.calls += 1
        for name, array in self.inputs.items():
            assert np.isfinite(array).all(), f"{name} was not written"
        prediction = self.outputs["prediction"]
        for row, context in enumerate(self.inputs["context_0"]):
            time = self.inputs["time_0"]
            x, t = self.inputs["latents"][row % BATCH], time[row % len(time), 0]
            prediction[row] = np.tanh(x * context.mean() + np.roll(x, 1, -1) * context[0, 0] + t / 500 - 1)
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


class FakeEngines:
    def __init__(self, *, pooled: bool = False) -> None:
        self.loaded = {guided: FakeUNet(guided=guided, pooled=pooled) for guided in (False, True)}
        self.shallow = {g: FakeUNet(guided=g, pooled=pooled, shallow=True) for g in (False, True)}
        self.time, self.context = FakeTime(pooled=pooled), FakeContext()

    def get(self, component: Component, profile: ShapeProfile | None = None, *, guided: bool = False) -> Any:
        once = {Component.UNET_TIME: self.time, Component.UNET_CONTEXT: self.context}
        if component in once:
            assert profile is None and not guided
            return once[component]
        assert profile == PROFILE
        return {Component.UNET: self.loaded, Component.UNET_SHALLOW: self.shallow}[component][guided]


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
    unet.inputs["context_0"].fill(np.nan)
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
        np.testing.assert_array_equal(inputs["context_0"][:BATCH], [2 * row.uncond.states for row in padded])
        np.testing.assert_array_equal(inputs["context_0"][BATCH:], [2 * row.cond.states for row in padded])
    assert engines.context.calls == 2 * len(rows), "once a text"
    for i, make in enumerate(makes):
        row = make()
        start = row.noise.randn(SHAPE) if row.latents is None else row.latents
        first = start * np.float32(row.schedule.init_noise_sigma) * row.schedule.c_in[0]
        np.testing.assert_allclose(seen[0]["latents"][i], first, rtol=1e-6)
        told = [inputs["time_0"][i, 0, 0, 0] for inputs in seen[: len(row.schedule)]]
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
    told = engines.loaded[guided].inputs["time_0"].reshape(-1, BATCH)[:, :2]
    last = rows[0].schedule.timesteps[-1]
    expected = [pooled[[1, 3], 0], pooled[[0, 2], 0]] if guided else [pooled[[0, 2], 0]]
    np.testing.assert_allclose(told, last + 1000 * np.array(expected), rtol=1e-6)


def counts(engines: FakeEngines) -> dict[str, int]:
    return {
        "guided": engines.loaded[True].calls,
        "unguided": engines.loaded[False].calls,
        "shallow guided": engines.shallow[True].calls,
        "shallow unguided": engines.shallow[False].calls,
    }


def shortened(make: Make, steps: int, **shortcuts: Any) -> Row:
    return replace(make(), schedule=shorten(schedule_of("euler", steps), **shortcuts))


def test_steps_outside_the_guidance_interval_run_without_it(engines, session, rng):
    make = recipes(rng, guided=True)[0]
    session.denoise([shortened(make, 10, guidance_interval=(0.2, 0.7))])
    assert counts(engines) == {"guided": 5, "unguided": 5, "shallow guided": 0, "shallow unguided": 0}
    assert engines.context.calls == 2, "both programs share what was made of a text"


def test_without_guidance_an_interval_changes_nothing(engines, session, rng):
    make = recipes(rng, guided=False)[0]
    plain = denoise(session, [lambda: shortened(make, 10)])
    part = denoise(session, [lambda: shortened(make, 10, guidance_interval=(0.2, 0.7))])
    np.testing.assert_array_equal(plain, part)
    assert engines.loaded[True].calls == 0


def test_a_step_outside_the_interval_follows_the_prompt_alone(session, rng):
    """Guided at the first of two steps only: the second is that of a run without guidance from there."""
    make = recipes(rng, guided=True)[0]
    kept = []
    session.denoise(
        [shortened(make, 2, guidance_interval=(0, 0.5))], lambda step, ts: kept.append(ts[0].latents.copy())
    )
    got = session.denoise([shortened(make, 2, guidance_interval=(0, 0.5))])[0].copy()

    def steer(step: int, trajectories: Sequence[Trajectory]) -> bool:
        if step == 0:
            trajectories[0].latents[...] = kept[0]
        return True

    expected = session.denoise([replace(shortened(make, 2), uncond=None)], steer)[0]
    np.testing.assert_array_equal(got, expected)


def test_shallow_steps_read_what_the_last_full_step_kept(engines, session, rng):
    makes = recipes(rng, guided=True)[:2]
    seen: list[tuple[str, Float32]] = []
    for name, unet in (("full", engines.loaded[True]), ("shallow", engines.shallow[True])):

        def watched(run=unet.enqueue, name=name, unet=unet) -> None:
            run()
            seen.append((name, (unet.outputs | unet.inputs)["deep"].copy()))

        unet.enqueue = watched
    rows = [shortened(make, 8, step_cache=3) for make in makes]
    session.denoise(rows)
    assert [name for name, _ in seen] == ["full", "shallow", "shallow"] * 2 + ["full", "shallow"]
    for (name, deep), (_, before) in zip(seen[1:], seen[:-1], strict=True):
        assert np.array_equal(deep, before) is (name == "shallow")
    seen.clear()
    session.denoise([shortened(makes[0], 1, step_cache=3)])
    assert [name for name, _ in seen] == ["full"], "nothing is left of the run before"


def test_the_first_step_of_a_program_is_full(engines, session, rng):
    session.denoise([shortened(recipes(rng, guided=True)[0], 10, guidance_interval=(0.3, 0.7), step_cache=3)])
    assert counts(engines) == {"guided": 2, "unguided": 2, "shallow guided": 2, "shallow unguided": 4}


def test_rows_that_disagree_get_a_full_step(engines, session, rng):
    """One row caches and one does not: every step is full, and both are drawn as they are without a cache."""
    makes = recipes(rng, guided=True)[:2]
    got = denoise(session, [lambda: shortened(makes[0], 6, step_cache=3), lambda: shortened(makes[1], 6)])
    assert counts(engines) == {"guided": 6, "unguided": 0, "shallow guided": 0, "shallow unguided": 0}
    np.testing.assert_array_equal(got, denoise(session, [lambda m=m: shortened(m, 6) for m in makes]))


def test_rows_that_disagree_on_guidance_share_the_guided_program(engines, session, rng):
    """A row outside its interval does not look at the unconditional output that is there."""
    makes = recipes(rng, guided=True)[:2]
    both = [
        lambda: shortened(makes[0], 6, guidance_interval=(0, 0.5)),
        lambda: shortened(makes[1], 6, guidance_interval=(0.5, 1)),
    ]
    together = denoise(session, both)
    assert counts(engines) == {"guided": 6, "unguided": 0, "shallow guided": 0, "shallow unguided": 0}
    for got, make in zip(together, both, strict=True):
        np.testing.assert_array_equal(got, denoise(session, [make])[0])


def test_what_the_text_gives_must_be_finite(engines, session, rng):
    row = recipes(rng, guided=True)[0]()
    row.cond.states[0, 0] = np.inf
    with pytest.raises(NumericsError, match=r"^unet_context gave NaN or Inf; build with"):
        session.denoise([row])


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
