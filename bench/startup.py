"""What it takes to begin: `python -m rt.bench.startup BUNDLE`.

`import rt` in a fresh interpreter, beside an interpreter that imports nothing, and the whole process of
`rt run BUNDLE` for one picture. The aims are below 100 ms and, on the demo bundle, below 2.5 s for 20 steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click

from rt.bench.bundle import PROMPT
from rt.bench.record import RESULTS, publish
from rt.bench.timing import Calibration, elapsed, gemm_gflops, interleave
from rt.bundle import Bundle

_STAGES = {
    "load_s": "hash and load the engines",
    "text_s": "encode the prompt",
    "denoise_s": "all steps",
    "decode_s": "decode",
}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--rounds", type=int, default=9, show_default=True, help="Fresh processes of each kind.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the record.")
def command(bundle: Path, steps: int, rounds: int, out: Path) -> None:
    """Start fresh interpreters, in turn: bare, importing rt, importing `rt run`, and drawing with BUNDLE."""
    Bundle.open(bundle)
    before = gemm_gflops()
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        draw = ["run", str(bundle), "--prompt", PROMPT, "--steps", str(steps), "--seed", "0"]
        draw += ["--output", f"{folder}/picture.png", "--force", "--json", "--quiet"]
        samples = interleave(
            {
                "interpreter": lambda: elapsed(lambda: _python("-c", "pass")),
                "import rt": lambda: elapsed(lambda: _python("-c", "import rt")),
                "import rt.cli.run": lambda: elapsed(lambda: _python("-c", "import rt.cli.run")),
                "rt run": lambda: elapsed(lambda: runs.append(json.loads(_python("-m", "rt", *draw)))),
            },
            rounds,
        )
    calibration = Calibration(before_gflops=before, after_gflops=gemm_gflops())
    inside = {stage: median(run["timings"][stage] for run in runs) for stage in _STAGES}
    click.echo(f"{steps} steps, median of {rounds}; {calibration}")
    for name, each in samples.items():
        beyond = (each.median - samples["interpreter"].median) * 1e3
        click.echo(f"{name:<18}{each.median * 1e3:>8.0f} ms{beyond:>8.0f} ms more than the interpreter")
    for stage, what in _STAGES.items():
        click.echo(f"  {what:<32}{inside[stage] * 1e3:>8.0f} ms")
    publish(
        "startup",
        {
            "steps": steps,
            "calibration": asdict(calibration),
            "processes": {name: each.to_json() for name, each in samples.items()},
            "inside_rt_run": inside,
        },
        out,
    )


def _python(*arguments: str) -> bytes:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    command()
