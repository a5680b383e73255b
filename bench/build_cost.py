"""What a build costs: wall clock and peak memory of a whole `rt build` process.

    python -m rt.bench.build_cost MODEL [--dtype bf16]

The aim is below 3 minutes and 12 GiB for Stable Diffusion 1.5's size on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from rt.bench.record import RESULTS, publish
from rt.config import DType


@click.command()
@click.argument("model")
@click.option("--dtype", type=click.Choice([d.value for d in DType]), default="bf16", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the record.")
def command(model: str, dtype: str, out: Path) -> None:
    """Build MODEL into a temporary directory."""
    name = Path(model).name
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build = [sys.executable, "-m", "rt", "-v", "build", model, "--dtype", dtype, "-o", f"{folder}/bundle"]
        process = subprocess.Popen(build)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        sys.exit(os.waitstatus_to_exitcode(status))
    peak_gib = usage.ru_maxrss / 2**20
    click.echo(f"{name}, {dtype}: {seconds:.0f} s, {peak_gib:.1f} GiB at the peak")
    figures = {"model": name, "dtype": dtype, "wall_s": round(seconds, 1), "peak_rss_gib": round(peak_gib, 2)}
    publish(f"build-{name}-{dtype}", figures, out)


if __name__ == "__main__":
    command()
