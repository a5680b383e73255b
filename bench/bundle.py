"""Measure a bundle: each engine alone on the inputs of its build, then prompt to pictures."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from rt.backends import AUTO, cpu_count
from rt.bench.memory import peak_rss_mib, reset_peak
from rt.bench.record import Provenance
from rt.bench.report import Loop, Report, Settings, Stage, Subject
from rt.bench.timing import Calibration, Samples, elapsed, gemm_gflops, watching
from rt.bundle import Bundle, EngineRecord
from rt.engines import Engines
from rt.errors import ConfigError
from rt.model import Component
from rt.pipeline import Pipeline
from rt.progress import Bar, progress
from rt.shapes import ShapeProfile
from rt.timings import Timings

PROMPT = "a red heart"


def measure(
    path: str | Path,
    settings: Settings,
    *,
    batch_size: int | None = None,
    backend: str = AUTO,
    threads: int | None = None,
    quiet: bool = True,
) -> Report:
    """Measure the bundle at `path`.

    Args:
        path: The directory that `rt build` wrote.
        settings: How often, with how many steps.
        batch_size: Pictures at once, one that was built; that of the first profile when None.
        backend: As for `Pipeline`.
        threads: As for `Pipeline`.
        quiet: Show no progress.

    Raises:
        ConfigError: When no profile has that batch size.
        BundleError, BackendError, NumericsError: As `Pipeline`.
    """
    before = gemm_gflops()
    with Pipeline.from_bundle(path, backend=backend, threads=threads) as pipe:
        profile = find_profile(pipe.bundle, batch_size)
        records = [record for record in pipe.bundle.manifest.engines if _serves(record, profile)]
        with progress("bench", total=(len(records) + 1) * settings.calls, quiet=quiet) as bar:
            stages = []
            for record in records:
                # Engines of their own, so that they hold nothing else, and nothing of them is left for the next.
                with closing(Engines(pipe.bundle, backend, threads)) as engines:
                    stages.append(_alone(engines, pipe.bundle, record, settings, bar))
            whole, loop = end_to_end(pipe, profile, settings, bar)
        return Report(
            provenance=Provenance.now(),
            subject=describe(pipe, profile, threads),
            settings=settings,
            calibration=Calibration(before_gflops=before, after_gflops=gemm_gflops()),
            stages=(*stages, whole),
            loop=loop,
        )


def describe(pipe: Pipeline, profile: ShapeProfile, threads: int | None = None) -> Subject:
    """What is measured, without the paths of this machine."""
    manifest, backend = pipe.bundle.manifest, pipe.engines.backend
    return Subject(
        model=Path(manifest.source.name).name,
        fingerprint=manifest.fingerprint,
        dtype=manifest.config.dtype.value,
        profile=profile,
        backend=backend.name,
        arithmetic=backend.arithmetic(manifest.config.dtype),
        threads=threads or cpu_count(),
    )


def find_profile(bundle: Bundle, batch_size: int | None = None) -> ShapeProfile:
    """The first profile of the bundle, or the one like it with another batch size.

    Raises:
        ConfigError: When that was not built, with the batch sizes that were.
    """
    first, *others = bundle.manifest.config.profiles
    alike = {p.batch_size: p for p in (first, *others) if (p.height, p.width) == (first.height, first.width)}
    if batch_size is None:
        return first
    if batch_size not in alike:
        built = ", ".join(str(size) for size in sorted(alike))
        raise ConfigError(
            f"batch size {batch_size} is not in this bundle, which was built for {built} "
            f"at {first.height} x {first.width}; use one of these or rebuild with --batch-size"
        )
    return alike[batch_size]


def end_to_end(pipe: Pipeline, profile: ShapeProfile, settings: Settings, bar: Bar) -> tuple[Stage, Loop]:
    """Draw again and again; gives the time of it all, and that of the loop beside its U-Net's.

    One more call comes first, which loads the engines.
    """

    picture = _picture(profile) if pipe.bundle.manifest.model.inpainting else {}

    def draw() -> Timings:
        return pipe(
            PROMPT,
            profile.height,
            profile.width,
            settings.steps,
            guidance_scale=settings.guidance_scale,
            num_images_per_prompt=profile.batch_size,
            seed=0,
            **picture,
        ).timings

    reset_peak()
    bar.describe("end to end")
    load_s = draw().load_s
    unet = pipe.engines.get(Component.UNET, profile, guided=settings.guided)
    runs = []
    for _ in range(settings.calls):
        with watching(unet) as enqueues:
            timings = draw()
        runs.append((timings.total_s, timings.denoise_s, sum(enqueues)))
        bar.advance()
    total, denoise, engine = (Samples(seconds) for seconds in zip(*runs[settings.warmup :], strict=True))
    stage = Stage(
        name="end to end",
        pictures=profile.batch_size,
        load_s=load_s,
        peak_rss_mib=peak_rss_mib(),
        samples=total,
    )
    return stage, Loop(calls=timings.steps, denoise=denoise, engine=engine)


def _alone(engines: Engines, bundle: Bundle, record: EngineRecord, settings: Settings, bar: Bar) -> Stage:
    """Load one engine and run it on the inputs that it was verified with."""
    reset_peak()
    name = _name(record)
    bar.describe(name)
    bundle.verify([record.reference])
    started = time.perf_counter()
    engine = engines.get(record.component, record.profile, guided=record.guided)
    load_s = time.perf_counter() - started
    with np.load(bundle.path / record.reference) as reference:
        for tensor, buffer in engine.inputs.items():
            np.copyto(buffer, reference[f"input.{tensor}"])
    seconds = []
    for _ in range(settings.calls):
        seconds.append(elapsed(engine.enqueue))
        bar.advance()
    return Stage(
        name=name,
        pictures=record.profile.batch_size if record.profile else 1,
        load_s=load_s,
        peak_rss_mib=peak_rss_mib(),
        samples=Samples(tuple(seconds[settings.warmup :])),
    )


def _serves(record: EngineRecord, profile: ShapeProfile) -> bool:
    """Whether drawing at `profile` can need this engine; the autoencoder takes one picture at a time."""
    single = ShapeProfile(profile.height, profile.width)
    steps = {Component.UNET: profile, Component.UNET_SHALLOW: profile}
    wanted = {**steps, Component.VAE_ENCODER: single, Component.VAE_DECODER: single}
    return record.profile == wanted.get(record.component)


def _picture(profile: ShapeProfile) -> dict[str, Any]:
    """A grey one, whose right half is to be painted anew."""
    mask = np.zeros((profile.height, profile.width), np.uint8)
    mask[:, profile.width // 2 :] = 255
    return {"image": np.full((profile.height, profile.width, 3), 128, np.uint8), "mask_image": mask}


def _name(record: EngineRecord) -> str:
    kinds = {Component.UNET: "step", Component.UNET_SHALLOW: "shallow step"}
    if record.component in kinds:
        return f"U-Net {kinds[record.component]}, {'guided' if record.guided else 'unguided'}"
    return str(record.component.value).replace("_", " ").replace("vae", "VAE").replace("unet", "U-Net")
