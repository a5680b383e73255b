"""A device without a GPU, for tests: its memory is numpy's, and its streams are as late as CUDA allows them to be.

Nothing that is enqueued runs before the host waits for it. So a buffer that is read before its download is due, or
written over before its upload is, gives a wrong result here every time, where a GPU would give one now and then.
Fresh memory, of the device and page-locked, is NaN; freed memory, and memory that nobody allocated, cannot be read.
A thread that has neither made nor activated the device is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from threading import local
from typing import Any

import numpy as np

from rt.cuda.device import DeviceArray, Event, Kernel, Stream, check_launch
from rt.cuda.formats import Array, storage
from rt.errors import BackendError
from rt.kernel_image import KernelImage

Implementation = Callable[[KernelImage, Mapping[str, int], Mapping[str, Array]], None]
"""What a kernel does: its image, all sizes, and inputs and outputs by name, shaped as the image says."""


@dataclass(frozen=True)
class Call:
    """One call of the device, in the words of `Device`.

    Attributes:
        name: Of the method; "kernel" and "graph" for launches, "host" for work of `HostDevice.run`.
        subject: Of a kernel or of work on the host its name, of a copy its bytes.
        captured: Whether it was recorded rather than enqueued.
    """

    name: str
    subject: str = ""
    captured: bool = False


Work = Callable[[], None]
_ALIGNMENT = 256  # as CUDA's


@dataclass
class _Marker:
    """Where an event was recorded last, and whether the device has come that far."""

    queue: _Queue
    reached: bool = False

    def reach(self) -> None:
        self.reached = True

    def catch_up(self) -> None:
        """Run what is before it."""
        while not self.reached:
            self.queue.pending.popleft()()


@dataclass
class _Queue:
    """A stream: what is still to do, and what is being captured, if anything is."""

    pending: deque[Work] = field(default_factory=deque)
    capture: list[Work] | None = None


class HostDevice:
    """See `Device`.

    Args:
        implementations: What the kernels do, by name of the op; a kernel without one cannot be loaded.
        capability: That it claims.
        memory: Bytes that can be allocated, unlimited by default.

    Attributes:
        calls: Every call so far, in order; assign an empty list to begin anew.
    """

    def __init__(
        self,
        implementations: Mapping[str, Implementation] | None = None,
        *,
        capability: int = 90,
        memory: int | None = None,
    ) -> None:
        self.name, self.capability = "host", capability
        self.calls: list[Call] = []
        self._implementations = implementations or {}
        self._memory = memory
        self._arrays: dict[int, Array] = {}  # allocations, by address, as bytes
        self._adopted: dict[int, Array] = {}
        self._pinned: dict[int, Array] = {}
        self._queues: dict[Stream, _Queue] = {}
        self._events: dict[Event, _Marker] = {}
        self._handles = count(1)
        self._thread = local()  # of each thread: whether it has activated the device
        self.activate()

    @property
    def allocated(self) -> int:
        """Bytes that `allocate` gave and `free` did not take back."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def in_use(self) -> int:
        """How many allocations, pinned arrays, streams and events were not given back."""
        return len(self._arrays) + len(self._pinned) + len(self._queues) + len(self._events)

    def activate(self) -> None:
        """See `Device`."""
        self._thread.active = True

    def allocate(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """See `Device`."""
        self._outside_capture("allocate")
        array = DeviceArray(0, tuple(shape), dtype)
        if self._memory is not None and self.allocated + array.nbytes > self._memory:
            raise MemoryError(f"allocate of {array.nbytes} bytes: memory of {self.name} is full")
        memory = np.full(array.nbytes + 2 * _ALIGNMENT, 0xFF, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        memory = memory[start : start + max(array.nbytes, 1)]
        self._arrays[memory.ctypes.data] = memory
        self._note("allocate", str(array.nbytes))
        return DeviceArray(memory.ctypes.data, array.shape, dtype)

    def free(self, array: DeviceArray) -> None:
        """See `Device`."""
        self._outside_capture("free")
        if array.pointer not in self._arrays:
            raise BackendError(f"free of {array}, which is not allocated")
        if any(queue.pending for queue in self._queues.values()):
            raise BackendError(f"free of {array} while work is under way that may use it")
        del self._arrays[array.pointer]
        self._note("free")

    def adopt(self, array: Array, dtype: str) -> DeviceArray:
        """Memory of the host as memory of this device, for engines that own theirs."""
        self._adopted[array.ctypes.data] = array.reshape(-1).view(np.uint8)
        return DeviceArray(array.ctypes.data, array.shape, dtype)

    def disown(self, array: DeviceArray) -> None:
        """Undo `adopt`."""
        del self._adopted[array.pointer]

    def view(self, array: DeviceArray) -> Array:
        """The memory itself, in the format that stands for `array.dtype`.

        Raises:
            BackendError: It is not allocated.
        """
        for memories in (self._arrays, self._adopted):
            for address, memory in memories.items():
                offset = array.pointer - address
                if offset >= 0 and offset + array.nbytes <= memory.nbytes:
                    part = memory[offset : offset + array.nbytes]
                    return part.view(storage(array.dtype)).reshape(array.shape)
        raise BackendError(f"illegal address: {array} is not allocated")

    def pinned(self, shape: Sequence[int], dtype: str) -> Array:
        """See `Device`."""
        self._outside_capture("pinned")
        array: Array = np.empty(tuple(shape), storage(dtype))
        array.reshape(-1).view(np.uint8).fill(0xFF)
        self._pinned[array.ctypes.data] = array
        self._note("pinned")
        return array

    def unpin(self, array: Array) -> None:
        """See `Device`."""
        self._active("unpin")
        if self._pinned.pop(array.ctypes.data, None) is None:
            raise BackendError("unpin of an array that is not pinned")
        self._note("unpin")

    def create_stream(self) -> Stream:
        """See `Device`."""
        self._active("create_stream")
        stream = Stream(next(self._handles))
        self._queues[stream] = _Queue()
        return stream

    def destroy_stream(self, stream: Stream) -> None:
        """See `Device`."""
        self._active("destroy_stream")
        if self._queues[stream].pending:
            raise BackendError("a stream is destroyed while work is under way in it")
        del self._queues[stream]

    def upload(self, target: DeviceArray, source: Array, stream: Stream) -> None:
        """See `Device`."""
        self._check_pinned(source, target.nbytes)
        bits = source.reshape(-1).view(np.uint8)
        self._enqueue(stream, "upload", str(target.nbytes), lambda: np.copyto(self._bytes(target), bits))

    def download(self, target: Array, source: DeviceArray, stream: Stream) -> None:
        """See `Device`."""
        self._check_pinned(target, source.nbytes)
        bits = target.reshape(-1).view(np.uint8)
        self._enqueue(stream, "download", str(source.nbytes), lambda: np.copyto(bits, self._bytes(source)))

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """See `Device`."""
        if target.nbytes != source.nbytes:
            raise BackendError(f"copy of {source} into {target}: not as many bytes")
        self._enqueue(
            stream, "copy", str(target.nbytes), lambda: np.copyto(self._bytes(target), self._bytes(source))
        )

    def clear(self, target: DeviceArray, stream: Stream) -> None:
        """See `Device`."""
        self._enqueue(stream, "clear", str(target.nbytes), lambda: self._bytes(target).fill(0))

    def run(self, name: str, work: Work, stream: Stream) -> None:
        """Enqueue work of the host, as an engine on the CPU."""
        self._enqueue(stream, "host", name, work)

    def load(self, image: KernelImage, code: bytes) -> Kernel:
        """See `Device`; whatever `code` holds, the implementation is what runs."""
        self._outside_capture("load")
        if image.kernel not in self._implementations:
            raise BackendError(
                f"loading kernel {image.name} failed: {image.kernel} has no implementation here"
            )
        self._note("load", image.name)
        return _HostKernel(self, image, self._implementations[image.kernel])

    def create_event(self) -> Event:
        """See `Device`."""
        self._active("create_event")
        event = Event(next(self._handles))
        self._events[event] = _Marker(_Queue(), reached=True)  # one that was never recorded holds nobody up
        return event

    def destroy_event(self, event: Event) -> None:
        """See `Device`."""
        self._active("destroy_event")
        del self._events[event]

    def record(self, event: Event, stream: Stream) -> None:
        """See `Device`."""
        self._active("record")
        marker = self._events[event] = _Marker(self._queues[stream])
        self._enqueue(stream, "record", "", marker.reach)

    def wait(self, event: Event) -> None:
        """See `Device`: runs what is before the marker, and no more."""
        self._outside_capture("wait")
        self._note("wait")
        self._events[event].catch_up()

    def follow(self, stream: Stream, event: Event) -> None:
        """See `Device`."""
        self._enqueue(stream, "follow", "", self._events[event].catch_up)

    def synchronise(self, stream: Stream) -> None:
        """See `Device`."""
        self._outside_capture("synchronise")
        self._note("synchronise")
        pending = self._queues[stream].pending
        while pending:
            pending.popleft()()

    def begin_capture(self, stream: Stream) -> None:
        """See `Device`."""
        self._active("begin_capture")
        if self._queues[stream].capture is not None:
            raise BackendError("begin_capture of a stream that is being captured")
        self._queues[stream].capture = []
        self._note("begin_capture")

    def end_capture(self, stream: Stream) -> HostGraph:
        """See `Device`."""
        self._active("end_capture")
        work, self._queues[stream].capture = self._queues[stream].capture, None
        if work is None:
            raise BackendError("end_capture of a stream that is not being captured")
        self._note("end_capture")
        return HostGraph(self, work)

    def chain(self, graphs: Sequence[Any]) -> HostGraph:
        """See `Device`."""
        self._active("chain")
        self._note("chain", str(len(graphs)))
        return HostGraph(self, [each for graph in graphs for each in graph.work])

    def close(self) -> None:
        """See `Device`."""
        self._active("close")
        self._note("close")

    def _bytes(self, array: DeviceArray) -> Array:
        return self.view(array).reshape(-1).view(np.uint8)

    def _note(self, name: str, subject: str = "", *, captured: bool = False) -> None:
        self.calls.append(Call(name, subject, captured))

    def _enqueue(self, stream: Stream, name: str, subject: str, work: Work) -> None:
        self._active(name)
        queue = self._queues[stream]
        self._note(name, subject, captured=queue.capture is not None)
        (queue.pending if queue.capture is None else queue.capture).append(work)

    def _active(self, what: str) -> None:
        if not getattr(self._thread, "active", False):
            raise BackendError(f"{what} in a thread that has not activated the device")

    def _outside_capture(self, what: str) -> None:
        self._active(what)
        if any(queue.capture is not None for queue in self._queues.values()):
            raise BackendError(f"{what} while a stream is being captured")

    def _check_pinned(self, array: Array, nbytes: int) -> None:
        address, last = array.ctypes.data, array.ctypes.data + array.nbytes
        pinned = any(
            start <= address and last <= start + whole.nbytes for start, whole in self._pinned.items()
        )
        if not pinned or not array.flags.c_contiguous or array.nbytes != nbytes:
            raise BackendError(
                f"{array.dtype} {array.shape} is not {nbytes} contiguous bytes of pinned memory"
            )


class _HostKernel:
    """See `Kernel`."""

    def __init__(self, device: HostDevice, image: KernelImage, implementation: Implementation) -> None:
        self.image = image
        self._device, self._implementation = device, implementation

    def launch(
        self,
        stream: Stream,
        sizes: Mapping[str, int],
        inputs: Sequence[DeviceArray],
        outputs: Sequence[DeviceArray],
    ) -> None:
        """See `Kernel`."""
        image = self.image
        check_launch(image, sizes, inputs, outputs)
        known = {**image.sizes, **sizes}
        image.launch_grid(known)  # its formulas must have a value here, too
        image.scalar_values(known)
        arguments = list(zip((*image.inputs, *image.outputs), (*inputs, *outputs), strict=True))

        def work() -> None:
            arrays = {
                argument.name: self._device.view(array).reshape(image.extent(argument, sizes))
                for argument, array in arguments
            }
            self._implementation(image, known, arrays)

        self._device._enqueue(stream, "kernel", image.kernel, work)


class HostGraph:
    """See `Graph`.

    Attributes:
        work: What it runs, in order.
    """

    def __init__(self, device: HostDevice, work: list[Work]) -> None:
        self.work = work
        self._device = device
        self._closed = False

    def launch(self, stream: Stream) -> None:
        """See `Graph`."""
        if self._closed:
            raise BackendError("launch of a graph that is closed")

        def run() -> None:
            for each in self.work:
                each()

        self._device._enqueue(stream, "graph", str(len(self.work)), run)

    def close(self) -> None:
        """See `Graph`."""
        self._closed = True
