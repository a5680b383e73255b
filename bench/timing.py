"""Wall clock: repeated calls, their percentiles, and a yardstick for how busy the machine was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rt.backends import Engine

_GEMM_SIZE = 1536


@dataclass(frozen=True)
class Samples:
    """Seconds of repeated calls, in the order in which they were taken."""

    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """Linear between the two nearest samples."""
        return float(np.percentile(self.seconds, q))

    @property
    def median(self) -> float:
        """Half of the calls took longer."""
        return self.percentile(50)

    @property
    def p90(self) -> float:
        """One call of ten took longer."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """One call of a hundred took longer; with fewer samples it leans on the slowest."""
        return self.percentile(99)

    def to_json(self) -> dict[str, Any]:
        """The samples, with the percentiles for whoever reads the file; `from_json` is the inverse."""
        return {"median_s": self.median, "p90_s": self.p90, "p99_s": self.p99, "seconds": list(self.seconds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Samples:
        """From what `to_json` gave."""
        return cls(tuple(data["seconds"]))


def elapsed(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def watching(engine: Engine) -> Iterator[list[float]]:
    """Collects the seconds of each `enqueue` of `engine` inside the block."""
    seconds: list[float] = []
    enqueue = engine.enqueue

    def timed() -> None:
        seconds.append(elapsed(enqueue))

    engine.enqueue = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        engine.enqueue = enqueue  # type: ignore[method-assign]


def interleave(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Samples]:
    """Call each in turn, beginning with another one each round, so that noise hits all alike.

    Args:
        calls: Name → what runs once and returns its seconds.
        rounds: Samples of each.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(calls[name]())
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What numpy's float32 matrix product reached around a measurement; a drop says that it was disturbed."""

    before_gflops: float
    after_gflops: float

    def __str__(self) -> str:
        return f"float32 GEMM {self.before_gflops:.0f} GFLOP/s before, {self.after_gflops:.0f} after"


def gemm_gflops(size: int = _GEMM_SIZE) -> float:
    """Best of three products of two (size, size) matrices."""
    a = np.random.default_rng(0).standard_normal((size, size), np.float32)
    out = np.empty_like(a)
    best = min(elapsed(lambda: np.dot(a, a, out=out)) for _ in range(3))
    return 2 * size**3 / best / 1e9
