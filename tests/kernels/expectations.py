"""Launches worked out in Python for the test of the C library: `expectations.py MANIFEST HEADER`, which CMake runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rt.expression import evaluate
from rt.kernel_image import KernelImage, integers
from rt.kernels import registry
from rt.kernels.c_table import LibraryImage

INT32_MAX = 2**31 - 1
GRID_LIMITS = (INT32_MAX, 65535, 65535)


def trials(entry: LibraryImage) -> Iterator[tuple[dict[str, int], bool]]:
    """Sizes, and whether they are a workload's: all workloads, then ragged, least and largest values of one."""
    for sizes in entry.workloads.values():
        yield dict(sizes), True
    workload, fixed = next(iter(entry.workloads.values())), entry.image.sizes
    for value in (1, 77, 65537, INT32_MAX, INT32_MAX + 1, 0, -5):
        yield {name: fixed.get(name, value) for name in workload}, False
    for name in workload:
        yield {**workload, name: workload[name] + 1}, False
        yield {**workload, name: INT32_MAX}, False


def expected(image: KernelImage, sizes: dict[str, int]) -> tuple[str, tuple[int, ...], list[int]]:
    """Status, grid and scalars of a launch."""
    wrong = any(not 1 <= value <= INT32_MAX for value in sizes.values())
    if wrong or any(sizes[name] != value for name, value in image.sizes.items()):
        return "RT_BAD_SIZE", (0,), [0]
    grid, scalars = image.launch_grid(sizes), image.scalar_values(sizes)
    fits = all(1 <= blocks <= most for blocks, most in zip(grid, GRID_LIMITS, strict=True))
    names = {**integers(image.constants), **sizes}
    fits &= all(evaluate(text, names) <= INT32_MAX for text in registry.spec(image.kernel).bounds)
    if not fits or any(not -INT32_MAX - 1 <= value <= INT32_MAX for value in scalars):
        return "RT_BAD_SIZE", (0,), [0]
    return "RT_OK", grid, scalars or [0]


def braces(values: object) -> str:
    return "{" + ", ".join(map(str, values)) + "}"  # type: ignore[call-overload]


def header(entries: list[LibraryImage]) -> str:
    """C text."""
    capabilities = sorted({entry.image.capability for entry in entries})
    lines = [f"static const int capabilities[] = {braces(capabilities)};"]
    lines.append("static const expectation expectations[] = {")
    for entry in entries:
        for sizes, tuned in trials(entry):
            status, grid, scalars = expected(entry.image, sizes)
            row = [json.dumps(entry.image.name), braces(f"INT64_C({size})" for size in sizes.values())]
            lines.append(f"    {braces([*row, status, braces(grid), braces(scalars), int(tuned)])},")
    return "\n".join([*lines, "};", ""])


if __name__ == "__main__":
    manifest, destination = map(Path, sys.argv[1:])
    images = json.loads(manifest.read_text())["images"]
    destination.write_text(header([LibraryImage.from_json(image) for image in images]))
