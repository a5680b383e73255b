"""Every kernel's test cases, on fresh inputs, held to their references.

In a dry run Triton interprets the smallest case of each kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import find
from rt.kernels import registry
from rt.kernels.check import check


def run(context: Context) -> Iterator[Figures]:
    """See the module. `cases`, a row a case, also where it raises; kernels in `context.before` are not run again."""
    place = find(context)
    cases: list[dict[str, Any]] = [*context.before.get("cases", [])]
    known = {row["kernel"] for row in cases}
    for spec in registry.specs().values():
        if spec.name in known:
            continue
        if context.dry:
            spec = replace(spec, cases=(min(spec.cases, key=spec.bytes),))
        cases += check(spec, context.seed, place.device.type)
        yield {"cases": cases}
    yield {"cases": cases}  # also where none was left
