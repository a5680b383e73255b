"""`rt.bench.bundle` and `rt bench` on a bundle, and the loop's own time with an engine that sleeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rt.bench.bundle import find_profile, measure
from rt.bench.report import Loop, Report, Settings
from rt.bench.timing import Samples, watching
from rt.bundle import Bundle
from rt.conditioning import Conditioning
from rt.errors import BackendUnavailableError, BundleError, ConfigError
from rt.model import Component, ModelSpec
from rt.noise import Generator
from rt.samplers import Scheduler
from rt.session import Row, Session
from rt.shapes import ShapeProfile

QUICK = Settings(steps=2, guidance_scale=7.5, warmup=1, iterations=3)
QUICK_OPTIONS = ["--steps", "2", "--warmup", "1", "--iterations", "3", "--quiet"]


class SleepingUNet:
    """An engine of known slowness whose prediction is noise."""

    def __init__(self, seconds: float, latents: tuple[int, ...], context: tuple[int, ...]) -> None:
        self.seconds = seconds
        self.inputs = {
            "latents": np.full(latents, np.nan, np.float32),
            "time_0": np.full((latents[0], 1), np.nan, np.float32),
            "context_0": np.full((2 * latents[0], *context), np.nan, np.float32),
        }
        self.outputs = {"prediction": np.full((2 * latents[0], *latents[1:]), np.nan, np.float32)}

    def enqueue(self) -> None:
        time.sleep(self.seconds)
        prediction = self.outputs["prediction"]
        prediction[...] = np.random.default_rng().standard_normal(prediction.shape)

    def get(self, component: Component, *key: object, **guided: bool) -> SleepingUNet | Early:
        context = self.inputs["context_0"][:1]
        early = {
            Component.UNET_TIME: Early(
                "timestep", np.zeros(1, np.float32), "time_0", np.zeros((1, 1), np.float32)
            ),
            Component.UNET_CONTEXT: Early("context", context.copy(), "context_0", np.zeros_like(context)),
        }
        return early.get(component, self)


class Early:
    """What is made of a timestep or a text, for a network that does not look at it."""

    def __init__(self, source: str, given: np.ndarray, name: str, made: np.ndarray) -> None:
        self.inputs, self.outputs = {source: given}, {name: made}

    def enqueue(self) -> None:
        pass


@pytest.fixture
def spec(tiny_bundle: Path) -> ModelSpec:
    return Bundle.open(tiny_bundle).manifest.model


def test_overhead_is_the_time_outside_the_engine(spec: ModelSpec) -> None:
    """An engine that sleeps 6 ms and a callback that sleeps 4 ms: 40 % and a little more."""
    side, context = 8, (spec.max_tokens, spec.context_size)
    unet = SleepingUNet(0.006, (1, spec.latent_channels, side, side), context)
    pixels = side * spec.vae_scale_factor
    session = Session(unet, spec, ShapeProfile(pixels, pixels))  # type: ignore[arg-type]
    row = Row(
        schedule=Scheduler.from_config(spec.scheduler, "euler").schedule(10),
        noise=Generator(3),
        cond=Conditioning(states=np.ones(context, np.float32)),
        uncond=Conditioning(states=np.zeros(context, np.float32)),
        guidance_scale=7.5,
    )

    def pause(step: int, rows: object) -> bool:
        time.sleep(0.004)
        return True

    denoise, engine = [], []
    for _ in range(3):
        started = time.perf_counter()
        with watching(unet) as enqueues:
            session.denoise([row], pause)
        denoise.append(time.perf_counter() - started)
        engine.append(sum(enqueues))
        assert len(enqueues) == 10
    loop = Loop(calls=10, denoise=Samples(tuple(denoise)), engine=Samples(tuple(engine)))
    assert loop.step_s >= 0.010
    assert 0.004 <= loop.overhead_s <= loop.step_s - 0.006


def test_every_engine_and_the_whole_way_are_measured(tiny_bundle: Path, spec: ModelSpec) -> None:
    report = measure(tiny_bundle, QUICK)
    names = [stage.name for stage in report.stages]
    assert names == [
        "text encoder",
        "U-Net time",
        "U-Net context",
        "U-Net step, guided",
        "U-Net step, unguided",
        "VAE decoder",
        "end to end",
    ]
    for stage in report.stages:
        assert len(stage.samples.seconds) == 3, "neither the load nor the warm-up is a sample"
        assert stage.load_s > 0
        assert stage.peak_rss_mib > 10
    whole = report.stages[-1].samples
    assert report.loop.calls == len(Scheduler.from_config(spec.scheduler).schedule(QUICK.steps))
    for total, denoise, engine in zip(
        whole.seconds, report.loop.denoise.seconds, report.loop.engine.seconds, strict=True
    ):
        assert total > denoise > engine > 0
    assert report.subject.fingerprint == Bundle.open(tiny_bundle).manifest.fingerprint
    assert report.calibration.before_gflops > 0


def test_without_guidance_the_loop_uses_the_other_unet(tiny_bundle: Path) -> None:
    report = measure(tiny_bundle, replace(QUICK, guidance_scale=1.0))
    assert min(report.loop.engine.seconds) > 0, "the engine that was watched is the one that ran"


def test_each_batch_size_that_was_built(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    assert find_profile(bundle) == bundle.manifest.config.profiles[0]
    assert find_profile(bundle, 2).batch_size == 2
    report = measure(demo_bundle, QUICK, batch_size=2)
    pictures = {stage.name: stage.pictures for stage in report.stages}
    assert pictures == {
        "text encoder": 1,
        "U-Net time": 1,
        "U-Net context": 1,
        "U-Net step, guided": 2,
        "U-Net step, unguided": 2,
        "VAE decoder": 1,
        "end to end": 2,
    }
    assert report.loop.calls == QUICK.steps, "both pictures in one call a step"


def test_a_batch_size_that_was_not_built(demo_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch size 3 is not in this bundle, which was built for 1, 2"):
        measure(demo_bundle, QUICK, batch_size=3)


def bench(*arguments: str | Path) -> Result:
    from rt.cli.bench import command

    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_command_writes_table_record_and_plot(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record, plot = tmp_path / "record.json", tmp_path / "plot.png"
    result = bench(tiny_bundle, *QUICK_OPTIONS, "--json", record, "--plot", plot)
    assert result.exception is None, result.output
    report = Report.from_json(json.loads(record.read_text()))
    assert result.stdout == report.table() + "\n"
    assert report.settings == QUICK
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(tiny_bundle.parent) not in record.read_text(), "records are published: no paths in them"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--iterations", "0"], ConfigError, "iterations is 0; it must be at least 1"),
        (["-n", "5"], ConfigError, "batch size 5 is not in this bundle"),
        (["--json", "no/such/record.json"], ConfigError, "no/such is not a folder"),
        (["--plot", "no/such/plot.png"], ConfigError, "no/such is not a folder"),
    ],
)
def test_command_refuses(options: list[str], error: type[Exception], message: str, tiny_bundle: Path) -> None:
    result = bench(tiny_bundle, *QUICK_OPTIONS, *options)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_command_wants_a_bundle(tmp_path: Path) -> None:
    result = bench(tmp_path, *QUICK_OPTIONS)
    assert isinstance(result.exception, BundleError)
    assert "is not a bundle" in str(result.exception)


def test_plot_without_matplotlib_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("matplotlib.axes", "matplotlib.figure", "rt.bench.plot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("rt.cli.bench.measure", lambda *args, **kwargs: pytest.fail("measured first"))
    result = bench(tiny_bundle, *QUICK_OPTIONS, "--plot", tmp_path / "plot.png")
    assert isinstance(result.exception, BackendUnavailableError)
    message = (
        r'rt bench --plot needs matplotlib\S*, which is not installed; run: pip install "matplotlib>=\S+"$'
    )
    assert re.match(message, str(result.exception))


def test_measuring_needs_neither_torch_nor_matplotlib(tiny_bundle: Path) -> None:
    script = (
        "import sys; from rt.bench.bundle import measure; from rt.bench.report import Settings;"
        f"measure({str(tiny_bundle)!r}, Settings(steps=1, guidance_scale=7.5, warmup=0, iterations=1));"
        "print({'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
