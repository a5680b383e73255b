"""`rt doctor --selftest` of the engines that run on a GPU: a small network by each, in each format, against torch.

In a dry run the best engine of the CPU, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rt.backends import AUTO, BACKENDS, DeviceBackend, choose
from rt.bench.gpu_parts.part import Context, Figures
from rt.bench.gpu_parts.place import find
from rt.config import DType
from rt.export.selftest import selftest


def run(context: Context) -> Iterator[Figures]:
    """See the module. `outcomes`, a row each."""
    find(context)
    if context.dry:
        outcomes = selftest([choose(AUTO, DType.FP32)[0]], (DType.FP32,))
    else:
        outcomes = selftest([each for each in BACKENDS.values() if isinstance(each, DeviceBackend)])
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        rows.append({**asdict(outcome), "passed": not outcome.failed})
        yield {"outcomes": rows}
