"""The loop over rows: what a row gives does not depend on its neighbours, on padding or on earlier runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rt.bundle import Bundle
from rt.conditioning import Conditioning
from rt.engines import Engines
from rt.errors import ConfigError, NumericsError
from rt.model import Component
from rt.noise import Generator
from rt.samplers import Scheduler
from rt.session import Row, Session
from rt.trajectory import Trajectory

from .session_fakes import (
    BATCH,
    POOLED,
    PROFILE,
    SHAPE,
    SPEC,
    FakeEngines,
    Make,
    counts,
    recipes,
    schedule_of,
    shortened,
    states,
)

Float32 = NDArray[np.float32]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines()


@pytest.fixture
def session(engines: FakeEngines) -> Session:
    return Session(engines, SPEC, PROFILE)  # type: ignore[arg-type]


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
            trajectories[0].latents = kept[0]
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
