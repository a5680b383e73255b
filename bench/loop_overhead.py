"""What the sampling loop costs beside its U-Net: `python -m rt.bench.loop_overhead BUNDLE...`.

The loop is everything in `Session.denoise` that is not inside `Engine.enqueue`: feeding latents and
timestep, guidance, the sampler's step and its noise. The aim is below 3 % of a step on the demo bundle.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from rt.backends import AUTO, BACKENDS
from rt.bench.bundle import describe, end_to_end, find_profile
from rt.bench.record import RESULTS, publish
from rt.bench.report import Settings
from rt.bench.timing import Calibration, gemm_gflops
from rt.pipeline import Pipeline
from rt.progress import progress


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--warmup", type=int, default=3, show_default=True, help="Pictures before the first sample.")
@click.option("--iterations", type=int, default=20, show_default=True, help="Pictures.")
@click.option("--backend", type=click.Choice([AUTO, *BACKENDS]), default=AUTO, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the record.")
def command(
    bundles: tuple[Path, ...], steps: int, warmup: int, iterations: int, backend: str, out: Path
) -> None:
    """Draw with each BUNDLE and tell the loop's time from the engine's."""
    settings = Settings(steps=steps, guidance_scale=7.5, warmup=warmup, iterations=iterations)
    results = []
    for path in bundles:
        before = gemm_gflops()
        pipe = Pipeline.from_bundle(path, backend=backend)
        profile = find_profile(pipe.bundle)
        with progress("draw", total=settings.calls) as bar:
            _, loop = end_to_end(pipe, profile, settings, bar)
        calibration = Calibration(before_gflops=before, after_gflops=gemm_gflops())
        subject = describe(pipe, profile)
        click.echo(f"{subject}\n  {loop}; {calibration}")
        figures = {"subject": asdict(subject), "calibration": asdict(calibration), "loop": loop.to_json()}
        results.append(figures)
    publish("loop-overhead", {"settings": asdict(settings), "results": results}, out)


if __name__ == "__main__":
    command()
