"""torch's CUDA noise against published vectors. That a GPU draws the same was not checked here."""

from __future__ import annotations

import numpy as np
import pytest

from rt.errors import ConfigError
from rt.philox import CudaGenerator, key_of, philox4x32, threads_of

ONES = 0xFFFFFFFF


# Random123's known answers (kat_vectors, "philox4x32 10"): nothing, all ones, digits of π.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ONES] * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, words):
    found = philox4x32(np.array(counter, np.uint32)[:, None], key)[:, 0]
    assert " ".join(f"{word:08x}" for word in found) == words


def test_seed_0():
    """The values that AUTOMATIC1111's web UI documents for its imitation (modules/rng_philox.py)."""
    expected = [
        -0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564,
        -0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497,
    ]  # fmt: skip
    np.testing.assert_allclose(CudaGenerator(0).randn((3, 4)).ravel(), expected, atol=1e-6)


def plainly(seed: int, elements: int, threads: int, offset: int) -> list[float]:
    """torch's kernel as its source says it, thread by thread, in float64; and the offset in calls."""
    result = [0.0] * elements
    key = seed % 2**32, seed >> 32
    for thread in range(threads):
        call, start = offset, thread
        while start < elements:
            words = philox4x32(np.array([[call], [0], [thread], [0]], np.uint32), key)[:, 0].astype(
                np.float64
            )
            for k in range(4):
                if start + k * threads < elements:
                    first, second = words[k // 2 * 2 : k // 2 * 2 + 2]
                    radius = np.sqrt(-2 * np.log((first + 0.5) / 2**32))
                    angle = 2 * np.pi * (second + 0.5) / 2**32
                    result[start + k * threads] = radius * (np.cos(angle) if k % 2 else np.sin(angle))
            call, start = call + 1, start + 4 * threads
    return result


@pytest.mark.parametrize("elements", [1, 255, 257, 700, 2300])
def test_the_layout_over_threads_and_calls(elements):
    """On a GPU that holds 512 threads: one, two or four normals a thread, or several calls."""
    seed = 2**40 + 12345
    generator = CudaGenerator(seed, processors=1, threads_per_processor=512)
    threads = 256 if elements <= 256 else 512
    calls = -(-elements // (4 * threads))
    for draw in range(2):
        z = generator.randn((elements,))
        np.testing.assert_allclose(z, plainly(seed, elements, threads, draw * calls), atol=2e-6)


def test_threads():
    assert threads_of(4 * 64 * 64, 132) == 16384
    assert threads_of(1, 132) == 256
    assert threads_of(10**7, 132) == 132 * 2048
    assert threads_of(10**7, 128, 1536) == 128 * 1536


def test_out_is_filled_and_checked():
    out = np.empty((2, 3), np.float32)
    assert CudaGenerator(5).randn((2, 3), out=out) is out
    np.testing.assert_array_equal(out, CudaGenerator(5).randn((2, 3)))
    with pytest.raises(
        ConfigError, match=r"^out is float64 \(2, 3\) .* expected C-contiguous float32 \(2, 3\)$"
    ):
        CudaGenerator(5).randn((2, 3), out=np.empty((2, 3)))
    assert CudaGenerator(5).randn((0, 3)).shape == (0, 3)


def test_seeds():
    assert key_of(-1) == (ONES, ONES)
    assert key_of(3 + (7 << 32)) == (3, 7)
    with pytest.raises(ConfigError, match=r"^seed 18446744073709551616 does not fit into 64 bits: choose"):
        CudaGenerator(2**64)


def test_normals_are_normal():
    z = CudaGenerator(1).randn((300_000,)).astype(np.float64)
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01
    assert np.isfinite(z).all() and abs(z).max() < 7
