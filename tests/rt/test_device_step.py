"""Inputs that change with the timestep: where they lie decides how many launches fill them, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")  # the kernels' references are in the kernels' files

from rt.cuda.memory import Memory, side_by_side
from rt.device_loop import LoopKernels
from rt.device_loop.step import DeviceStep
from rt.engines import Place
from rt.errors import BackendError

from .device_fakes import host_device, library

ROWS, STEPS = 2, 4
# Rows and features: a buffer that both sides of a picture share has a row a picture.
TIMES = {"time_0": (ROWS, 8), "time_1": (2 * ROWS, 16), "time_2": (ROWS, 24)}


@pytest.fixture
def device():
    return host_device()


@pytest.fixture
def place(device):
    return Place(device, device.create_stream())


def engine(device, times):
    latents = device.allocate((ROWS, 4, 2, 2), "float16")
    inputs = {"latents": latents, **times}
    prediction = device.allocate((2 * ROWS, 4, 2, 2), "float16")
    return SimpleNamespace(inputs=inputs, outputs={"prediction": prediction}, enqueue=lambda stream: None)


def together(device):
    return side_by_side(device, {name: (shape, "float16") for name, shape in TIMES.items()})[1]


def with_gaps(device):
    """32, 128 and 96 bytes, each from a multiple of 64 on: the first, which comes second, has a gap behind it."""
    wanted = {name: (shape, "float16") for name, shape in TIMES.items()}
    return side_by_side(device, wanted, alignment=64)[1]


def apart(device):
    arrays = {}
    for name, shape in TIMES.items():
        arrays[name] = device.allocate(shape, "float16")
        device.allocate((8,), "float16")
    return arrays


@pytest.mark.parametrize(("allocate", "launches"), [(together, 1), (with_gaps, 2), (apart, 3)])
def test_each_row_gets_the_features_of_its_step(device, place, tmp_path, allocate, launches):
    times = allocate(device)
    step = DeviceStep(engine(device, times), place, STEPS)
    assert len(step.times) == launches

    rng = np.random.default_rng()
    values = rng.standard_normal((STEPS, ROWS, 2, 48)).astype(np.float16)  # of a step, a picture and a side
    for at in range(STEPS):
        for row in range(ROWS):
            sides = [
                {name: values[at, row, side, :width] for name, (_, width) in TIMES.items()}
                for side in range(2)
            ]
            for features in step.times:
                features.write(at, row, sides)

    memory = Memory(device, place.stream)
    upcoming, position = memory.mirror((ROWS,), "int32"), memory.mirror((ROWS,), "int32")
    upcoming.host[...] = steps = [1, 3]
    upcoming.send()
    kernels = LoopKernels(library(device, tmp_path))
    for features in step.times:
        features.table.send()
        kernels.select_rows(
            features.table.array, features.owner.array, upcoming.array, features.out, position.array
        ).enqueue(place.stream)
    position.fetch()
    device.synchronise(place.stream)

    assert position.host.tolist() == steps
    for name, (rows, width) in TIMES.items():
        sides = [0, 1] if rows == 2 * ROWS else [1]  # what is shared has the features of the prompt
        expected = [values[steps[row], row, side, :width] for side in sides for row in range(ROWS)]
        np.testing.assert_array_equal(device.view(times[name]), expected)

    step.close()
    memory.close()


def test_a_step_gives_back_all_but_the_engines_buffers(device, place):
    made = engine(device, apart(device))
    before = device.in_use
    DeviceStep(made, place, STEPS).close()
    assert device.in_use == before


def test_arrays_side_by_side(device):
    wanted = {
        "a": ((3, 5), "float16"),
        "b": ((4, 4), "float32"),
        "c": ((2, 8), "float16"),
        "d": ((5,), "uint8"),
    }
    block, arrays = side_by_side(device, wanted)
    assert [*arrays] == [*wanted] and block.dtype == "uint8"
    starts = {name: array.pointer - block.pointer for name, array in arrays.items()}
    assert starts == {"c": 0, "b": 32, "a": 96, "d": 128}, "without a gap first"
    assert block.nbytes == 133
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == wanted
    device.free(block)
    with pytest.raises(BackendError, match="is not allocated"):
        device.view(arrays["a"])
