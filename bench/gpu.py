"""Everything about one GPU: `python bench/gpu.py` in a checkout, or `python -m rt.bench.gpu`.

    python bench/gpu.py                      the parts that fit into 25 minutes, in their order
    python bench/gpu.py --plan first         what a first visit of nine minutes should bring; with --packages DIR the
                                             first step times stand after two
    python bench/gpu.py --plan second        four minutes more on the same machine, while it is warm
    python bench/gpu.py --only sd15          one part with the builds that it needs; may be repeated
    python bench/gpu.py --resume             what the newest record of this GPU lacks, of those in --out and in
                                             bench/results; where a command has to end in ten minutes, --minutes 9
                                             --resume again and again does all
    python bench/gpu.py --dry                every part at tiny size on the CPU, in some minutes; measures nothing
    python bench/gpu.py --prepare DIR        packages for --packages, compiled on a machine without a GPU

What a part finds out is in the record as soon as it is there, and what it prints in the log beside the record: a slice
that is cut off loses nothing, and `--out` has two files. A process does one part after the other, and another one goes
on where a part fails or takes longer than 1.3 times its estimate. At the end stands which aims were reached.

Needed are torch, triton, onnx, numpy, cuda-bindings and, of pure Python, what the extra `build` has; of these a machine
for computing mostly lacks diffusers alone, whose wheel has to come along. In a checkout `pip install --no-deps
--no-build-isolation -e .` installs rt without a network: records and the commit are the checkout's. Where the
repository's history did not come along, RT_COMMIT in the environment says the commit. Afterwards `python -m
rt.bench.tables` puts the figures into `docs/benchmarks.md`, and `python -m rt.bench.gpu_parts.plot` draws them.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from rt.bench.gpu_parts.apart import Processes
from rt.bench.gpu_parts.part import Context, Part, choose
from rt.bench.gpu_parts.parts import PARTS, PLANS
from rt.bench.gpu_parts.record import Run, newest
from rt.bench.gpu_parts.run import Found, find_gpu, run_parts
from rt.bench.gpu_parts.settings import PREPARED
from rt.bench.gpu_parts.table import text
from rt.bench.record import RESULTS
from rt.errors import ConfigError, RtError


@click.command()
@click.option(
    "--plan",
    type=click.Choice([*PLANS]),
    help="Which parts, in which order, in how many minutes.  [default: all]",
)
@click.option("--only", multiple=True, metavar="PART", help="This part; may be repeated.")
@click.option(
    "--resume", is_flag=True, help="Go on with the newest record of this GPU; what is done is kept."
)
@click.option("--dry", is_flag=True, help="At tiny size on the CPU; writes nothing unless --out is given.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="A part that would not fit any more is skipped.  [default: the plan's, or 25]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the record.  [default: bench/results]"
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=Path("out/gpu"),
    show_default=True,
    help="For bundles, compilers' caches and logs.",
)
@click.option(
    "--packages",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of packages that were compiled elsewhere, for the parts that measure them.",
)
@click.option(
    "--prepare",
    type=click.Path(path_type=Path, file_okay=False),
    help="Compile packages for compute capability 9.0 into this folder, without a GPU, and end.",
)
def command(
    plan: str | None,
    only: tuple[str, ...],
    resume: bool,
    dry: bool,
    minutes: float | None,
    out: Path | None,
    scratch: Path,
    packages: Path | None,
    prepare: Path | None,
) -> None:
    """Check and time everything on the GPU of this machine."""
    try:
        if prepare is not None:
            _prepare(prepare)
            return
        parts = _parts(plan, only)
        context = Context(
            dry=dry,
            scratch=scratch.absolute(),
            seed=secrets.randbits(32),
            packages=packages and packages.absolute(),
        )
        with Processes() as processes:
            found = find_gpu(context, processes)
            folder = out or (None if dry else RESULTS)
            run = _run(found, context, folder if resume else None)

            def keep(run: Run) -> None:
                if folder:
                    run.save(folder)

            run = run_parts(
                parts,
                replace(context, seed=run.seed),
                run,
                processes=processes,
                minutes=minutes or PLANS[plan or "all"].minutes,
                log=(folder or context.scratch / "logs") / f"{run.stem}.log",
                keep=keep,
                say=click.echo,
            )
    except RtError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"\n{text(run)}")
    if folder:
        click.echo(f"\n{run.save(folder)}")


def _parts(plan: str | None, only: Sequence[str]) -> list[Part]:
    """Those that are wanted, in order.

    Raises:
        ConfigError: Both a plan and parts, or no part of that name.
    """
    if plan and only:
        raise ConfigError("--plan says which parts, and so does --only; leave one of them out")
    if only:
        return choose(PARTS, only)
    named = {part.name: part for part in PARTS}
    return [named[name] for name in PLANS[plan or "all"].parts]


def _run(found: Found, context: Context, resumed: Path | None) -> Run:
    """A new one, or the newest in that folder or in the checkout."""
    older = newest((RESULTS, resumed), found.gpu) if resumed else None
    if resumed and not older:
        click.echo("no record of this GPU with these versions to go on with: a new one")
    return older or Run(provenance=found.provenance, gpu=found.gpu, seed=context.seed)


def _prepare(folder: Path) -> None:
    """What a GPU's first minutes are too good for."""
    from rt.bench.stand_in_gpu.packages import prepare

    for described in prepare(folder, PREPARED):
        click.echo(json.dumps(described))


if __name__ == "__main__":
    # Python puts the folder of a script first, where `markdown` or `record` would stand for any package of that name.
    sys.path[:] = [
        path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent
    ]
    command()
