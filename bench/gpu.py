"""Everything about one GPU: `python bench/gpu.py` in a checkout, or `python -m rt.bench.gpu`.

    python bench/gpu.py                      the parts that fit into 25 minutes, in their order
    python bench/gpu.py --only sd15          one part with the builds that it needs; may be repeated
    python bench/gpu.py --resume             what the newest record of this GPU lacks; where a command has to end in
                                             ten minutes, --minutes 9 --resume again and again does all
    python bench/gpu.py --dry                every part at tiny size on the CPU, in some minutes; measures nothing

Each part has a process of its own and writes what it finds into one record as it goes. At the end stands which aims
were reached. Needed are torch, triton, onnx, numpy, cuda-bindings and, of pure Python, what the extra `build` has. In a
checkout `pip install --no-deps --no-build-isolation -e .` installs rt without a network: records and the commit are the
checkout's. Afterwards `python -m rt.bench.tables` puts the figures into `docs/benchmarks.md`, and
`python -m rt.bench.gpu_parts.plot` draws them.
"""

from __future__ import annotations

import secrets
import sys
from dataclasses import replace
from pathlib import Path

import click

from rt.bench.gpu_parts.part import Context, choose
from rt.bench.gpu_parts.parts import PARTS
from rt.bench.gpu_parts.record import Run, newest
from rt.bench.gpu_parts.run import find_gpu, run_parts
from rt.bench.gpu_parts.table import text
from rt.bench.record import Provenance
from rt.errors import RtError


@click.command()
@click.option("--only", multiple=True, metavar="PART", help="This part; may be repeated.")
@click.option(
    "--resume", is_flag=True, help="Go on with the newest record of this GPU; what is done is kept."
)
@click.option("--dry", is_flag=True, help="At tiny size on the CPU; writes nothing unless --out is given.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=25.0,
    show_default=True,
    help="A part that would not fit any more is skipped.",
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
def command(
    only: tuple[str, ...], resume: bool, dry: bool, minutes: float, out: Path | None, scratch: Path
) -> None:
    """Check and time everything on the GPU of this machine."""
    folder = out or (None if dry else Path("bench/results"))
    try:
        parts = choose(PARTS, only)
        context = Context(dry=dry, scratch=scratch.absolute(), seed=secrets.randbits(32))
        gpu = find_gpu(context)
        found = newest(folder, gpu) if resume and folder else None
        if resume and not found:
            click.echo("no record of this GPU with these versions to go on with: a new one")
        run = found or Run(provenance=Provenance.now(), gpu=gpu, seed=context.seed)
        context = replace(context, seed=run.seed)

        def keep(run: Run) -> None:
            if folder:
                run.save(folder)

        run = run_parts(parts, context, run, minutes=minutes, keep=keep, say=click.echo)
    except RtError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"\n{text(run)}")
    if folder:
        click.echo(f"\n{run.save(folder)}")


if __name__ == "__main__":
    # Python puts the folder of a script first, where `markdown` or `record` would stand for any package of that name.
    sys.path[:] = [
        path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent
    ]
    command()
