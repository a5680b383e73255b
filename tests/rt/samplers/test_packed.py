"""The packed table against the schedules it was made of; tests/kernels runs it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rt.errors import ConfigError
from rt.samplers import SAMPLERS, Scheduler, shorten
from rt.samplers.packed import COLUMNS, RING_H, RING_X, pack, pack_row, ring_weights
from rt.samplers.table import HISTORY, SAMPLES

CONFIG = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}


def schedule_of(name, steps):
    return Scheduler.from_config(CONFIG, name).schedule(steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_weights_meet_their_sample_in_the_ring(name):
    """Slots that hold their own index: the weighted sum is that of the table."""
    schedule = schedule_of(name, 11)
    weights = ring_weights(schedule).astype(np.float64)
    for i in range(len(schedule)):
        ring = np.full(RING_X + RING_H, np.nan)
        for k in range(SAMPLES):
            ring[(i - k) % RING_X] = 1000 + i - k
        for k in range(HISTORY):
            ring[RING_X + (i - k) % RING_H] = 2000 + i - k
        free = np.isnan(ring)
        assert free.sum() == 1 and free[(i + 1) % RING_X]
        assert not weights[i, free].any()
        expected = schedule.a[i].astype(np.float64) @ (1000 + i - np.arange(SAMPLES))
        expected += schedule.b[i].astype(np.float64) @ (2000 + i - np.arange(HISTORY))
        assert weights[i, ~free] @ ring[~free] == pytest.approx(expected, rel=1e-12)


def test_columns_are_a_partition():
    values = dataclasses.asdict(COLUMNS)
    count = values.pop("count")
    assert sorted(values.values()) == list(range(COLUMNS.weights + 1))
    assert count == COLUMNS.weights + RING_X + RING_H


def test_a_row():
    schedule = shorten(schedule_of("euler-a", 6), guidance_interval=(0.0, 0.5))
    table = pack_row(schedule, guidance_scale=7.5, guidance_rescale=0.7)
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table[:, COLUMNS.guidance], [7.5] * 3 + [1.0] * 3)
    np.testing.assert_array_equal(table[:, COLUMNS.rescale], np.float32([0.7] * 3 + [0.0] * 3))
    for name in ("p", "q", "n"):
        np.testing.assert_array_equal(table[:, getattr(COLUMNS, name)], getattr(schedule, name))
    np.testing.assert_array_equal(table[:-1, COLUMNS.feed], schedule.c_in[1:])
    assert table[-1, COLUMNS.feed] == 1
    assert schedule.c_in[0] != schedule.c_in[1]


def test_rows_of_different_lengths():
    short, long = schedule_of("lcm", 2), schedule_of("euler", 5)
    packed = pack([short, None, long], guidance_scale=[1.5, 9.0, 4.0])
    assert packed.table.shape == (3, 5, COLUMNS.count)
    np.testing.assert_array_equal(packed.length, [2, 0, 5])
    np.testing.assert_array_equal(packed.feed, [short.c_in[0], 1, long.c_in[0]])
    np.testing.assert_array_equal(packed.table[0, :2], pack_row(short, guidance_scale=1.5))
    np.testing.assert_array_equal(packed.table[2], pack_row(long, guidance_scale=4.0))
    assert not packed.table[0, 2:].any() and not packed.table[1].any()


def test_room_for_steps():
    assert pack([schedule_of("ddim", 3)], guidance_scale=[1.0], steps=8).table.shape[1] == 8
    with pytest.raises(
        ConfigError, match=r"^a schedule has 3 steps, but the loop has room for 2: ask for fewer"
    ):
        pack([schedule_of("ddim", 3)], guidance_scale=[1.0], steps=2)


def test_no_rows():
    assert pack([], guidance_scale=[]).table.shape == (0, 0, COLUMNS.count)


def test_the_kernel_has_the_same_layout():
    kernel = pytest.importorskip("rt.kernels.guide_and_step")
    for name, column in dataclasses.asdict(COLUMNS).items():
        assert getattr(kernel, "COLUMNS" if name == "count" else name.upper()).value == column
    assert (kernel.RING_X.value, kernel.RING_H.value) == (RING_X, RING_H)
