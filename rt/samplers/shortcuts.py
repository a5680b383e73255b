"""Steps that cost less, at the price of another picture; which of them do is part of the schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rt.errors import ConfigError
from rt.samplers.table import Schedule


def shorten(
    schedule: Schedule, *, guidance_interval: tuple[float, float] = (0.0, 1.0), step_cache: int = 1
) -> Schedule:
    """The schedule with the columns `guided` and `full` filled.

    Args:
        schedule: N rows.
        guidance_interval: Start and stop in parts of the schedule: row i is guided if start ≤ (i + ½) / N < stop, the
            others follow the prompt alone, at half batch. Kynkäänniemi et al., https://arxiv.org/abs/2404.07724.
        step_cache: Of so many rows one is full, the others reuse its deep features. The first row is full, and so is
            the first of each stretch with guidance or without. Ma et al., https://arxiv.org/abs/2312.00858.

    Raises:
        ConfigError: The interval holds no row.
    """
    start, stop = guidance_interval
    places = (np.arange(len(schedule)) + 0.5) / len(schedule)
    guided = (start <= places) & (places < stop)
    if not guided.any():
        raise ConfigError(
            f"guidance_interval {start:g} to {stop:g} holds none of the {len(schedule)} steps: make it wider, "
            f"or turn guidance off with guidance_scale 1"
        )
    rows = np.arange(len(schedule))
    begins = np.concatenate([[True], guided[1:] != guided[:-1]])
    since = rows - np.maximum.accumulate(np.where(begins, rows, 0))
    return replace(schedule, guided=guided, full=since % step_cache == 0)
