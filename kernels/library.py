"""Compile every kernel's workloads for the C library: `python -m rt.kernels.library FOLDER`, which CMake runs.

    cubin/*.cubin   the machine code, an image a set of compile-time constants, data type and architecture
    cubins.S        embeds them
    table.c         says what they are (`rt.kernels.c_table`)
    rt_ops.h        the C functions of the operators
    manifest.json   the same table as `KernelImage` records; written last, so a folder without it is not finished

The same sources give the same bytes. A folder whose manifest names the sources at hand is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

import rt.expression
import rt.kernel_image
from rt.errors import ConfigError, RtError
from rt.kernels import c_table, registry
from rt.kernels.c_table import LibraryImage
from rt.kernels.spec import Case, KernelSpec

CAPABILITIES = (80, 89, 90, 120)
"""All that `rt.kernels.aot` compiles for; named here, too, because that module needs Triton."""
GENERATED = ("cubins.S", "table.c", "rt_ops.h", "manifest.json")


@dataclass(frozen=True, kw_only=True)
class Job:
    """An image to compile: a kernel, the workloads that need it, and an architecture."""

    kernel: str
    workloads: tuple[str, ...]
    capability: int

    @property
    def case(self) -> Case:
        """Any of its workloads: they differ in sizes that the image leaves open."""
        return registry.spec(self.kernel).workloads[self.workloads[0]]


def jobs(specs: Mapping[str, KernelSpec], capabilities: Sequence[int]) -> list[Job]:
    """What the library holds: workloads with the same compile-time constants share an image.

    Raises:
        BackendUnavailableError: Without Triton.
        ConfigError: For a capability that kernels are not compiled for.
    """
    from rt.kernels import aot

    unknown = sorted({*capabilities} - {*aot.CAPABILITIES})
    if unknown:
        raise ConfigError(f"no kernels for compute capability {unknown}; valid: {[*aot.CAPABILITIES]}")
    shared: dict[str, Job] = {}
    for spec in specs.values():
        for capability in capabilities:
            for workload, case in spec.workloads.items():
                name = aot.image_name(spec, case, capability)
                before = shared[name].workloads if name in shared else ()
                shared[name] = Job(kernel=spec.name, workloads=(*before, workload), capability=capability)
    return [shared[name] for name in sorted(shared)]


def compile_job(job: Job) -> tuple[LibraryImage, bytes]:
    """The image and its cubin."""
    from rt.kernels.aot import compile_case

    workloads = registry.spec(job.kernel).workloads
    compiled = compile_case(registry.spec(job.kernel), job.case, job.capability)
    sizes = {name: dict(workloads[name].sizes) for name in job.workloads}
    entry = LibraryImage(
        image=compiled.image, dtype=job.case.dtype, cubin_bytes=len(compiled.cubin), workloads=sizes
    )
    return entry, compiled.cubin


def source_digest(capabilities: Sequence[int]) -> str:
    """Of everything that the library is made from: our sources, the compiler's version, the architectures."""
    paths = [
        *Path(__file__).parent.glob("*.py"),
        Path(rt.expression.__file__),
        Path(rt.kernel_image.__file__),
    ]
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "none"
    digest = hashlib.sha256(repr([compiler, sorted(capabilities)]).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`, empty where there is none."""
    path = folder / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return manifest


def build(folder: Path, capabilities: Sequence[int], processes: int) -> list[LibraryImage]:
    """Compile everything into `folder` in so many `processes`, unless it holds the same already.

    Raises:
        BackendUnavailableError: Without Triton.
        ConfigError: For a capability that kernels are not compiled for.
        BuildError: When a kernel does not compile.
    """
    digest = source_digest(capabilities)
    manifest = read_manifest(folder)
    if manifest.get("source") == digest:
        for name in GENERATED:  # for make, which looks at the time alone
            (folder / name).touch()
        return [LibraryImage.from_json(entry) for entry in manifest["images"]]

    specs = registry.specs()
    wanted = jobs(specs, capabilities)
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "cubin", ignore_errors=True)
    (folder / "cubin").mkdir(parents=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        compiled = [*pool.map(compile_job, wanted)]
    entries = [entry for entry, _ in compiled]
    for entry, cubin in compiled:
        (folder / "cubin" / entry.image.file).write_bytes(cubin)
    (folder / "cubins.S").write_text(c_table.assembly(entries))
    (folder / "table.c").write_text(c_table.table(specs, entries))
    (folder / "rt_ops.h").write_text(c_table.header(specs, entries))
    manifest = {"source": digest, "images": [entry.to_json() for entry in entries]}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return entries


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--capability", "capabilities", type=int, multiple=True, default=CAPABILITIES, show_default=True
)
@click.option("--processes", type=int, default=os.cpu_count() or 1, help="[default: one a core]")
def command(folder: Path, capabilities: tuple[int, ...], processes: int) -> None:
    """Compile the GPU kernels into FOLDER, for GPUs of each --capability (90 for 9.0)."""
    try:
        entries = build(folder, sorted({*capabilities}), processes)
    except RtError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(
        f"{len(entries)} kernels for {', '.join(f'sm_{c}' for c in sorted({*capabilities}))} in {folder}"
    )


if __name__ == "__main__":
    command()
