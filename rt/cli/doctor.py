"""`rt doctor`: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

import rt
from rt.backends import BACKENDS
from rt.backends.native import BUILD, gpu_images, kernels
from rt.config import DType
from rt.extras import install_line, packages
from rt.machine import Machine


@click.command(short_help="Say what is installed and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """Report processor, memory, engines and packages, with the command that installs what is missing."""
    report = _report()
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(_lines(report)))


def _report() -> dict[str, Any]:
    machine = Machine.here()
    return {
        "rt": rt.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": {"name": machine.processor, "cores": machine.cores, "memory_gib": machine.memory_gib},
        "engines": {
            name: {
                "version": backend.available().version,
                "problem": backend.available().problem,
                "computes": {d.value: backend.refuses(d) or backend.arithmetic(d) for d in DType},
            }
            for name, backend in BACKENDS.items()
        },
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
        f"{cpu['name']}, {cpu['cores']} cores, {cpu['memory_gib']} GiB",
    ]
    for name, engine in report["engines"].items():
        if engine["problem"]:
            lines.append(f"missing  {name}: {engine['problem']}")
            continue
        lines.append(f"ok       {name} {engine['version']}")
        lines += [f"           {dtype}: {how}" for dtype, how in engine["computes"].items()]
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


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
