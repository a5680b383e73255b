"""Every kernel and case against its reference: `python -m rt.kernels.check [KERNEL...]`.

On a GPU, or with TRITON_INTERPRET=1 on the CPU, where grids run block by block and only small cases are practical.
Values are drawn anew each run, from a seed that is printed.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from rt.errors import BackendUnavailableError, RtError
from rt.extras import needs
from rt.kernels import registry
from rt.kernels.spec import KernelSpec


def device() -> str:
    """Where kernels run.

    Raises:
        BackendUnavailableError: Without a GPU and without the interpreter.
    """
    with needs("gpu", "a GPU kernel"):
        import torch
        from triton import knobs

    if knobs.runtime.interpret:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    raise BackendUnavailableError("no NVIDIA GPU here; set TRITON_INTERPRET=1 to run the kernels on the CPU")


def forms(spec: KernelSpec, where: str) -> tuple[KernelSpec, ...]:
    """What of `spec` is held to the reference there: on a GPU what is compiled for it, in the interpreter all."""
    import torch

    if where == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return () if spec.descriptors and major < 9 else (spec.on(10 * major + minor),)
    return (spec,) if spec.hopper is None else (spec, spec.hopper)


def check(spec: KernelSpec, seed: int, where: str) -> Iterator[dict[str, Any]]:
    """A record a case; a case that raises has failed, and the rest still run."""
    from rt.kernels.launch import try_case

    for case in spec.cases:
        start = time.perf_counter()
        record: dict[str, Any] = {"kernel": spec.name, "case": str(case), "error": None, "tolerance": None}
        try:
            outcome = try_case(spec, case, seed, where)
        except Exception as error:  # whatever a compiler or a driver throws
            record |= {"passed": False, "note": f"{type(error).__name__}: {error}"}
        else:
            note = f"wrote beyond {', '.join(outcome.broken)}" if outcome.broken else ""
            record |= {"error": outcome.error, "tolerance": outcome.tolerance}
            record |= {"passed": outcome.passed, "note": note}
        yield record | {"seconds": time.perf_counter() - start}


def line(record: dict[str, Any]) -> str:
    """`ok   group_norm  float16 batch=2 …  4.1e-04 of 1.0e-03`."""
    numbers = "" if record["error"] is None else f"  {record['error']:.1e} of {record['tolerance']:.0e}"
    state = "ok  " if record["passed"] else "FAIL"
    return f"{state} {record['kernel']:16}  {record['case']}{numbers}  {record['note']}".rstrip()


@click.command()
@click.argument("kernels", nargs=-1)
@click.option("--seed", type=int, help="[default: a new one]")
@click.option("--json", "as_json", is_flag=True, help="A JSON object a line.")
def command(kernels: tuple[str, ...], seed: int | None, as_json: bool) -> None:
    """Hold KERNELS, all if none is named, to their references."""
    try:
        where = device()
        chosen = [registry.spec(name) for name in kernels or (*registry.NAMES, *registry.DESCRIBED)]
    except RtError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    seed = secrets.randbits(31) if seed is None else seed
    click.echo(f"seed {seed} on {where}", err=True)
    failed = 0
    held = [form for spec in chosen for form in forms(spec, where)]
    for spec in held:
        for record in check(spec, seed, where):
            click.echo(json.dumps(record) if as_json else line(record))
            failed += not record["passed"]
    if failed:
        click.echo(f"error: {failed} of {sum(len(spec.cases) for spec in held)} cases failed", err=True)
        sys.exit(1)


if __name__ == "__main__":
    command()
