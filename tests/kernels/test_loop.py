"""The kernels of the loop, launched in a row as a step launches them, against `rt.trajectory`."""

from __future__ import annotations

from typing import Any

import pytest

SAMPLERS = ("dpmpp-2m", "euler-a", "ddim", "lms", "deis", "pndm", "heun", "unipc", "lcm", "dpmpp-sde")
# Of the sample's largest value. Measured in the interpreter: at most 2.3e-7.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def results(interpreted) -> dict[str, Any]:
    return interpreted("loop.py")


@pytest.mark.parametrize("how", ["together", "late"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_is_its_trajectory(results, how, name):
    """Its sample after each step and what the network sees before each, beside rows of other samplers and lengths."""
    assert set(results[how]["gaps"]) == set(SAMPLERS)
    assert results[how]["gaps"][name] < TOLERANCE


@pytest.mark.parametrize("how", ["together", "late"])
def test_counters_and_what_must_not_move(results, how):
    """Positions, time features of each row's own step, and rows that are done or have not begun."""
    assert results[how]["faults"] == []


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_the_first_broken_step_is_kept(results, value):
    """In the row it is in, although the following steps are broken, too."""
    assert results["broken"][value] == [[0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 2, 0]]


def test_what_is_finite_is_not_broken(results):
    assert results["broken"]["1.0"] == [[0, 0, 0]] * 4
