"""Engines of a device from the host's side, and the other way round."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rt.backends.views import Alone, DeviceSide, HostSide
from rt.cuda.formats import decode
from rt.cuda.host import HostDevice
from rt.errors import BackendError


class Doubling:
    """On the host."""

    def __init__(self, dtype: type) -> None:
        self.inputs = {"x": np.zeros((2, 3), dtype)}
        self.outputs = {"y": np.zeros((2, 3), dtype)}

    def enqueue(self) -> None:
        np.multiply(self.inputs["x"], 2, out=self.outputs["y"])


@pytest.fixture
def device():
    return HostDevice()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_there_and_back(device, dtype):
    stream = device.create_stream()
    engine = HostSide(DeviceSide("double", Doubling(dtype), device), device, stream)
    wide = np.float32 if dtype is np.float16 else dtype
    assert not device.in_use - 1, "no memory before it is used"
    assert engine.inputs["x"].dtype == engine.outputs["y"].dtype == wide
    where = engine.outputs["y"].ctypes.data
    for value in (1, 5):
        engine.inputs["x"][...] = value
        device.calls = []
        engine.enqueue()
        assert (engine.outputs["y"] == 2 * value).all()
        called = [call.name for call in device.calls if call.name != "pinned"]
        assert called == ["upload", "host", "download", "synchronise"]
    assert not [call for call in device.calls if call.name == "pinned"], "but once"
    assert engine.outputs["y"].ctypes.data == where
    engine.close()
    device.destroy_stream(stream)
    assert device.in_use == 0
    with pytest.raises(BackendError, match="is not allocated"):
        device.view(engine.engine.inputs["x"])


def test_bfloat16(device):
    """An engine whose buffers the host holds as bits."""

    class Engine:
        def __init__(self):
            self.inputs = {"x": device.allocate((4,), "bfloat16")}
            self.outputs = {"y": device.allocate((4,), "bfloat16")}

        def enqueue(self, stream):
            device.copy(self.outputs["y"], self.inputs["x"], stream)

        def close(self):
            pass

    engine = HostSide(Engine(), device, device.create_stream())
    engine.inputs["x"][...] = [1.0, 1.001, -3.0, 1e30]
    engine.enqueue()
    np.testing.assert_allclose(engine.outputs["y"], engine.inputs["x"], rtol=2**-8)
    np.testing.assert_array_equal(
        engine.outputs["y"], decode(device.view(engine.engine.outputs["y"]), "bfloat16")
    )
    assert engine.outputs["y"][1] == 1.0


def test_one_alone_is_closed_in_any_thread():
    device = HostDevice()  # which refuses threads that have not activated it
    engine = Alone.load(device, lambda: DeviceSide("double", Doubling(np.float32), device))
    engine.enqueue()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.close).result()
    assert device.in_use == 0 and device.calls[-1].name == "close"
    engine.close()
    assert [call.name for call in device.calls].count("close") == 1


def test_an_engine_that_cannot_be_closed_leaves_no_device_open(device):
    class Stuck(DeviceSide):
        def close(self):
            raise BackendError("stuck")

    engine = Alone.load(device, lambda: Stuck("double", Doubling(np.float32), device))
    with pytest.raises(BackendError, match="stuck"):
        engine.close()
    assert device.in_use == 0 and device.calls[-1].name == "close"
