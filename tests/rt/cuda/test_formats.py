"""Formats that numpy lacks, against ml_dtypes, and those that it has."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from rt.cuda.formats import decode, encode, storage
from rt.errors import ConfigError


def test_bfloat16_rounds_as_it_should():
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    halves = (bits & 0xFFFF0000) | 0x8000  # exactly between two values: the even one wins
    edges = np.array(
        [0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32
    )
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.concatenate([bits, halves, edges]).view(np.float32)
        expected = values.astype(ml_dtypes.bfloat16)
    got = encode(values, "bfloat16")
    assert got.dtype == np.uint16
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(decode(got, "bfloat16")[nan]).all()
    np.testing.assert_array_equal(decode(got, "bfloat16")[~nan], expected.astype(np.float32)[~nan])


def test_the_rest_is_numpys():
    values = np.array([[0.1, 70000.0]], np.float32)
    half = encode(values, "float16")
    assert half.dtype == np.float16 and half[0, 1] == np.inf
    assert decode(half, "float16") is half
    assert encode(values, "float32") is values
    assert storage("float8_e4m3fn") == np.uint8


def test_what_does_not_exist():
    with pytest.raises(ConfigError, match=r"'float12' is no number format of a device; use one of float32, "):
        storage("float12")
    for convert in (encode, decode):
        with pytest.raises(ConfigError, match=r"float8_e4m3fn .*bits as uint8"):
            convert(np.zeros(2, np.uint8), "float8_e4m3fn")
