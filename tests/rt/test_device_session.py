"""The loop on a device gives what the loop on the host gives, and touches the host only before and after."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")  # the kernels' references are in the kernels' files

from rt.backends.views import HostSide
from rt.cuda.driver import CudaDevice
from rt.device_session import AHEAD, FEWEST_STEPS, DeviceSession, GraphMode
from rt.engines import Place
from rt.errors import ConfigError, NumericsError
from rt.inpainting import Inpainting
from rt.model import Component
from rt.noise import Generator
from rt.session import Session
from rt.trajectory import Trajectory

from .device_fakes import SPECS, DeviceEngines, OwnGraphSide, host_device, library
from .session_fakes import (
    BATCH,
    POOLED,
    PROFILE,
    SHAPE,
    SPEC,
    FakeEngines,
    counts,
    recipes,
    schedule_of,
    shortened,
)

# Of the largest value: sums in another order, fed back through a network and guidance of up to 9. Of 736 comparisons
# with random rows 99 % were below 3e-6, and the largest was 1.6e-4.
TOLERANCE = 2e-3
WAITS = {"synchronise", "wait", "download", "allocate", "free", "pinned"}


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture
def engines():
    return FakeEngines()


@pytest.fixture
def device():
    return host_device()


@pytest.fixture
def make_session(device, tmp_path):
    """`make_session(engines, mode)`: closed at the end."""
    made = []

    def make(engines: FakeEngines, mode: GraphMode = GraphMode.STEP) -> DeviceSession:
        on_device: Any = DeviceEngines(engines.get, device)
        made.append(DeviceSession(on_device, library(device, tmp_path), SPEC, PROFILE, mode=mode))
        return made[-1]

    yield make
    for session in made:
        session.close()


@pytest.fixture
def session(make_session, engines):
    return make_session(engines)


def host(rows, *, pooled=False, on_step=None, extra=None):
    """What `rt.session.Session` makes of the rows."""
    engines = FakeEngines(pooled=pooled)
    if extra is not None:
        extra(engines)
    return [x.copy() for x in Session(engines, SPEC, PROFILE).denoise(rows, on_step)]  # type: ignore[arg-type]


def assert_same(got, expected, tolerance=TOLERANCE):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def names(device) -> list[str]:
    return [call.name for call in device.calls if not call.captured]


def between_launches(device) -> list[str]:
    """What was called from the first graph of steps to the last."""
    called = names(device)
    first, last = called.index("graph"), len(called) - called[::-1].index("graph")
    return called[first:last]


@pytest.mark.parametrize("mode", GraphMode)
@pytest.mark.parametrize("guided", [False, True])
def test_it_draws_what_the_session_on_the_host_draws(make_session, rng, guided, mode):
    """Rows with other samplers, lengths, guidance and rescale, together and some alone, on used buffers."""
    session = make_session(FakeEngines(), mode)
    makes = recipes(rng, guided=guided)
    for count in (BATCH, 2, 1, BATCH):
        some = [makes[i] for i in rng.permutation(BATCH)[:count]]
        assert_same(session.denoise([make() for make in some]), host([make() for make in some]))
        assert session.calls == max(len(make().schedule) for make in some)


@pytest.mark.parametrize("mode", GraphMode)
@pytest.mark.parametrize(
    ("interval", "cache"), [((0.2, 0.7), 1), ((0.0, 1.0), 3), ((0.3, 0.7), 2), ((0.5, 1.0), 4)]
)
def test_shortcuts(make_session, rng, interval, cache, mode):
    engines = FakeEngines()
    session = make_session(engines, mode)
    makes = recipes(rng, guided=True)[:2]
    rows = lambda: [shortened(make, 10, guidance_interval=interval, step_cache=cache) for make in makes]  # noqa: E731
    session.denoise(rows())  # captures, with a call of each engine before
    before = counts(engines)
    got = session.denoise(rows())
    called = {name: count - before[name] for name, count in counts(engines).items()}
    onlooker: list[FakeEngines] = []
    assert_same(got, host(rows(), extra=onlooker.append))
    assert called == counts(onlooker[0])


@pytest.mark.parametrize("mode", GraphMode)
def test_engines_that_launch_a_graph_of_their_own(device, tmp_path, rng, mode):
    """They draw the same, and the host waits as little, but for a launch a kernel."""
    on_device: Any = DeviceEngines(FakeEngines().get, device, OwnGraphSide)
    session = DeviceSession(on_device, library(device, tmp_path), SPEC, PROFILE, mode=mode)
    makes = [
        shortened(make, 6, guidance_interval=(0.2, 0.7), step_cache=2) for make in recipes(rng, guided=True)
    ]
    rows = lambda: [replace(row, noise=Generator(3)) for row in makes]  # noqa: E731
    got = session.denoise(rows())
    assert_same(got, host(rows()))
    device.calls = []
    session.run(rows())
    called = names(device)
    since = called[called.index("kernel") :]
    assert since.count("host") >= len(makes[0].schedule) and not WAITS & set(since)
    assert "begin_capture" not in called
    assert len(list(session.pixels())) == len(makes)
    session.close()


def test_rows_that_disagree(session, rng):
    makes = recipes(rng, guided=True)[:3]
    rows = lambda: [  # noqa: E731
        shortened(makes[0], 6, guidance_interval=(0, 0.5), step_cache=2),
        shortened(makes[1], 9, guidance_interval=(0.5, 1)),
        shortened(makes[2], 4),
    ]
    assert_same(session.denoise(rows()), host(rows()))


@pytest.mark.parametrize("guided", [False, True])
def test_text_that_is_mixed_with_time(make_session, rng, guided):
    """As in SDXL, where both sides of a picture have their own time features."""
    makes = []
    for make in recipes(rng, guided=guided)[:3]:
        row = make()
        pool = lambda side: replace(side, pooled=rng.standard_normal(POOLED, dtype=np.float32))  # noqa: E731
        sides = {"cond": pool(row.cond), "uncond": pool(row.uncond) if guided else None}
        makes.append(lambda row=row, sides=sides: replace(row, noise=Generator(9), **sides))
    session = make_session(FakeEngines(pooled=True))
    # The features are 1000 times a normal number here, on which tanh is a step: compare before it saturates.
    assert_same(session.denoise([m() for m in makes]), host([m() for m in makes], pooled=True))


def test_inpainting(make_session, rng):
    def add(engines):
        for unet in (*engines.loaded.values(), *engines.shallow.values()):
            unet.inputs["mask"] = np.full((BATCH, 1, *SHAPE[1:]), np.nan, np.float32)
            unet.inputs["around"] = np.full((BATCH, *SHAPE), np.nan, np.float32)
            run = unet.enqueue

            def enqueue(run=run, unet=unet):
                run()
                mixed = unet.inputs["mask"] * unet.inputs["around"] + np.arange(BATCH).reshape(-1, 1, 1, 1)
                sides = unet.outputs["prediction"].reshape(-1, BATCH, *SHAPE)
                sides += 0.1 * mixed

            unet.enqueue = enqueue

    engines = FakeEngines()
    add(engines)
    session = make_session(engines)
    around = rng.standard_normal((3, *SHAPE), dtype=np.float32)
    holes = (rng.random((3, 1, *SHAPE[1:])) < 0.5).astype(np.float32)
    makes = recipes(rng, guided=True)[:3]
    rows = lambda: [  # noqa: E731
        replace(make(), inpainting=Inpainting(mask=holes[i], around=around[i]))
        for i, make in enumerate(makes)
    ]
    assert_same(session.denoise(rows()), host(rows(), extra=add))


def test_between_the_first_launch_and_the_last_the_host_does_not_wait(device, session, rng):
    """Nor does it allocate; in the first run it also captures, before that."""
    makes = recipes(rng, guided=True)
    for _ in range(2):
        device.calls = []
        session.run([make() for make in makes])
        assert set(between_launches(device)) <= {"graph", "upload"}
        assert between_launches(device).count("graph") == max(len(make().schedule) for make in makes)
        called = names(device)
        assert "download" not in called[called.index("graph") :]
    assert "begin_capture" not in called and not {"allocate", "pinned", "free"} & set(called)
    # From the first upload of this run on; what is before is time features, once a schedule.
    assert not WAITS & set(called[called.index("clear") :])


def test_from_noise_to_pixels_the_host_waits_once(device, session, rng):
    makes = recipes(rng, guided=True)[:3]
    for _ in range(2):
        device.calls = []
        session.run([make() for make in makes])
        pixels = list(session.pixels())
    called = names(device)
    loop = called[called.index("clear") :]
    assert loop.count("wait") == 1 and loop[-2:] == ["record", "wait"], "an event, which lets the host sleep"
    assert loop.count("download") == 3, "pixels, and two flags"
    assert (WAITS & set(loop)) == {"wait", "download"}
    on_host = Session(FakeEngines(), SPEC, PROFILE)  # type: ignore[arg-type]
    on_host.run([make() for make in makes])
    for got, expected in zip(pixels, on_host.pixels(), strict=True):
        assert got.shape == (48, 64, 3) and got.dtype == np.uint8
        assert (
            np.abs(got.astype(int) - expected.astype(int)).max() <= 1
        )  # where rounding of the loop meets a half
        assert (got != expected).mean() < 0.01


def test_images_and_latents_of_one_run(session, rng):
    makes = recipes(rng, guided=True)[:2]
    on_host = Session(FakeEngines(), SPEC, PROFILE)  # type: ignore[arg-type]
    on_host.run([make() for make in makes])
    expected = [image.copy() for image in on_host.images()]
    session.run([make() for make in makes])
    assert_same(list(session.images()), expected)
    assert_same(session.latents(), on_host.latents())


def test_a_watched_run_is_at_most_two_steps_ahead(device, make_session, engines, rng):
    session = make_session(engines)
    make = recipes(rng, guided=True)[0]
    row = lambda: replace(make(), schedule=schedule_of("euler", 10))  # noqa: E731
    session.denoise([row()])
    calls, behind = engines.loaded[True].calls, []

    def on_step(step: int, rows: Sequence[Any]) -> bool:
        assert rows[0].position == step + 1
        behind.append(step + 1 - (engines.loaded[True].calls - calls))
        return True

    device.calls = []
    session.run([row()], on_step)
    assert behind == [1, *[AHEAD] * 9]
    between = between_launches(device)
    assert set(between) <= {"graph", "upload", "record", "wait"} and between.count("wait") == 10 - AHEAD


@pytest.mark.parametrize("mode", GraphMode)
def test_on_step_stops_the_run(device, engines, make_session, rng, mode):
    session, makes = make_session(engines, mode), recipes(rng, guided=True)
    session.denoise([make() for make in makes])
    stop, calls, kept = int(rng.integers(20)), engines.loaded[True].calls, {}

    def on_step(step: int, rows: Sequence[Any]) -> bool:
        if step == stop:
            kept.update({i: row.latents for i, row in enumerate(rows)})
        return step < stop

    got = session.denoise([make() for make in makes], on_step)
    assert engines.loaded[True].calls - calls == session.calls == stop + 1
    for i, latents in enumerate(got):
        np.testing.assert_array_equal(latents, kept[i])


def test_a_callback_steers(session, rng):
    """Also where the program changes, whose network is to see what was put there."""
    makes = recipes(rng, guided=True)[:2]
    rows = lambda: [shortened(make, 8, guidance_interval=(0.2, 0.7), step_cache=2) for make in makes]  # noqa: E731
    new = rng.standard_normal((8, *SHAPE), dtype=np.float32)

    def steer(step: int, trajectories: Sequence[Any]) -> bool:
        trajectories[1].latents = 0.5 * trajectories[1].latents + new[step]
        return True

    assert_same(session.denoise(rows(), steer), host(rows(), on_step=steer))


@pytest.mark.parametrize("name", ["unipc", "dpmpp-sde", "heun"])
def test_a_callback_steers_what_a_sampler_lets_it(session, rng, name):
    """Some go on from their own sample. Steered twice a step, beside a row that is not, and then not at all."""
    makes = recipes(rng, guided=True)[:2]
    rows = lambda: [replace(make(), schedule=schedule_of(name, 8)) for make in makes]  # noqa: E731
    new = rng.standard_normal((16, *SHAPE), dtype=np.float32)

    def steer(step: int, trajectories: Sequence[Any]) -> bool:
        trajectories[1].latents = new[-1 - step]
        trajectories[1].latents = 0.5 * trajectories[1].latents + new[step]
        return True

    steered = [latents.copy() for latents in host(rows(), on_step=steer)]
    assert_same(session.denoise(rows(), steer), steered)
    untouched = host(rows())
    assert_same(session.denoise(rows()), untouched)
    np.testing.assert_array_equal(untouched[0], steered[0])
    assert not np.allclose(untouched[1], steered[1], atol=1e-2)


def test_nan_is_found_at_the_end_with_its_first_step(engines, session, rng):
    makes = [
        lambda m=m: replace(m(), schedule=schedule_of("euler", 12)) for m in recipes(rng, guided=True)[:3]
    ]
    expected = [latents.copy() for latents in session.denoise([make() for make in makes])]
    calls, unet = engines.loaded[True].calls, engines.loaded[True]
    unet.checks = False
    unet.poisoned.append(lambda: [1] if unet.calls - calls == 6 else [2] if unet.calls - calls == 8 else [])
    session.run([make() for make in makes])
    message = r"^unet gave NaN or Inf at step 6 of 12 \(timestep [\d.]+\); build with --dtype fp32"
    for read in (session.latents, session.pixels, session.images):
        with pytest.raises(NumericsError, match=message):
            read()
    calls = unet.calls
    with pytest.raises(NumericsError, match=message):
        session.denoise([make() for make in makes], lambda step, rows: rows[0].latents.any())
    assert unet.calls - calls <= 6 + AHEAD, "a callback that looks stops there"
    unet.poisoned.clear()
    for got, want in zip(session.denoise([make() for make in makes]), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_rows_without_a_picture_and_finished_rows_do_not_matter(engines, session, rng):
    makes = recipes(rng, guided=True)[:3]
    clean = [latents.copy() for latents in session.denoise([make() for make in makes])]
    unet = engines.loaded[True]
    rows, calls = [make() for make in makes], unet.calls
    unet.poisoned.append(lambda: range(3, BATCH))
    unet.poisoned.append(lambda: [i for i, row in enumerate(rows) if unet.calls - calls > len(row.schedule)])
    for got, expected in zip(session.denoise(rows), clean, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_what_the_text_gives_must_be_finite(engines, session, rng):
    row = recipes(rng, guided=True)[0]()
    row.cond.states[0, 0] = np.inf
    engines.loaded[True].checks = False
    with pytest.raises(NumericsError, match=r"^unet_context gave NaN or Inf; build with"):
        session.denoise([row])


def test_the_decoder_must_give_numbers(engines, session, rng):
    session.run([recipes(rng, guided=True)[0]()])
    engines.decoder.poisoned = True
    for read in (session.pixels, session.images):
        with pytest.raises(NumericsError, match=r"^vae_decoder gave NaN or Inf"):
            read()


def test_a_run_that_nobody_reads_does_not_matter(session, rng):
    """The next one is enqueued behind it, while its uploads may still be to come."""
    makes = recipes(rng, guided=True)
    session.run([make() for make in makes])
    some = makes[1:3]
    assert_same(session.denoise([make() for make in some]), host([make() for make in some]))


def test_rows_with_guidance_and_without_do_not_mix(session, rng):
    rows = [recipes(rng, guided=True)[0](), recipes(rng, guided=False)[0]()]
    with pytest.raises(ConfigError, match="cannot share a run"):
        session.denoise(rows)


def test_there_must_be_a_run_to_read(session):
    for read in (session.latents, session.pixels, session.images):
        with pytest.raises(ConfigError, match="there is no run to read from: call run first"):
            read()


def test_engines_of_the_host_are_refused(engines, device, tmp_path):
    engines.place = None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"these engines run on the host; rt\.session\.Session is for them"):
        DeviceSession(engines, library(device, tmp_path), SPEC, PROFILE)  # type: ignore[arg-type]


def test_buffers_stay_until_a_schedule_is_longer(device, session, rng):
    make = recipes(rng, guided=True)[0]
    run = lambda name, steps: session.denoise([replace(make(), schedule=schedule_of(name, steps))])  # noqa: E731
    run("euler", 3)
    for name, steps, grows in [
        ("ddim", 64, False),
        ("euler-a", 5, True),  # the first with noise
        ("euler-a", 64, False),
        ("ddim", 65, True),
        ("dpmpp-2m-sde", 100, False),
        ("euler", 3, False),
    ]:
        device.calls = []
        before = device.allocated
        got = run(name, steps)
        assert_same(got, host([replace(make(), schedule=schedule_of(name, steps))]))
        assert ("allocate" in names(device)) is grows, (name, steps)
        assert ("begin_capture" in names(device)) is grows
        assert (device.allocated > before) is grows


def test_memory_is_given_back(device, engines, tmp_path, rng):
    on_device: Any = DeviceEngines(engines.get, device)
    row = recipes(rng, guided=True)[0]
    with DeviceSession(on_device, library(device, tmp_path), SPEC, PROFILE) as session:
        session.run([row()])
        list(session.pixels())
        list(session.images())
        assert device.allocated > 0
    assert device.allocated == 0
    on_device.close()
    assert device.in_use == 0


def test_memory_that_is_full_is_given_back(engines, tmp_path, rng):
    device = host_device(memory=200_000)
    on_device: Any = DeviceEngines(engines.get, device)
    session = DeviceSession(on_device, library(device, tmp_path), SPEC, PROFILE)
    row = lambda name, steps: replace(recipes(rng, guided=True)[0](), schedule=schedule_of(name, steps))  # noqa: E731
    with pytest.raises(MemoryError, match="memory of host is full"):
        session.denoise([row("euler-a", 60)])
    assert device.allocated == 0
    session.denoise([row("euler", 4)])
    session.close()
    assert device.allocated == 0


def test_a_chain_that_fails_once(device, make_session, rng, monkeypatch):
    """The graph of the run before is gone by then, and must not be taken for this one's or its own."""
    session = make_session(FakeEngines(), GraphMode.LOOP)
    make = recipes(rng, guided=True)[0]
    row = lambda steps: replace(make(), schedule=schedule_of("euler", steps))  # noqa: E731
    session.denoise([row(4)])
    with monkeypatch.context() as patched:
        patched.setattr(device, "chain", lambda graphs: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            session.denoise([row(6)])
    for steps in (4, 6):
        assert_same(session.denoise([row(steps)]), host([row(steps)]))


@pytest.mark.parametrize("fails", ["pinned", "enqueue"])
def test_a_program_that_fails_leaves_nothing_behind(device, engines, make_session, rng, monkeypatch, fails):
    """Its table and its page-locked memory were allocated before."""
    session = make_session(engines)
    plain, guided = recipes(rng, guided=False)[0], recipes(rng, guided=True)[0]
    noisy = lambda make: replace(make(), schedule=schedule_of("euler-a", 3))  # noqa: E731
    session.denoise([noisy(plain)])
    on_device = session._engines.on_device(Component.UNET, PROFILE, guided=True)
    pinned = device.pinned

    def full(shape, *_):
        if tuple(shape) == SHAPE:  # the last of a program
            raise MemoryError("full")
        return pinned(shape, *_)

    def refuse(stream):
        raise MemoryError("full")

    used = []
    with monkeypatch.context() as patched:
        target, fake = (device, full) if fails == "pinned" else (on_device, refuse)
        patched.setattr(target, fails, fake)
        for _ in range(3):
            with pytest.raises(MemoryError, match="full"):
                session.denoise([noisy(guided)])
            used.append((device.allocated, device.in_use))
    assert len({*used}) == 1
    assert_same(session.denoise([noisy(guided)]), host([noisy(guided)]))


def test_an_engine_is_warmed_up_once(engines, session, rng):
    """Though there is a graph with rescaled guidance and one without, and one decoder for all rows."""
    makes = recipes(rng, guided=True)
    for rescale in (0.0, 0.7):
        rows = [
            replace(m(), schedule=schedule_of("euler", 3), guidance_rescale=rescale, latents=None)
            for m in makes
        ]
        session.run(rows)
        list(session.pixels())
    assert engines.loaded[True].calls == 1 + 3 + 3
    assert engines.decoder.calls == 1 + 2 * len(makes)


def test_a_decoder_is_captured_once(device, session, rng):
    makes = recipes(rng, guided=True)
    session.run([make() for make in makes])
    device.calls = []
    list(session.pixels())
    assert names(device).count("begin_capture") == 1 and names(device).count("graph") == len(makes)


def test_any_thread_may_own_a_session(device, engines, tmp_path, rng):
    """The device was made in this one. Each call has a thread of its own here, so that each must activate it."""

    def elsewhere(work):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    on_device: Any = DeviceEngines(engines.get, device)
    kernels = library(device, tmp_path)
    session = elsewhere(lambda: DeviceSession(on_device, kernels, SPEC, PROFILE))
    make = recipes(rng, guided=True)[0]
    elsewhere(lambda: session.run([make()]))
    assert_same(elsewhere(session.latents), host([make()]))
    assert len(elsewhere(lambda: [*session.images(), *session.pixels()])) == 2
    elsewhere(session.close)


def test_results_outlive_the_session(device, session, rng):
    """Page-locked memory is gone then, and another owner may write into it."""
    session.run([recipes(rng, guided=True)[0]()])
    results = [*session.latents(), *session.images(), *session.pixels()]
    pinned = [*device._pinned.values()]
    session.close()
    assert pinned and not any(np.shares_memory(one, other) for one in results for other in pinned)


class OnCuda:
    """Engines that do nothing but launch a memset, with the buffers of `FakeEngines`, on a CUDA device."""

    def __init__(self, fakes: FakeEngines, gpu: CudaDevice) -> None:
        self.place = Place(gpu, gpu.create_stream())
        self._get, self._made = fakes.get, {}

    def on_device(self, *key, **more):
        name = (key, *more.items())
        if name not in self._made:
            engine, device = self._get(*key, **more), self.place.device
            sides = [
                {k: device.allocate(array.shape, array.dtype.name) for k, array in arrays.items()}
                for arrays in (engine.inputs, engine.outputs)
            ]
            first = next(iter(sides[1].values()))
            self._made[name] = SimpleNamespace(
                inputs=sides[0], outputs=sides[1], enqueue=lambda stream: device.clear(first, stream)
            )
        return self._made[name]

    def get(self, *key, **more):
        return HostSide(self.on_device(*key, **more), self.place.device, self.place.stream)


def test_what_the_driver_is_asked_for(driver, rng, tmp_path):
    """The loop on CUDA's driver, which does nothing here: its calls, in order, and none that waits in between."""
    gpu = CudaDevice()
    on_cuda: Any = OnCuda(FakeEngines(), gpu)
    makes = [lambda m=m: replace(m(), guidance_rescale=0.7) for m in recipes(rng, guided=True)]
    steps = max(len(make().schedule) for make in makes)
    with DeviceSession(on_cuda, library(gpu, tmp_path), SPEC, PROFILE) as session:
        for first in (True, False):
            driver.calls.clear()
            session.run([make() for make in makes])
            called = [name for name, _ in driver.calls]
            loop = called[called.index("cuGraphLaunch") :]
            assert loop.count("cuGraphLaunch") == steps
            assert set(loop) == {"cuGraphLaunch", "cuMemcpyHtoDAsync"}
            list(session.pixels())
            if first:
                assert len(driver.named("cuModuleLoadData")) == len(SPECS), "each kernel once, in one format"
        assert not {"cuMemAlloc", "cuStreamBeginCapture", "cuModuleLoadData"} & {n for n, _ in driver.calls}
        end = [name for name, _ in driver.calls][len(called) :]
        assert end.count("cuEventSynchronize") == 1 and "cuStreamSynchronize" not in end
    assert len(driver.named("cuMemFree")) > 5 and driver.named("cuGraphExecDestroy")


def test_a_captured_step_is_three_kernels_and_the_network(driver, rng, tmp_path):
    """The network here is a memset."""
    gpu = CudaDevice()
    on_cuda: Any = OnCuda(FakeEngines(), gpu)
    row = replace(recipes(rng, guided=True)[0](), guidance_rescale=0.7, schedule=schedule_of("euler", 3))
    with DeviceSession(on_cuda, library(gpu, tmp_path), SPEC, PROFILE) as session:
        session.run([row])
        called = [name for name, _ in driver.calls]
        captured = called[called.index("cuStreamBeginCapture") : called.index("cuStreamEndCapture")]
        assert captured[1:] == ["cuLaunchKernel", "cuMemsetD8Async", "cuLaunchKernel", "cuLaunchKernel"]
        *_, (values, _), _ = driver.named("cuLaunchKernel")[2]
        # guide_and_step: six pointers, rows, sides, steps, draws and elements, four pointers
        assert values[6:11] == (BATCH, 2, FEWEST_STEPS, 1, 4 * 6 * 8)


def test_half_precision(make_session, rng):
    """The network's buffers in fp16, the state in fp32."""

    class Half:
        def __init__(self, engine):
            self.engine = engine
            self.inputs, self.outputs = (
                {name: array.astype(np.float16) for name, array in arrays.items()}
                for arrays in (engine.inputs, engine.outputs)
            )

        def enqueue(self):
            for name, array in self.inputs.items():
                self.engine.inputs[name][...] = array
            self.engine.enqueue()
            for name, array in self.outputs.items():
                array[...] = self.engine.outputs[name]

    class HalfEngines(FakeEngines):
        def __init__(self):
            super().__init__()
            self.halves = {}

        def get(self, *key, **more):
            name = (key, *more.items())
            return self.halves.setdefault(name, Half(super().get(*key, **more)))

    mild = {"guidance_scale": 1.5, "guidance_rescale": 0.0, "schedule": schedule_of("euler", 8)}
    makes = [lambda m=m: replace(m(), **mild) for m in recipes(rng, guided=True)[:3]]
    session = make_session(HalfEngines())
    assert_same(
        session.denoise([m() for m in makes]), host([m() for m in makes]), tolerance=0.01
    )  # measured: 6e-4


def test_latents_too_large_for_the_decoder(make_session, rng):
    engines = FakeEngines()
    engines.decoder.inputs["latents"] = engines.decoder.inputs["latents"].astype(np.float16)
    session = make_session(engines)
    make = recipes(rng, guided=True)[0]
    large = np.full(SHAPE, 1e5, np.float32)
    session.run([replace(make(), schedule=schedule_of("euler", 3), latents=large, guidance_rescale=0.0)])
    with pytest.raises(
        NumericsError, match="latents after step 3 are too large for the format of vae_decoder"
    ):
        session.pixels()


def test_a_trajectory_is_steered_by_assignment(rng):
    trajectory = Trajectory(SHAPE)
    trajectory.start(schedule_of("euler", 2), noise=Generator(1), guidance_scale=1.0)
    view, new = trajectory.latents, rng.standard_normal(SHAPE, dtype=np.float32)
    trajectory.latents = new
    np.testing.assert_array_equal(view, new)
