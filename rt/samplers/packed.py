"""Schedules as the arrays that a loop on a GPU reads: one table for all rows of a batch, each with its own sampler.

A row of a `Schedule` refers to x_i, x_{i−1} … and h_i, h_{i−1} …; in memory these stay where they are, in a ring of
`RING_X` and a ring of `RING_H` arrays, and the coefficients move around the rings (`ring_weights`).
rt/kernels/guide_and_step.py has the layout of the columns a second time, because kernels import nothing from here; a
test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rt.errors import ConfigError
from rt.samplers.noise_schedule import Floats32
from rt.samplers.table import HISTORY, SAMPLES, Schedule

RING_X = SAMPLES + 1
"""Arrays for x: x_{i+1} must not replace any that row i reads."""
RING_H = HISTORY
"""Arrays for h, which follow those for x."""


@dataclass(frozen=True)
class Columns:
    """Where each coefficient of a step stands."""

    guidance: int = 0
    """g of this step: 1, the prompt alone, where guidance does not act."""
    rescale: int = 1
    """φ of this step, 0 where guidance does not act."""
    p: int = 2
    q: int = 3
    n: int = 4
    feed: int = 5
    """c_in of the next step; 1 after the last one, which leaves the latents themselves."""
    weights: int = 6
    """The first of `RING_X` weights of x and then `RING_H` of h, by place in the ring."""
    count: int = 6 + RING_X + RING_H


COLUMNS = Columns()


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSchedules:
    """What the kernels of the loop read of R rows, with room for N steps each.

    Attributes:
        table: (R, N, COLUMNS.count), zeros beyond the length of a row.
        length: (R,) int32, steps of a row; 0 where there is none.
        feed: (R,) c_in of the first step.
    """

    table: Floats32
    length: NDArray[np.int32]
    feed: Floats32


def ring_weights(schedule: Schedule) -> Floats32:
    """(N, RING_X + RING_H): the rows of a and b, by place in the ring: x_i is at i mod RING_X."""
    steps = np.arange(len(schedule))
    weights = np.zeros((len(schedule), RING_X + RING_H), np.float32)
    for k in range(schedule.a.shape[1]):
        weights[steps, (steps - k) % RING_X] = schedule.a[:, k]
    for k in range(schedule.b.shape[1]):
        weights[steps, RING_X + (steps - k) % RING_H] = schedule.b[:, k]
    return weights


def set_apart(schedule: Schedule, weights: Floats32, position: int) -> bool:
    """Before a caller writes over x_i: let an `unsteered` row i read its own from the place of x_{i+1}.

    Nothing else that row i reads is there, and it is overwritten when the row is done.

    Args:
        schedule: N steps.
        weights: (N, RING_X + RING_H or more) as `ring_weights` gives them, changed in place.
        position: i.

    Returns:
        Whether x_i is to be copied there: not in other rows, not where it has no weight, not a second time.
    """
    here, spare = position % RING_X, (position + 1) % RING_X
    if position == len(schedule) or not schedule.unsteered[position] or weights[position, here] == 0:
        return False
    weights[position, spare], weights[position, here] = weights[position, here], 0
    return True


def pack_row(schedule: Schedule, *, guidance_scale: float = 1.0, guidance_rescale: float = 0.0) -> Floats32:
    """The table of one row (N, COLUMNS.count).

    Args:
        schedule: N steps.
        guidance_scale: Where the schedule is guided; 1 in a run without guidance.
        guidance_rescale: φ of https://arxiv.org/abs/2305.08891, 3.4, where it is guided.
    """
    table = np.empty((len(schedule), COLUMNS.count), np.float32)
    table[:, COLUMNS.guidance] = np.where(schedule.guided, guidance_scale, 1.0)
    table[:, COLUMNS.rescale] = np.where(schedule.guided, guidance_rescale, 0.0)
    table[:, COLUMNS.p] = schedule.p
    table[:, COLUMNS.q] = schedule.q
    table[:, COLUMNS.n] = schedule.n
    table[:, COLUMNS.feed] = np.append(schedule.c_in[1:], np.float32(1))
    table[:, COLUMNS.weights :] = ring_weights(schedule)
    return table


def pack(
    schedules: Sequence[Schedule | None],
    *,
    guidance_scale: Sequence[float],
    guidance_rescale: Sequence[float] | None = None,
    steps: int | None = None,
) -> PackedSchedules:
    """All rows of a batch; arguments have an entry a row.

    Args:
        schedules: None for a row that draws nothing.
        guidance_scale: See `pack_row`.
        guidance_rescale: See `pack_row`; 0 by default.
        steps: N, the longest schedule by default.

    Raises:
        ConfigError: A schedule has more than N steps.
    """
    rescale = guidance_rescale if guidance_rescale is not None else [0.0] * len(schedules)
    length = np.array([0 if schedule is None else len(schedule) for schedule in schedules], np.int32)
    longest = int(length.max(initial=0))
    room = longest if steps is None else steps
    if longest > room:
        raise ConfigError(
            f"a schedule has {longest} steps, but the loop has room for {room}: ask for fewer steps, or make more room"
        )
    table = np.zeros((len(schedules), room, COLUMNS.count), np.float32)
    feed = np.ones(len(schedules), np.float32)
    for row, (schedule, scale, phi) in enumerate(zip(schedules, guidance_scale, rescale, strict=True)):
        if schedule is not None:
            table[row, : len(schedule)] = pack_row(schedule, guidance_scale=scale, guidance_rescale=phi)
            feed[row] = schedule.c_in[0]
    return PackedSchedules(table=table, length=length, feed=feed)
