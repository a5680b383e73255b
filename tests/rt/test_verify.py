"""The comparison with torch's outputs: a right engine passes, a wrong one cannot."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rt.backends import BACKENDS, ON_HOST, Array
from rt.bundle import Bundle
from rt.config import DType
from rt.errors import AccuracyError, IntegrityError, NumericsError
from rt.verify import TOLERANCE, compare, save_reference, verify


class Fake:
    """y = 2x, and z = x + 1, unless a test bends it."""

    def __init__(self) -> None:
        self.inputs: dict[str, Array] = {"x": np.zeros((3, 4), np.float32)}
        self.outputs: dict[str, Array] = {
            "y": np.zeros((3, 4), np.float32),
            "z": np.zeros((3, 4), np.float32),
        }
        self.bend: Callable[[Array], None] = lambda y: None

    def enqueue(self) -> None:
        np.multiply(self.inputs["x"], 2, out=self.outputs["y"])
        np.add(self.inputs["x"], 1, out=self.outputs["z"])
        self.bend(self.outputs["y"])


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    x = np.random.default_rng().normal(size=(3, 4)).astype(np.float32)
    save_reference(tmp_path / "fake.npz", {"x": x}, {"y": 2 * x, "z": x + 1})
    return tmp_path / "fake.npz"


def test_a_right_engine_has_no_error(reference: Path) -> None:
    assert compare(Fake(), reference, name="fake", dtype=DType.FP32) == {"y": 0.0, "z": 0.0}


def test_the_error_is_the_relative_l2_distance(reference: Path) -> None:
    engine = Fake()
    engine.bend = lambda y: np.multiply(y, 1.01, out=y)
    assert compare(engine, reference, name="fake", dtype=DType.FP16)["y"] == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("dtype", DType)
def test_twice_the_tolerance_is_an_error_that_says_what_to_do(reference: Path, dtype: DType) -> None:
    engine = Fake()
    engine.bend = lambda y: np.multiply(y, 1 + 2 * TOLERANCE[dtype], out=y)
    with pytest.raises(
        AccuracyError, match=r"^fake: output 'y' is .* away from torch .*--dtype fp32"
    ) as error:
        compare(engine, reference, name="fake", dtype=dtype)
    assert dtype.value in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_not_finite_is_an_error(reference: Path, value: float) -> None:
    engine = Fake()
    engine.bend = lambda y: y.__setitem__((1, 2), value)
    with pytest.raises(
        NumericsError, match=r"^fake: output 'y' has NaN or Inf in fp16; build with --dtype fp32$"
    ):
        compare(engine, reference, name="fake", dtype=DType.FP16)


def test_an_engine_that_writes_nothing_does_not_pass_with_what_was_there(reference: Path) -> None:
    engine = Fake()
    compare(engine, reference, name="fake", dtype=DType.FP32)
    engine.enqueue = lambda: None  # type: ignore[method-assign]
    with pytest.raises(NumericsError):
        compare(engine, reference, name="fake", dtype=DType.FP32)


@pytest.mark.parametrize("name", ON_HOST)
def test_every_backend_verifies_every_engine_of_a_sound_bundle(demo_bundle: Path, name: str) -> None:
    bundle = Bundle.open(demo_bundle)
    errors = {record.name: distances for record, distances in verify(bundle, BACKENDS[name])}
    assert list(errors) == [engine.name for engine in bundle.manifest.engines]
    for record_name, distances in errors.items():
        assert all(distance < 1e-5 for distance in distances.values())
        # One short sum a value, keys and values may come out equal to the last bit; nothing longer does.
        assert record_name == "unet_context" or all(distance > 0 for distance in distances.values())


def test_a_changed_reference_is_found_before_any_engine_loads(demo_bundle: Path, tmp_path: Path) -> None:
    class Unused:
        def load(self, *args: object, **options: object) -> None:
            raise AssertionError("an engine was loaded")

    copy = Path(shutil.copytree(demo_bundle, tmp_path / "copy"))
    file = random.choice([*(copy / "reference").iterdir()])
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"^{file} is damaged"):
        next(verify(Bundle.open(copy), Unused()))  # type: ignore[arg-type]
