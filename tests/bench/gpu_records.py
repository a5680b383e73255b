"""Records of the GPU benchmark as its tests make them."""

from __future__ import annotations

from typing import Any

from rt.bench.gpu_parts.record import DRY, Gpu, Outcome, Run, Status
from rt.bench.record import Provenance

H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=90,
    memory_gib=79.1,
    multiprocessors=132,
    l2_mib=50.0,
    versions={"torch": "2.13.0"},
)


def a_run(**parts: Outcome) -> Run:
    return Run(provenance=Provenance.now(), gpu=DRY, seed=7, parts=parts)


def outcome(status: Status = Status.DONE, **figures: Any) -> Outcome:
    return Outcome(status=status, date="2020-01-01", commit=None, figures=figures)
