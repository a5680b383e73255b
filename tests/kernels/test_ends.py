"""The kernels before and after the loop against the runtime's own functions."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(interpreted) -> dict[str, Any]:
    return interpreted("ends.py")


@pytest.mark.parametrize("which", ["all of float16", "halfway in float32", "halfway in bfloat16"])
def test_pixels_are_those_of_postprocess(results, which):
    assert results["pixels"][which] == [0, 0]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_picture_that_is_not_finite_is_flagged(results, value):
    assert results["pixels"][value][1] == 1


def test_what_a_network_is_fed_is_finite_in_its_format(results):
    """The number of the step, 1 more than the position 4; 70,000 is too large for float16 alone."""
    assert results["fed"] == {
        "float16": {"nan": [0, 5, 0], "-inf": [0, 5, 0], "70000.0": [0, 5, 0], "60000.0": [0, 0, 0]},
        "bfloat16": {"70000.0": [0, 0, 0]},
    }


def test_noise_is_that_of_the_generator(results):
    assert results["noise"] < 2e-6
