"""Sizes, batches and the build configuration: what is accepted, and what is said of the rest."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt.config import BuildConfig, DType, fingerprint
from rt.decode import decode
from rt.errors import ConfigError, ShapeError
from rt.shapes import ShapeProfile, TensorSpec, choose_size, split_batch

SIZES = [ShapeProfile(64, 96), ShapeProfile(64, 96, 4), ShapeProfile(128, 96), ShapeProfile(64, 64)]


@pytest.mark.parametrize("field", ["height", "width", "batch_size"])
@pytest.mark.parametrize("value", [0, -8, 1.5, "64", None])
def test_a_side_that_is_no_whole_number_is_refused(field: str, value: object) -> None:
    with pytest.raises(
        ShapeError, match=f"^{field} is {value!r}; it must be a whole number of at least 1$"
    ) as error:
        ShapeProfile(**{"height": 64, "width": 64, field: value})  # type: ignore[arg-type]
    assert error.value.exit_code == 2


@given(st.integers(1, 5000), st.sampled_from([4, 8, 16]))
def test_a_side_off_the_grid_is_refused_with_two_that_fit(side: int, factor: int) -> None:
    profile = ShapeProfile(factor, side)
    if side % factor == 0:
        assert profile.check_multiple(factor) is profile
        return
    with pytest.raises(ShapeError, match=f"^width {side} is not a multiple of {factor}") as error:
        profile.check_multiple(factor)
    below, above = (int(word) for word in str(error.value).split("; use ")[1].split(" or "))
    assert below >= factor and below % factor == above % factor == 0
    assert above > side and above - below <= factor


def test_the_height_is_checked_as_the_width_is() -> None:
    with pytest.raises(ShapeError, match=r"^height 60 .* use 56 or 64$"):
        ShapeProfile(60, 64).check_multiple(8)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (None, None, (64, 96)),
        (64, None, (64, 96)),
        (None, 96, (64, 96)),
        (None, 64, (64, 64)),
        (128, None, (128, 96)),
        (64, 64, (64, 64)),
    ],
)
def test_the_first_size_that_matches_is_chosen(
    height: int | None, width: int | None, expected: tuple[int, int]
) -> None:
    assert choose_size(SIZES, height, width) == expected


@pytest.mark.parametrize(("height", "width", "asked"), [(128, 64, "128 x 64"), (None, 128, "any x 128")])
def test_a_size_that_was_not_built_is_refused_with_those_that_were(
    height: int | None, width: int | None, asked: str
) -> None:
    with pytest.raises(ShapeError) as error:
        choose_size(SIZES, height, width)
    assert f"size {asked} " in str(error.value)
    assert "64 x 96, 128 x 96, 64 x 64;" in str(error.value)
    assert "\n" not in str(error.value)


@given(st.integers(1, 60), st.sets(st.integers(1, 9), min_size=1, max_size=4))
def test_batches_cover_the_pictures_and_waste_less_than_the_smallest(count: int, sizes: set[int]) -> None:
    batches = split_batch(count, sizes)
    assert set(batches) <= sizes
    assert count <= sum(batches) < count + min(sizes)
    assert batches == sorted(batches, reverse=True)


def test_no_pictures_need_no_batch() -> None:
    assert split_batch(0, [1, 4]) == []


def test_a_configuration_survives_json() -> None:
    config = BuildConfig(profiles=tuple(SIZES), dtype=DType.BF16, backend="onnxruntime")
    assert BuildConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    spec = TensorSpec(name="tokens", shape=(1, 77), dtype="int64")
    assert decode(TensorSpec, {"name": "tokens", "shape": [1, 77], "dtype": "int64"}) == spec


@pytest.mark.parametrize(
    ("profiles", "problem"), [((), "at least one shape profile"), ((SIZES[0], SIZES[0]), "given twice")]
)
def test_profiles_must_be_there_and_differ(profiles: tuple[ShapeProfile, ...], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        BuildConfig(profiles=profiles)


def test_a_profile_reads_as_pictures_by_height_by_width() -> None:
    assert str(ShapeProfile(512, 768, 4)) == "4 x 512 x 768"


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.none() | st.text(max_size=3), max_size=5))
def test_the_fingerprint_depends_on_values_and_not_on_the_order_of_keys(values: dict[str, object]) -> None:
    backwards = dict(reversed(values.items()))
    assert fingerprint(values) == fingerprint(backwards)
    assert fingerprint(values) != fingerprint({**values, "one more": 1})
    assert fingerprint(values, 1) != fingerprint(values)
