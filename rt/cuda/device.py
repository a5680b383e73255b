"""What the runtime asks of a GPU: memory, copies, kernels, events and graphs, all in the order of one stream.

Every call that takes a stream returns at once; only `synchronise` and `wait` make the host wait. So a buffer of the
host that is uploaded from, or downloaded into, belongs to the device until one of these two has returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NewType, Protocol

from rt.cuda.formats import Array, storage
from rt.errors import BackendError
from rt.kernel_image import KernelImage, TensorArgument

ALIGNMENT = 16
"""Bytes that every array starts at a multiple of, where a kernel is to read it."""
Stream = NewType("Stream", int)
"""Its handle in CUDA, a `cudaStream_t` as an integer, which is how engines take it."""
Event = NewType("Event", int)
"""A place in a stream."""


@dataclass(frozen=True)
class DeviceArray:
    """Contiguous memory of a device, the last dimension fastest.

    Other libraries see it through `__cuda_array_interface__`, without a copy; whoever allocated it frees it.

    Attributes:
        pointer: Its address on the device.
        shape: In elements.
        dtype: Its format by name, as in `rt.cuda.formats`.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * storage(self.dtype).itemsize

    def reshape(self, *shape: int) -> DeviceArray:
        """The same elements in another shape; one size may be -1, which then is what remains."""
        known = math.prod(size for size in shape if size != -1)
        sizes = tuple(self.size // max(known, 1) if size == -1 else size for size in shape)
        if math.prod(sizes) != self.size:
            raise BackendError(f"an array {self.shape} cannot become {shape}: it has {self.size} elements")
        return replace(self, shape=sizes)

    def part(self, start: int, stop: int) -> DeviceArray:
        """Rows `start` to `stop`, which stays out, of the first dimension.

        Raises:
            BackendError: They are not all there.
        """
        if not 0 <= start <= stop <= len(self):
            raise BackendError(f"rows {start} to {stop} are not in an array {self.shape}")
        step = self.nbytes // len(self)
        return replace(self, pointer=self.pointer + start * step, shape=(stop - start, *self.shape[1:]))

    def __getitem__(self, index: int) -> DeviceArray:
        """One row, without the first dimension."""
        if not 0 <= index < len(self):  # an IndexError, as it also ends a `for` over the rows
            raise IndexError(f"row {index} is not in an array {self.shape}")
        row = self.part(index, index + 1)
        return replace(row, shape=self.shape[1:])

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        """Version 3, https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html.

        What numpy lacks is raw bytes there ("V2" for bfloat16): the interface has no name for it.
        """
        kind = storage(self.dtype)
        named = self.dtype == kind.name
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": kind.str if named else f"|V{kind.itemsize}",
            "data": (self.pointer, False),
            "strides": None,
            "stream": None,  # the owner has synchronised before it hands the array out
        }


class Kernel(Protocol):
    """A kernel that is loaded and can be launched."""

    @property
    def image(self) -> KernelImage:
        """What was loaded."""

    def launch(
        self,
        stream: Stream,
        sizes: Mapping[str, int],
        inputs: Sequence[DeviceArray],
        outputs: Sequence[DeviceArray],
    ) -> None:
        """Enqueue it.

        Args:
            stream: Where.
            sizes: A value for every size of its formulas that was not fixed when it was compiled.
            inputs: In the order of the image.
            outputs: In the order of the image.

        Raises:
            BackendError: An array is not what the kernel takes.
        """


class Graph(Protocol):
    """Work that was captured, ready to be enqueued as a whole."""

    def launch(self, stream: Stream) -> None:
        """Enqueue all of it."""

    def close(self) -> None:
        """Give its memory back; a launch that is under way is not disturbed."""


class Device(Protocol):
    """One GPU. Calls that fail raise BackendError, or MemoryError where its memory ran out."""

    @property
    def name(self) -> str:
        """As its maker calls it."""

    @property
    def capability(self) -> int:
        """Compute capability, such as 90 for 9.0."""

    def activate(self) -> None:
        """Make its context the current one of this thread, which every other call expects."""

    def allocate(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Memory with undefined contents, aligned for every access."""

    def free(self, array: DeviceArray) -> None:
        """Give back what `allocate` gave, once nothing that uses it is under way."""

    def pinned(self, shape: Sequence[int], dtype: str) -> Array:
        """Page-locked memory of the host, the only kind that `upload` and `download` take."""

    def unpin(self, array: Array) -> None:
        """Give back what `pinned` gave."""

    def create_stream(self) -> Stream:
        """A stream that does not wait for the default one."""

    def destroy_stream(self, stream: Stream) -> None:
        """Once nothing is under way in it."""

    def upload(self, target: DeviceArray, source: Array, stream: Stream) -> None:
        """Host to device; `source` is contiguous, of as many bytes, and part of a pinned array."""

    def download(self, target: Array, source: DeviceArray, stream: Stream) -> None:
        """Device to host, as `upload`."""

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """Device to device, as many bytes as `target` has."""

    def clear(self, target: DeviceArray, stream: Stream) -> None:
        """Every byte 0."""

    def load(self, image: KernelImage, code: bytes) -> Kernel:
        """Make a kernel ready to launch; its code stays loaded until the device is closed."""

    def create_event(self) -> Event:
        """A marker that can be recorded any number of times."""

    def destroy_event(self, event: Event) -> None:
        """Once nobody waits for it."""

    def record(self, event: Event, stream: Stream) -> None:
        """Move the marker behind all that is in the stream now."""

    def wait(self, event: Event) -> None:
        """Block the host until the device has reached the marker; it goes on with what comes after it."""

    def follow(self, stream: Stream, event: Event) -> None:
        """Let what is enqueued in `stream` from now on wait for where the marker is now; the host goes on."""

    def synchronise(self, stream: Stream) -> None:
        """Block the host until the stream is empty. An error of work in it shows here at the latest."""

    def begin_capture(self, stream: Stream) -> None:
        """From now on what this thread enqueues in `stream` is recorded rather than run."""

    def end_capture(self, stream: Stream) -> Graph:
        """What was recorded since."""

    def chain(self, graphs: Sequence[Graph]) -> Graph:
        """One graph that runs copies of `graphs` one after the other."""

    def close(self) -> None:
        """Unload kernels and let the context go. Memory and streams are to be given back before."""


def capture(device: Device, stream: Stream, work: Callable[[], None]) -> Graph:
    """What `work` enqueues in `stream`, as a graph; when it raises, the stream is as it was before."""
    device.begin_capture(stream)
    try:
        work()
    except BaseException:
        # Its error is on its way; CUDA may have broken the capture off by itself.
        with suppress(BackendError, MemoryError):
            device.end_capture(stream).close()
        raise
    return device.end_capture(stream)


def check_launch(
    image: KernelImage,
    sizes: Mapping[str, int],
    inputs: Sequence[DeviceArray],
    outputs: Sequence[DeviceArray],
) -> None:
    """A pointer says nothing of what is behind it, so a wrong array would be read in silence.

    Raises:
        BackendError: With the first argument that does not fit.
    """
    for name, fixed in image.sizes.items():
        if sizes.get(name, fixed) != fixed:
            raise BackendError(f"{image.name} was compiled for {name} = {fixed}, not {sizes[name]}")
    for kind, expected, given in (("inputs", image.inputs, inputs), ("outputs", image.outputs, outputs)):
        if len(expected) != len(given):
            names = ", ".join(argument.name for argument in expected)
            raise BackendError(f"{image.name} takes {len(expected)} {kind} ({names}), not {len(given)}")
        for argument, array in zip(expected, given, strict=True):
            _check_argument(image, argument, array, sizes)


def _check_argument(
    image: KernelImage, argument: TensorArgument, array: DeviceArray, sizes: Mapping[str, int]
) -> None:
    extent = image.extent(argument, sizes)
    if array.dtype != argument.dtype or array.size != math.prod(extent):
        raise BackendError(
            f"{image.name} takes {argument.name} as {argument.dtype} {extent}, not {array.dtype} {array.shape}"
        )
    if array.pointer % ALIGNMENT:
        raise BackendError(f"{image.name} takes {argument.name} from a multiple of {ALIGNMENT} bytes on")
