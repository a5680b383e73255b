"""Which program runs at each step, for one row and for rows that disagree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rt.model import Component
from rt.plan import PlannedStep, plan
from rt.samplers import Schedule, shorten

from .session_fakes import schedule_of


def schedule(steps: int, interval: tuple[float, float] = (0.0, 1.0), cache: int = 1) -> Schedule:
    return shorten(schedule_of("euler", steps), guidance_interval=interval, step_cache=cache)


def letters(steps: Sequence[PlannedStep]) -> str:
    """F and S for full and shallow with guidance, f and s without; a comma where features are handed over."""
    words = []
    for step in steps:
        letter = "F" if step.component is Component.UNET else "S"
        words.append(("," if step.takes_deep else "") + (letter if step.guided else letter.lower()))
    return "".join(words)


@pytest.mark.parametrize(
    ("schedules", "guided", "expected"),
    [
        ([schedule(4)], True, "FFFF"),
        ([schedule(4)], False, "ffff"),
        ([schedule(10, (0.3, 0.7))], True, "fffFFFFfff"),
        ([schedule(10, (0.3, 0.7))], False, "f" * 10),
        ([schedule(7, cache=3)], True, "F,SSF,SSF"),
        ([schedule(10, (0.3, 0.7), 2)], True, "f,sfF,SF,Sf,sf"),
        ([schedule(6, cache=3), schedule(6)], True, "FFFFFF"),
        ([schedule(6, cache=3), schedule(3)], True, "FFFF,SS"),
        ([schedule(4, (0, 0.5)), schedule(4, (0.5, 1))], True, "FFFF"),
        # The guided row ends at the third step: the next one has no features without guidance to reuse.
        ([schedule(6, (0.5, 1), 6), schedule(2, cache=6)], True, "F,SfF,SS"),
    ],
)
def test_programs(schedules, guided, expected):
    assert letters(plan(schedules, guided=guided)) == expected


def test_rows_run_until_their_own_end():
    running = [step.running for step in plan([schedule(2), schedule(4), schedule(1)], guided=True)]
    assert running == [(0, 1, 2), (0, 1), (1,), (1,)]


def test_features_are_those_of_the_step_before_and_of_its_guidance():
    """For any schedules: what a shallow step reads was kept by the last full step, and that had the same guidance."""
    rng = np.random.default_rng()
    for _ in range(200):
        schedules = [
            schedule(
                int(rng.integers(3, 12)), tuple(np.sort(rng.choice([0.0, 0.3, 0.6, 1.0], 2, False))), cache
            )
            for cache in rng.integers(1, 5, rng.integers(1, 4)).tolist()
        ]
        kept: bool | None = None
        taken = False
        for index, step in enumerate(plan(schedules, guided=True)):
            full = [bool(schedules[row].full[index]) for row in step.running]
            if step.component is Component.UNET:
                kept, taken = step.guided, False
                assert not step.takes_deep
            else:
                assert kept is step.guided and not any(full)
                assert step.takes_deep is not taken
                taken = True
            assert step.guided == any(schedules[row].guided[index] for row in step.running)
