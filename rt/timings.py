"""Where the time of a call went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, eq=False)
class Timings:
    """Wall clock of one call, in seconds; `steps` counts calls of the U-Net.

    `load_s` is what the first call at a size spends on loading its engines; it is part of no other stage.
    """

    load_s: float
    text_s: float
    denoise_s: float
    decode_s: float
    total_s: float
    steps: int


class Stopwatch:
    """Seconds by stage, from when it is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = {"load": 0.0, "text": 0.0, "denoise": 0.0, "decode": 0.0}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what is done inside as time of that stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - started

    def timings(self, steps: int) -> Timings:
        """Until now."""
        return Timings(
            **{f"{stage}_s": seconds for stage, seconds in self._seconds.items()},
            total_s=time.perf_counter() - self._started,
            steps=steps,
        )
