"""Which rows of a schedule are guided, and which run the whole network."""

from __future__ import annotations

import numpy as np
import pytest

from rt.errors import ConfigError
from rt.samplers import Schedule, Scheduler, shorten


def schedule(steps: int = 10) -> Schedule:
    return Scheduler.from_config({"_class_name": "DDIMScheduler"}, "ddim").schedule(steps)


def marks(column: np.ndarray) -> str:
    return "".join("x" if row else "." for row in column)


def test_nothing_is_left_out_unless_asked() -> None:
    for each in (schedule(), shorten(schedule())):
        assert each.guided.all() and each.full.all() and len(each.guided) == len(each.full) == 10


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0.2, 0.8, "..xxxxxx.."),
        (0, 0.5, "xxxxx....."),
        (0.5, 1, ".....xxxxx"),
        (0.24, 0.26, "..x......."),
        (0, 1, "xxxxxxxxxx"),
    ],
)
def test_a_row_is_guided_if_its_middle_is_inside(start: float, stop: float, expected: str) -> None:
    assert marks(shorten(schedule(), guidance_interval=(start, stop)).guided) == expected


@pytest.mark.parametrize(
    ("every", "expected"), [(1, "xxxxxxxxxx"), (2, "x.x.x.x.x."), (3, "x..x..x..x"), (50, "x.........")]
)
def test_one_row_of_so_many_is_full(every: int, expected: str) -> None:
    assert marks(shorten(schedule(), step_cache=every).full) == expected


def test_where_guidance_begins_and_ends_a_row_is_full() -> None:
    both = shorten(schedule(), guidance_interval=(0.2, 0.7), step_cache=3)
    assert marks(both.guided) == "..xxxxx..."
    assert marks(both.full) == "x.x..x.x.."


def test_the_sampler_stays_as_it_is() -> None:
    before, after = schedule(), shorten(schedule(), guidance_interval=(0.2, 0.7), step_cache=3)
    for name in ("timesteps", "c_in", "p", "q", "a", "b", "n"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    with pytest.raises(ValueError, match="read-only"):
        after.full[0] = False


def test_an_interval_without_a_step_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^guidance_interval 0.4 to 0.45 holds none of the 4 steps: make it wider"
    ):
        shorten(schedule(4), guidance_interval=(0.4, 0.45))
