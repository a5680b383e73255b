"""`rt bench`: how fast a bundle is here, engine by engine and end to end."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rt.bench.bundle import measure
from rt.bench.report import Settings
from rt.cli.options import backend_option
from rt.cli.streams import show
from rt.errors import ConfigError
from rt.extras import needs


@click.command(short_help="Measure how fast a bundle is here.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--steps", "--num-inference-steps", type=int, default=20, show_default=True)
@click.option("--guidance-scale", type=float, default=7.5, show_default=True, help="1 turns guidance off.")
@click.option("-n", "--batch-size", type=int, help="Pictures at once, as built.  [default: the first]")
@click.option("--warmup", type=int, default=3, show_default=True, help="Calls before the first sample.")
@click.option("--iterations", type=int, default=20, show_default=True, help="Samples of each stage.")
@backend_option
@click.option(
    "--threads",
    type=int,
    help="Processors to use.  [default: OMP_NUM_THREADS, or all allowed]",
)
@click.option("--json", "record", type=click.Path(path_type=Path), help="Write everything known here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the figures into this PNG.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def command(
    bundle: Path,
    steps: int,
    guidance_scale: float,
    batch_size: int | None,
    warmup: int,
    iterations: int,
    backend: str,
    threads: int | None,
    record: Path | None,
    plot: Path | None,
    quiet: bool,
) -> None:
    """Time each engine of BUNDLE and the way from prompt to picture, and print a table."""
    for file in (record, plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file.parent} is not a folder; make it first, or write {file.name} elsewhere")
        if file is not None and file.is_dir():
            raise ConfigError(f"{file} is a folder; give the name of a file in it")
    if plot is not None:
        with needs("plot", "rt bench --plot"):
            from rt.bench.plot import draw
    settings = Settings(steps=steps, guidance_scale=guidance_scale, warmup=warmup, iterations=iterations)
    report = measure(bundle, settings, batch_size=batch_size, backend=backend, threads=threads, quiet=quiet)
    show(*report.table().splitlines())
    if record is not None:
        record.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if plot is not None:
        draw(report, plot)
