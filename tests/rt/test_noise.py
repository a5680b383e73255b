import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rt.errors import ConfigError
from rt.noise import Generator, randn

TOLERANCE = 2e-6

seeds = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, -1, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, -(2**63)]),
)
short = st.lists(st.integers(0, 3), max_size=3).map(tuple)
long = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


def torch_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=300)
@given(seed=seeds, shapes=st.lists(short | long, min_size=1, max_size=8))
def test_stream_is_torchs(seed, shapes):
    ours, theirs = Generator(seed), torch_generator(seed)
    for shape in shapes:
        expected = torch.randn(shape, generator=theirs).numpy()
        actual = ours.randn(shape)
        assert actual.dtype == np.float32
        assert actual.shape == shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [*range(70), 127, 128, 129, 1000, 65536, 65551])
def test_every_size_leaves_the_same_stream_behind(size):
    seed = int(np.random.default_rng().integers(2**63))
    ours, theirs = Generator(seed), torch_generator(seed)
    for n in (size, 1, size, 16):
        expected = torch.randn(n, generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn((n,)), expected, rtol=0, atol=TOLERANCE, err_msg=f"{seed=}")


def test_spare_normal_outlives_long_calls():
    ours, theirs = Generator(7), torch_generator(7)
    for n in (3, 100, 1, 16, 2, 17, 5):
        np.testing.assert_allclose(
            ours.randn((n,)), torch.randn(n, generator=theirs).numpy(), rtol=0, atol=TOLERANCE
        )


def test_out_is_filled_in_place():
    shape = (1, 4, 9, 7)
    out = np.full(shape, np.nan, np.float32)
    assert Generator(3).randn(shape, out=out) is out
    np.testing.assert_array_equal(out, randn(shape, 3))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((4, 8), np.float64),
        np.empty((8, 4), np.float32),
        np.empty((8, 4), np.float32).T,
        np.empty((4, 16), np.float32)[:, ::2],
    ],
)
def test_out_of_another_kind_is_refused(out):
    generator = Generator(0)
    with pytest.raises(ConfigError, match=r"expected C-contiguous float32 \(4, 8\)"):
        generator.randn((4, 8), out=out)
    np.testing.assert_array_equal(generator.randn((4, 8)), randn((4, 8), 0))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seed_of_more_than_64_bits_is_refused(seed):
    with pytest.raises(ConfigError, match="64 bits"):
        Generator(seed)


def test_golden():
    np.testing.assert_allclose(randn((3,), 42), [0.33669037, 0.12880941, 0.23446237], rtol=0, atol=TOLERANCE)
    z = randn((1, 4, 64, 64), 42).ravel()[[0, 1, 8, -1]]
    np.testing.assert_allclose(z, [1.9269153, 1.4872841, -0.7521353, -0.2934061], rtol=0, atol=TOLERANCE)
