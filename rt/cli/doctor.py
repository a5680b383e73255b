"""`rt doctor`: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

import rt
from rt.backends import BACKENDS, Backend, DeviceBackend
from rt.backends.native import BUILD, gpu_images, kernels
from rt.backends.ort_gpu import wheels_problem
from rt.config import BuildConfig, DType
from rt.errors import BackendError
from rt.extras import install_line, needs, packages
from rt.machine import Machine
from rt.processors import Processors
from rt.shapes import ShapeProfile


@click.command(short_help="Say what is installed and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option(
    "--selftest", "run", is_flag=True, help="Build a small network and run it with every engine here."
)
def command(as_json: bool, run: bool) -> None:
    """Report processor, memory, engines and packages, with the command that installs what is missing.

    With --selftest also build a small network for every engine, with our GPU kernels where TensorRT takes them, run it
    and compare it with torch; the exit code is 1 when something is wrong.
    """
    report = _report()
    if not as_json:
        click.echo("\n".join(_lines(report)))
    failed = _selftest(report, echo=not as_json) if run else []
    if as_json:
        click.echo(json.dumps(report, indent=1))
    if failed:
        raise BackendError(f"the self-test found faults: {'; '.join(failed)}")


def _selftest(report: dict[str, Any], *, echo: bool) -> list[str]:
    """Run it, print each line as it comes, put all into the report; gives what failed."""
    with needs("build", "rt doctor --selftest"):
        from rt.export.selftest import selftest
    outcomes = report["selftest"] = []
    failed = []
    for outcome in selftest():
        outcomes.append(asdict(outcome))
        if echo:
            click.echo("\n".join(outcome.lines()))
        if outcome.failed:
            failed.append(" ".join(filter(None, (outcome.backend, outcome.dtype, outcome.form))))
    return failed


def _report() -> dict[str, Any]:
    machine, processors = Machine.here(), Processors.here()
    return {
        "rt": rt.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": {
            "name": machine.processor,
            "cores": machine.cores,
            "use": str(processors),
            "threads": processors.threads,
            "memory_gib": machine.memory_gib,
        },
        "engines": {
            name: {
                "version": backend.available().version,
                "problem": backend.available().problem,
                "computes": {d.value: backend.refuses(d) or backend.arithmetic(d) for d in DType},
                "build_problem": _build_problem(backend),
            }
            for name, backend in BACKENDS.items()
        },
        "conflict": wheels_problem(),
        "kernels": {"instruction_set": kernels().instruction_set, "problem": kernels().problem},
        "gpu_kernels": gpu_images(),
        "extras": {
            extra: {
                "missing": [p for p in packages(extra) if not _installed(p)],
                "install": install_line(extra),
            }
            for extra in ("build", "plot")
        },
    }


def _lines(report: dict[str, Any]) -> list[str]:
    cpu = report["processor"]
    lines = [
        f"rt {report['rt']}, Python {report['python']}, {report['system']}",
        f"{cpu['name']}, {cpu['use']}, {cpu['memory_gib']} GiB",
    ]
    for name, engine in report["engines"].items():
        if engine["problem"]:
            state = "unused " if engine["version"] else "missing"
            lines.append(f"{state}  {name}: {engine['problem']}")
            continue
        lines.append(f"ok       {name} {engine['version']}")
        lines += [f"           {dtype}: {how}" for dtype, how in engine["computes"].items()]
        if engine["build_problem"]:
            lines.append(f"           rt build: {engine['build_problem']}")
    if report["conflict"]:
        lines.append(f"problem  {report['conflict']}")
    native = report["kernels"]
    if native["problem"]:
        lines.append(f"unused   native kernels: {native['problem']}")
    else:
        lines.append(f"ok       native kernels: {native['instruction_set']}")
    if report["gpu_kernels"]:
        lines.append(f"ok       GPU kernels for C and C++: {report['gpu_kernels']}")
    else:
        lines.append(f"unused   GPU kernels for C and C++: not built; in a checkout run: {BUILD}")
    for extra, state in report["extras"].items():
        use = {"build": "rt build", "plot": "rt bench --plot"}[extra]
        if state["missing"]:
            lines.append(f"missing  for {use}: {', '.join(state['missing'])}; run: {state['install']}")
        else:
            lines.append(f"ok       everything for {use}")
    return lines


def _build_problem(backend: Backend) -> str:
    """Why nothing can be built here for a backend that runs on a GPU, or "" where it can, or cannot be known."""
    if not isinstance(backend, DeviceBackend) or not backend.available():
        return ""
    if not all(map(_installed, packages("build"))):
        return ""  # which is said elsewhere
    from rt.export.forms import Request
    from rt.export.target import refusal

    config = BuildConfig(profiles=(ShapeProfile(512, 512),), dtype=DType.FP16, backend=backend.name)
    return refusal(backend, Request(stage=Path(), config=config))


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
