"""Programs compiled for an H200 here, to be timed on one: `python -m rt.bench.stand_in_gpu.packages FOLDER NAME…`.

A package is bound to the minor version of torch that compiled it, so this runs under the one that the GPU's machine
has. Weights are not there, and what of them is so small that it is written into the code is made up: a package says how
long its program takes, and nothing of what it computes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from rt.backends import Form
from rt.bench.record import publish
from rt.bench.stand_in_gpu.gpu import H200, install
from rt.bench.stand_in_gpu.launches import counting
from rt.bench.stand_in_gpu.programs import PROGRAMS, lowered
from rt.bench.stand_in_gpu.table import KIND
from rt.errors import ConfigError, nearest
from rt.export.candidates import first
from rt.export.inductor import write_package
from rt.export.operators import ops

INPUTS, COUNTED = "inputs.json", "launches.json"


def prepare(folder: Path, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Write each program of `PROGRAMS`, or those named, into a folder of its own below `folder`.

    Beside the package lie `inputs.json`, name, shape and format of each input in order, and `launches.json`, what is
    given here, too.

    Raises:
        ConfigError: There is no program of that name.
    """
    for name in names:
        if name not in PROGRAMS:
            raise ConfigError(
                f"no program {name!r}{nearest(name, PROGRAMS)}; there are: {', '.join(PROGRAMS)}"
            )
    mode = install()
    for name in names or PROGRAMS:
        started = time.perf_counter()
        place = folder / name
        (place / "engines").mkdir(parents=True, exist_ok=True)
        program, module = lowered(PROGRAMS[name], mode)
        with mode, counting() as counted:
            path = place / "engines" / f"{program.name}.{Form.INDUCTOR.value}"
            choose = prefer_fused if PROGRAMS[name].fused else first
            write_package(path, "cuda", program, module, file="", place=lambda tensor: 0, choose=choose)
        described = {
            "program": name,
            "gpu": H200.name,
            "torch": torch.__version__,
            "launches": counted.total,
            "launches_by_kind": dict(counted.launches.most_common()),
            "mib": round(sum(counted.mib.values()), 1),
            "mib_by_kind": {kind: round(mib, 1) for kind, mib in sorted(counted.mib.items())},
            "package_mib": round(path.stat().st_size / 2**20, 2),
            "seconds": round(time.perf_counter() - started, 1),
        }
        inputs = [
            [key, list(value.shape), str(value.dtype).removeprefix("torch.")]
            for key, value in program.inputs.items()
        ]
        (place / INPUTS).write_text(json.dumps({"inputs": inputs}) + "\n")
        (place / COUNTED).write_text(json.dumps(described, indent=1) + "\n")
        yield described


def prefer_fused(operator: Any, arguments: Sequence[Any], candidates: Mapping[str, Any]) -> str:
    """See `rt.export.candidates.Choose`: kernels of ours in which a linear layer is merged with what follows."""
    merged = operator in (ops.geglu_linear.default, ops.query_attention.default)
    return [*candidates][-1] if merged else first(operator, arguments, candidates)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1)
@click.option("--record", is_flag=True, help="Keep what was counted in bench/results.")
def command(folder: Path, names: tuple[str, ...], record: bool) -> None:
    """See the module."""
    programs = []
    for described in prepare(folder, names):
        programs.append(described)
        click.echo(json.dumps(described))
    if record:
        click.echo(publish(KIND, {"kind": KIND, "programs": programs}))


if __name__ == "__main__":
    command()
