"""Latents to pictures on a device."""

from __future__ import annotations

import numpy as np

from rt.backends import DeviceEngine
from rt.cuda import Graph
from rt.cuda.formats import Array, decode
from rt.cuda.memory import Memory
from rt.device_loop.kernels import LoopKernels
from rt.device_loop.launches import recorded
from rt.engines import Place
from rt.model import Component
from rt.session import check_finite

_WORDS = 4  # 32-bit words between two flags: a kernel takes arrays from multiples of 16 bytes on alone


class Decoder:
    """The decoder, which takes one picture at a time, for the rows of a batch.

    Attributes:
        latents: (B, E), to be filled with the latents of all rows in the format of the decoder.
        ones: Mirror (B,) of the factor that they are to have.
        pixels: Mirror (B, H, W, 3) of the pictures.
    """

    def __init__(self, engine: DeviceEngine, place: Place, kernels: LoopKernels, batch: int) -> None:
        self._engine, self._place, self._kernels = engine, place, kernels
        self._input, self._output = engine.inputs["latents"], engine.outputs["image"]
        self._graph: Graph | None = None
        self._memory = memory = Memory(place.device, place.stream)
        self._images: Array | None = None
        try:
            self.latents = memory.array((batch, self._input.size), self._input.dtype)
            self.ones = memory.mirror((batch,), "float32")
            self.pixels = memory.mirror((batch, *self._output.shape[1:]), "uint8")
            self._faults = memory.mirror((batch, _WORDS), "int32")
        except BaseException:
            self.close()
            raise
        self.ones.host[...] = np.float32(1)
        self.ones.send()

    def draw(self, count: int) -> None:
        """Enqueue everything from the latents of the first `count` rows to their pixels on the host."""
        self._place.device.clear(self._faults.array, self._place.stream)
        for row in range(count):
            self._decode(row)
            fault = self._faults.array[row].part(0, 1)
            picture = self.pixels.array.part(row, row + 1)
            self._kernels.to_pixels(self._output, picture, fault).enqueue(self._place.stream)
        self.pixels.fetch(count)
        self._faults.fetch()

    def check(self) -> None:
        """Of the last `draw`, once the device is done.

        Raises:
            NumericsError: A picture had NaN or Inf.
        """
        check_finite(np.where(self._faults.host, np.nan, 0.0), Component.VAE_DECODER)

    def decode(self, count: int) -> list[Array]:
        """As `draw`, without pixels; gives where the images (H, W, 3) will be, in the format of the engine."""
        shape = self._output.shape[1:]
        if self._images is None:
            self._images = self._memory.pinned((len(self.latents), *shape), self._output.dtype)
        for row in range(count):
            self._decode(row)
            self._place.device.download(self._images[row], self._output[0], self._place.stream)
        return [self._images[row] for row in range(count)]

    def values(self, image: Array) -> Array:
        """Float32 of what `decode` gave, a copy."""
        return decode(image, self._output.dtype).astype(np.float32)

    def close(self) -> None:
        """Give memory and graph back, once the device is done with them."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        self._place.device.synchronise(self._place.stream)
        self._memory.close()

    def _decode(self, row: int) -> None:
        """Enqueue the decoder for one row; its graph is the same for all of them."""
        device, stream = self._place.device, self._place.stream
        if self._graph is None:
            self._engine.enqueue(stream)  # see `DeviceStep`
            self._graph = recorded(self._engine, self._place, lambda: self._engine.enqueue(stream))
        device.copy(self._input, self.latents[row].reshape(*self._input.shape), stream)
        self._graph.launch(stream)
