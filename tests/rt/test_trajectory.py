"""A trajectory against the formula of the table, evaluated plainly in float64 on random network outputs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rt.errors import NumericsError
from rt.noise import Generator
from rt.samplers import SAMPLERS, Schedule, Scheduler
from rt.trajectory import Trajectory

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
NAMES = [*SAMPLERS, "dpmpp-2m-karras", "euler-exponential"]
STEPS = (1, 2, 3, 4, 7, 20, 50)
# Of the sample's largest value. Measured: at most 3e-6, at 50 steps of a multistep sampler.
TOLERANCE = 2e-5

Array = NDArray[Any]


def schedule_of(name: str, steps: int, **options: Any) -> Schedule:
    return Scheduler.from_config({**CONFIG, **options}, name).schedule(steps)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


class Evaluation:
    """The table in float64, with every sample and every history entry kept."""

    def __init__(self, schedule: Schedule, start: Array) -> None:
        self.schedule = schedule
        self.x = [start.astype(np.float64) * schedule.init_noise_sigma]
        self.h: list[Array] = []

    def step(self, m: Array, z: Array | None) -> Array:
        s, i = self.schedule, len(self.h)
        self.h.append(s.p[i].astype(np.float64) * self.x[i] + s.q[i].astype(np.float64) * m)
        x = np.zeros_like(self.x[0]) if z is None else s.n[i].astype(np.float64) * z
        for k in range(min(i + 1, s.a.shape[1])):
            x = x + s.a[i, k].astype(np.float64) * self.x[i - k]
        for k in range(min(i + 1, s.b.shape[1])):
            x = x + s.b[i, k].astype(np.float64) * self.h[i - k]
        self.x.append(x)
        return x


class Counting(Generator):
    """Counts what it gives."""

    draws = 0

    def randn(self, *args: Any, **kwargs: Any) -> Any:
        self.draws += 1
        return super().randn(*args, **kwargs)


def guided(cond: Array, uncond: Array | None, scale: float, rescale: float) -> Array:
    cond = cond.astype(np.float64)
    if uncond is None:
        return cond
    m = uncond + scale * (cond - uncond)
    return rescale * m * (cond.std(ddof=1) / m.std(ddof=1)) + (1 - rescale) * m


def outputs(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> Iterator[NDArray[np.float32]]:
    return (rng.standard_normal(shape, dtype=np.float32) for _ in range(count))


def run(
    trajectory: Trajectory, schedule: Schedule, seed: int, given: list[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    trajectory.start(schedule, noise=Generator(seed), guidance_scale=1.0)
    samples = []
    for m in given:
        trajectory.guide_and_step(m, None)
        samples.append(trajectory.latents.copy())
    return samples


@pytest.mark.parametrize("guidance", ["none", "guided", "rescaled"])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_the_tables(name, guidance, rng):
    """Rings, guidance and noise, for every sampler, and again on buffers that another run has used."""
    shape = (int(rng.integers(1, 5)), int(rng.integers(4, 9)), int(rng.integers(4, 9)))
    scale, rescale = float(rng.uniform(1.5, 9)), float(rng.uniform(0.2, 1)) if guidance == "rescaled" else 0.0
    trajectory = Trajectory(shape)
    for steps in rng.permutation(STEPS):
        schedule = schedule_of(name, int(steps), prediction_type=str(rng.choice(["epsilon", "v_prediction"])))
        seed = int(rng.integers(2**63))
        noise, twin = Counting(seed), Generator(seed)
        trajectory.start(schedule, noise=noise, guidance_scale=scale, guidance_rescale=rescale)
        expected = Evaluation(schedule, twin.randn(shape))
        np.testing.assert_allclose(trajectory.latents, expected.x[0], rtol=1e-6)
        for i, cond in enumerate(outputs(rng, shape, len(schedule))):
            assert not trajectory.done
            assert trajectory.position == i
            assert trajectory.timestep == schedule.timesteps[i]
            uncond = None if guidance == "none" else rng.standard_normal(shape, dtype=np.float32)
            z = twin.randn(shape) if schedule.noisy[i] else None
            x = expected.step(guided(cond, uncond, scale, rescale), z)
            trajectory.guide_and_step(cond, uncond)
            gap = np.abs(trajectory.latents - x).max() / np.abs(x).max()
            assert gap < TOLERANCE, f"row {i} of {len(schedule)} differs by {gap:.1e}"
        assert trajectory.done
        assert noise.draws == 1 + int(schedule.noisy.sum())
        assert noise.randn((1,)) == twin.randn((1,))


@pytest.mark.parametrize("name", ["ddim", "euler-a", "dpm2-a", "lcm"])
def test_given_latents_take_the_place_of_the_first_draw(name, rng):
    schedule, shape = schedule_of(name, 6), (4, 6, 5)
    latents, noise = rng.standard_normal(shape, dtype=np.float32), Counting(int(rng.integers(2**32)))
    before = latents.copy()
    trajectory = Trajectory(shape)
    trajectory.start(schedule, noise=noise, guidance_scale=1.0, latents=latents)
    assert noise.draws == 0
    np.testing.assert_allclose(trajectory.latents, before * schedule.init_noise_sigma, rtol=1e-6)
    for m in outputs(rng, shape, len(schedule)):
        trajectory.guide_and_step(m, None)
    assert noise.draws == schedule.noisy.sum()
    np.testing.assert_array_equal(latents, before)


def test_feed_scales(rng):
    schedule, shape = schedule_of("euler", 5), (4, 6, 5)
    trajectory = Trajectory(shape)
    trajectory.start(schedule, noise=Generator(1), guidance_scale=1.0)
    latents = np.full((3, *shape), np.nan, np.float32)
    for m in outputs(rng, shape, 3):
        latents[:] = np.nan
        trajectory.feed(latents[1])
        i = trajectory.position
        np.testing.assert_allclose(latents[1], trajectory.latents * schedule.c_in[i], rtol=1e-6)
        assert trajectory.timestep == schedule.timesteps[i]
        assert np.isnan(latents[[0, 2]]).all()
        trajectory.guide_and_step(m, None)


def test_assigning_to_latents_steers(rng):
    schedule, shape = schedule_of("dpmpp-2m", 8), (2, 4, 4)
    trajectory = Trajectory(shape)
    trajectory.start(schedule, noise=Generator(3), guidance_scale=1.0)
    expected = Evaluation(schedule, Generator(3).randn(shape))
    for i, m in enumerate(outputs(rng, shape, len(schedule))):
        trajectory.guide_and_step(m, None)
        expected.step(m, None)
        if i == 3:
            trajectory.latents = expected.x[-1] = rng.standard_normal(shape, dtype=np.float32)
    np.testing.assert_allclose(trajectory.latents, expected.x[-1], atol=1e-4)


@pytest.mark.parametrize("name", ["pndm", "unipc", "dpmpp-2m-sde", "lms"])
def test_a_failed_run_leaves_nothing_behind(name, rng):
    shape = (4, 6, 6)
    used, schedule = Trajectory(shape), schedule_of(name, 9)
    used.start(schedule_of("euler-a", 12), noise=Generator(0), guidance_scale=5.0)
    for bad in (1.0, 1e8, -1e8, 1e8, 1e15, np.nan):
        m = np.full(shape, bad, np.float32)
        if np.isfinite(bad):
            used.guide_and_step(m, np.zeros_like(m))
        else:
            with pytest.raises(NumericsError):
                used.guide_and_step(m, np.zeros_like(m))
    given = list(outputs(rng, shape, len(schedule)))
    seed = int(rng.integers(2**32))
    np.testing.assert_array_equal(
        run(used, schedule, seed, given), run(Trajectory(shape), schedule, seed, given)
    )


@pytest.mark.parametrize("where", ["cond", "uncond", "both"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", ["ddim", "pndm", "heun", "unipc"])
def test_what_is_not_finite_is_an_error_at_its_step(name, value, where, rng):
    """Also without a warning of numpy's on the way, which filterwarnings would raise instead."""
    schedule, shape = schedule_of(name, 10), (4, 5, 5)
    trajectory = Trajectory(shape)
    trajectory.start(schedule, noise=Generator(0), guidance_scale=7.5, guidance_rescale=0.5)
    bad = int(rng.integers(len(schedule)))
    for i in range(bad + 1):
        cond, uncond = outputs(rng, shape, 2)
        if i < bad:
            trajectory.guide_and_step(cond, uncond)
    for name, output in (("cond", cond), ("uncond", uncond)):
        if where in (name, "both"):
            output[tuple(rng.integers(n) for n in shape)] = value
    if where == "both":
        cond[0, 0, 0] = uncond[0, 0, 0] = value  # ∞ − ∞
    message = rf"^unet gave NaN or Inf at step {bad + 1} of {len(schedule)} \(timestep [\d.]+\); build .*fp32"
    if value == 3e38 and where == "both":
        cond[...], uncond[...] = value, -value
    with pytest.raises(NumericsError, match=message):
        trajectory.guide_and_step(cond, uncond)


@pytest.mark.parametrize(("name", "buffers"), [("dpmpp-2m", 0), ("euler-a", 12)])
def test_the_loop_does_not_allocate(name, buffers):
    """Nothing grows over 200 steps; a step without noise makes no array of the latents' size even for a moment."""
    schedule, shape = schedule_of(name, 250), (4, 64, 64)
    m, latents = np.full(shape, 0.1, np.float32), np.empty(shape, np.float32)
    trajectory = Trajectory(shape)
    trajectory.start(schedule, noise=Generator(0), guidance_scale=7.5)

    def steps(count: int) -> None:
        for _ in range(count):
            trajectory.feed(latents)
            trajectory.guide_and_step(m, m)

    tracemalloc.start()
    try:
        steps(40)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        steps(200)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 2048
    assert peak - before < max(buffers, 0.5) * m.nbytes
