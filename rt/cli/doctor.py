"""`rt doctor`: what this machine has, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

import rt
from rt.backends import BACKENDS, cpu_count
from rt.config import DType
from rt.extras import install_line, packages


@click.command(short_help="Say what is installed and what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> None:
    """Report processor, memory, engines and packages, with the command that installs what is missing."""
    report = _report()
    click.echo(json.dumps(report, indent=1) if as_json else "\n".join(_lines(report)))


def _report() -> dict[str, Any]:
    return {
        "rt": rt.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": {"name": _processor(), "cores": cpu_count(), "memory_gib": round(_memory_gib(), 1)},
        "engines": {
            name: {
                "version": backend.available().version,
                "problem": backend.available().problem,
                "computes": {d.value: backend.refuses(d) or backend.arithmetic(d) for d in DType},
            }
            for name, backend in BACKENDS.items()
        },
        "extras": {
            extra: {"missing": [p for p in packages(extra) if not _installed(p)], "install": install_line(extra)}
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


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30

