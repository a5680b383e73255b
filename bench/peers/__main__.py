"""All peers on one model: `python -m rt.bench.peers MODEL --rt NAME=BUNDLE`.

    rt build synthetic:sd15 --bf16 -o out/sd15
    python -m rt.bench.peers synthetic:sd15 --rt "rt bf16=out/sd15"

Each candidate has a process of its own; those that memory holds together are loaded together and called in turn.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import click

from rt.backends import cpu_count
from rt.bench.peers.candidate import ANCHOR, PEERS, choose, group, variant
from rt.bench.peers.checkpoint import diffusers_folder, weights_gib
from rt.bench.peers.compare import Plan, compare
from rt.bench.peers.comparison import Comparison
from rt.bench.peers.inputs import draw, picture_size
from rt.bench.peers.peer import PICTURE, TEXT, UNET, VAE, Setting
from rt.bench.peers.table import lines
from rt.bench.record import RESULTS, publish
from rt.errors import RtError


@click.command()
@click.argument("model")
@click.option(
    "--rt",
    "variants",
    multiple=True,
    metavar="NAME=BUNDLE[,KEYWORD=NUMBER...]",
    help="One of ours; may be repeated.",
)
@click.option("--only", multiple=True, metavar="NAME", help="This candidate and the anchor; may be repeated.")
@click.option("--skip", multiple=True, metavar="NAME", help="Not this candidate; may be repeated.")
@click.option(
    "--rounds", type=click.IntRange(0), default=5, show_default=True, help="Turns of each part of the model."
)
@click.option(
    "--pictures", type=click.IntRange(0), default=3, show_default=True, help="Turns of a whole picture."
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Of a picture.")
@click.option(
    "--turn-seconds", type=float, default=0.3, show_default=True, help="A turn repeats what is shorter."
)
@click.option(
    "--memory", type=float, help="GiB that candidates may hold at a time.  [default: 4/5 of what is free]"
)
@click.option("--threads", type=int, default=cpu_count(), show_default="all")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("out/peers"),
    show_default=True,
    help="For exported graphs.",
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the record.")
def command(
    model: str,
    variants: tuple[str, ...],
    only: tuple[str, ...],
    skip: tuple[str, ...],
    rounds: int,
    pictures: int,
    steps: int,
    turn_seconds: float,
    memory: float | None,
    threads: int,
    work: Path,
    out: Path,
) -> None:
    """Compare programs that run MODEL, a diffusers folder or synthetic:NAME."""
    try:
        candidates = choose([*map(variant, variants), *PEERS], only, skip)
        name = Path(model).name
        work = work.absolute() / name.replace(":", "-")
        checkpoint = diffusers_folder(model, work).absolute()
        turns = {**dict.fromkeys((TEXT, UNET, VAE), rounds), PICTURE: pictures}
        plan = Plan(turns={measure: n for measure, n in turns.items() if n}, turn_s=turn_seconds)
        comparison = Comparison(
            model=name,
            size=picture_size(checkpoint),
            steps=steps,
            threads=threads,
            seed=secrets.randbits(32),
            anchor=ANCHOR.name,
        )
        inputs = draw(checkpoint, count=max(*turns.values(), 1), steps=steps, seed=comparison.seed)
        setting = Setting(checkpoint=checkpoint, work=work, threads=threads)
        groups = group(candidates, weights_gib(checkpoint), memory or 0.8 * _free_gib())
        measured = [*(["parts"] if rounds else []), *([f"{steps}-step pictures"] if pictures else [])]
        for result in compare(groups, plan, inputs, setting, work / "logs"):
            comparison = comparison.add(result)
            # After each group, so that what ends a run does not take what was measured before.
            path = publish(" ".join(["peers", name, *measured, *only]), {"peers": comparison.to_json()}, out)
    except RtError as error:
        raise click.ClickException(str(error)) from error
    click.echo("\n".join([*lines(json.loads(path.read_text())), "", str(path)]))


def _free_gib() -> float:
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(info["MemAvailable"].split()[0]) / 2**20


if __name__ == "__main__":
    command()
