"""Memory that lives and ends together, and arrays that exist on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rt.cuda.device import ALIGNMENT, Device, DeviceArray, Stream
from rt.cuda.formats import Array


@dataclass(frozen=True, eq=False)
class Mirror:
    """An array of a device and page-locked memory of the host of the same shape, to fill it from or read it into."""

    host: Array
    array: DeviceArray
    device: Device
    stream: Stream

    def send(self, count: int | None = None) -> None:
        """Host to device: the first `count` rows, or all. The host's are not to be touched before it has happened."""
        rows = len(self.array) if count is None else count
        if rows:
            self.device.upload(self.array.part(0, rows), self.host[:rows], self.stream)

    def fetch(self, count: int | None = None) -> None:
        """Device to host, as `send`."""
        rows = len(self.array) if count is None else count
        if rows:
            self.device.download(self.host[:rows], self.array.part(0, rows), self.stream)


class Memory:
    """Allocations that are given back at once."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._arrays: list[DeviceArray] = []
        self._pinned: list[Array] = []

    def array(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Zeros on the device."""
        array = self._device.allocate(shape, dtype)
        self._arrays.append(array)
        self._device.clear(array, self._stream)
        return array

    def pinned(self, shape: Sequence[int], dtype: str) -> Array:
        """Page-locked memory of the host."""
        array = self._device.pinned(shape, dtype)
        self._pinned.append(array)
        return array

    def mirror(self, shape: Sequence[int], dtype: str) -> Mirror:
        """Both; on the device zeros."""
        return Mirror(self.pinned(shape, dtype), self.array(shape, dtype), self._device, self._stream)

    def close(self) -> None:
        """Give all of it back, once nothing that uses it is under way."""
        while self._arrays:
            self._device.free(self._arrays.pop())
        while self._pinned:
            self._device.unpin(self._pinned.pop())


def side_by_side(
    device: Device, wanted: Mapping[str, tuple[Sequence[int], str]], *, alignment: int = ALIGNMENT
) -> tuple[DeviceArray, dict[str, DeviceArray]]:
    """Arrays in one allocation, so that one launch can fill all of those that follow each other without a gap.

    An array whose bytes are no multiple of `alignment` has a gap behind it; these come last, by format.

    Args:
        device: Where.
        wanted: Name to shape and format.
        alignment: Bytes that each array is to start at a multiple of; at most what `Device.allocate` gives, 256.

    Returns:
        The allocation, in bytes, which is to be freed, and its parts by name, in the order of `wanted`; their contents
        are undefined.
    """
    arrays = {name: DeviceArray(0, tuple(shape), dtype) for name, (shape, dtype) in wanted.items()}
    starts, end = {}, 0
    for name, array in sorted(arrays.items(), key=lambda one: (one[1].nbytes % alignment > 0, one[1].dtype)):
        starts[name] = -(-end // alignment) * alignment
        end = starts[name] + array.nbytes
    block = device.allocate((end,), "uint8")
    return block, {
        name: replace(array, pointer=block.pointer + starts[name]) for name, array in arrays.items()
    }
