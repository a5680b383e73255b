"""An engine of a device seen from the host, and one of the host seen from a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property

import numpy as np

from rt.backends.base import Array, DeviceEngine, Engine
from rt.cuda import Device, DeviceArray, Stream
from rt.cuda.formats import decode, encode, storage
from rt.cuda.host import HostDevice


class HostSide:
    """A `DeviceEngine` as an `Engine`: what runs once a prompt or once a schedule may wait for its copies.

    Floats are float32 here, whatever the engine takes and gives. Memory of the host is taken when it is first used, so
    an engine that the loop alone runs needs none.

    Attributes:
        engine: The engine itself.
    """

    def __init__(self, engine: DeviceEngine, device: Device, stream: Stream) -> None:
        self.engine = engine
        self._device, self._stream = device, stream
        self._staged: dict[str, Array] = {}

    @cached_property
    def inputs(self) -> Mapping[str, Array]:
        """See `Engine`."""
        return {name: _floats(array) for name, array in self.engine.inputs.items()}

    @cached_property
    def outputs(self) -> Mapping[str, Array]:
        """See `Engine`."""
        return {name: _floats(array) for name, array in self.engine.outputs.items()}

    def enqueue(self) -> None:
        """Upload the inputs, run once, download the outputs, wait."""
        engine, device, stream = self.engine, self._device, self._stream
        for name, array in engine.inputs.items():
            staged = self._stage(name, array)
            np.copyto(staged, encode(self.inputs[name], array.dtype))
            device.upload(array, staged, stream)
        engine.enqueue(stream)
        for name, array in engine.outputs.items():
            device.download(self._stage(name, array), array, stream)
        device.synchronise(stream)
        for name, array in engine.outputs.items():
            np.copyto(self.outputs[name], decode(self._staged[name], array.dtype))

    def close(self) -> None:
        """Close the engine, too."""
        for array in self._staged.values():
            self._device.unpin(array)
        self._staged.clear()
        self.engine.close()

    def _stage(self, name: str, array: DeviceArray) -> Array:
        if name not in self._staged:
            self._staged[name] = self._device.pinned(array.shape, array.dtype)
        return self._staged[name]


class Alone(HostSide):
    """An engine that owns its device, too: callers of `Backend.load` let go of it without closing it."""

    _open = True

    @classmethod
    def load(cls, device: Device, load: Callable[[], DeviceEngine]) -> Alone:
        """What `load` gives on `device`, which is closed when it fails."""
        with ExitStack() as undo:
            undo.callback(device.close)
            stream = device.create_stream()
            undo.callback(device.destroy_stream, stream)
            alone = cls(load(), device, stream)
            undo.pop_all()
        return alone

    def close(self) -> None:
        """Close engine, stream and device, in any thread: it is the collector's where nobody calls this."""
        if not self._open:
            return
        self._open = False
        with ExitStack() as closing:
            closing.callback(self._device.close)
            self._device.activate()
            closing.callback(self._device.destroy_stream, self._stream)
            closing.callback(super().close)

    def __del__(self) -> None:
        self.close()


class DeviceSide:
    """An `Engine` of the host as a `DeviceEngine` of a `HostDevice`: the same arrays, run in the order of a stream."""

    def __init__(self, name: str, engine: Engine, device: HostDevice) -> None:
        self._name, self._engine, self._device = name, engine, device
        self.inputs = self._adopt(engine.inputs)
        self.outputs = self._adopt(engine.outputs)

    def enqueue(self, stream: Stream) -> None:
        """Run once, when the stream comes to it."""
        self._device.run(self._name, self._engine.enqueue, stream)

    def close(self) -> None:
        """The memory stays with the engine; the device no longer knows it."""
        for array in (*self.inputs.values(), *self.outputs.values()):
            self._device.disown(array)

    def _adopt(self, arrays: Mapping[str, Array]) -> dict[str, DeviceArray]:
        return {name: self._device.adopt(array, array.dtype.name) for name, array in arrays.items()}


def _floats(array: DeviceArray) -> Array:
    wide = array.dtype in ("float16", "bfloat16")
    return np.zeros(array.shape, np.float32 if wide else storage(array.dtype))
