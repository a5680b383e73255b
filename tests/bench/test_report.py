"""The record of `rt bench`, its table and its plot."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rt.bench.record import Provenance
from rt.bench.report import Loop, Report, Settings, Stage, Subject
from rt.bench.timing import Calibration, Samples
from rt.errors import ConfigError
from rt.shapes import ShapeProfile

NAMES = (
    "text encoder",
    "text encoder 2",
    "U-Net step, guided",
    "U-Net step, unguided",
    "VAE decoder",
    "end to end",
)


def make_report(scale: float = 1.0, count: int = 20, processor: str = "AMD EPYC") -> Report:
    rng = np.random.default_rng(secrets.randbits(64))

    def samples() -> Samples:
        return Samples(tuple((scale * rng.gamma(9.0, 0.01, count)).tolist()))

    now = Provenance.now()

    def stage(name: str) -> Stage:
        return Stage(name=name, pictures=2, load_s=rng.random(), peak_rss_mib=1234.4, samples=samples())

    denoise = samples()
    return Report(
        provenance=replace(now, machine=replace(now.machine, processor=processor)),
        subject=Subject(
            model="emoji-ldm",
            fingerprint=secrets.token_hex(32),
            dtype="bf16",
            profile=ShapeProfile(64, 96, 2),
            backend="openvino",
            arithmetic="bf16",
            threads=2,
        ),
        settings=Settings(steps=20, guidance_scale=7.5, warmup=3, iterations=count),
        calibration=Calibration(before_gflops=412.3, after_gflops=398.7),
        stages=tuple(stage(name) for name in NAMES),
        loop=Loop(calls=20, denoise=denoise, engine=Samples(tuple(0.97 * s for s in denoise.seconds))),
    )


@pytest.fixture
def report() -> Report:
    return make_report()


def test_report_survives_json(report: Report) -> None:
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_json_has_the_figures_for_those_who_only_read_it(report: Report) -> None:
    data = json.loads(json.dumps(report.to_json()))
    assert data["stages"][0]["samples"]["p90_s"] == report.stages[0].samples.p90
    assert data["loop"]["overhead_percent"] == pytest.approx(3.0)
    assert data["subject"]["fingerprint"] == report.subject.fingerprint


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e5])
def test_table_fits_80_columns(scale: float) -> None:
    lines = make_report(scale, processor="Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz").table().splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line[:20].strip(): line[20:].split() for line in lines}
    for name in NAMES:
        assert len(rows[name]) == 6, "the columns of a row run into each other"


def test_table_shows_the_medians(report: Report) -> None:
    rows = {line[:20].strip(): line[20:].split() for line in report.table().splitlines()}
    for stage in report.stages:
        load_s, median, p90, p99, rate, peak = map(float, rows[stage.name])
        assert load_s == pytest.approx(stage.load_s, rel=6e-3)
        assert (median, p90, p99) == pytest.approx(
            [1e3 * s for s in (stage.samples.median, stage.samples.p90, stage.samples.p99)], rel=6e-3
        )
        assert rate == pytest.approx(2 / stage.samples.median, rel=6e-3)
        assert peak == pytest.approx(1234, abs=1)


def test_overhead_is_what_is_left_of_each_run() -> None:
    """Medians of differences, not differences of medians: the slow runs of one are not those of the other."""
    loop = Loop(calls=10, denoise=Samples((1.0, 3.0, 2.0)), engine=Samples((0.9, 2.4, 1.9)))
    assert loop.step_s == pytest.approx(0.2)
    assert loop.overhead_s == pytest.approx(0.01)
    assert loop.overhead_percent == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("setting", "value", "least"),
    [("iterations", 0, 1), ("iterations", -3, 1), ("warmup", -1, 0), ("steps", 0, 1)],
)
def test_settings_without_a_meaning(setting: str, value: int, least: int) -> None:
    valid = {"steps": 1, "guidance_scale": 1.0, "warmup": 0, "iterations": 1}
    Settings(**valid)
    with pytest.raises(ConfigError, match=f"{setting} is {value}; it must be at least {least}"):
        Settings(**{**valid, setting: value})


@pytest.mark.parametrize("count", [1, 30])
def test_plot_is_a_png_of_its_size(count: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rt.bench.plot import draw

    draw(make_report(count=count), tmp_path / "plot")
    with Image.open(tmp_path / "plot") as image:
        assert (image.format, image.size) == ("PNG", (1650, 630))
        pixels = np.asarray(image.convert("RGB"))
    assert math.prod(pixels.shape[:2]) > (pixels == 255).all(axis=-1).sum() > pixels.size / 6, "ink on white"
