"""The kernels of the sampling loop (rt/kernels), each as one call on arrays of a device.

What the kernels compute, and the layout of their arrays, is written at the kernels themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rt.cuda import DeviceArray, Kernel, KernelLibrary, Stream


@dataclass(frozen=True)
class Launch:
    """A kernel that is loaded, with its arrays: nothing is left to do but to enqueue it, which a capture allows."""

    kernel: Kernel
    sizes: Mapping[str, int]
    inputs: Sequence[DeviceArray]
    outputs: Sequence[DeviceArray]

    def enqueue(self, stream: Stream) -> None:
        """In the order of the stream."""
        self.kernel.launch(stream, self.sizes, self.inputs, self.outputs)


class LoopKernels:
    """A launch for arrays, whose kernel is found by their formats and loaded when it is asked for first.

    Arrays are flat a row: shapes below are (rows, elements) of whatever they really are.

    Raises:
        BackendError: Every method, where no kernel was compiled for the formats of the arrays.
    """

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library

    def select_rows(
        self,
        table: DeviceArray,
        owner: DeviceArray,
        upcoming: DeviceArray,
        out: DeviceArray,
        position: DeviceArray,
    ) -> Launch:
        """Begin a step: move the counters, and take from table (steps, elements) what each row's timestep gave."""
        steps, elements = table.shape
        sizes = {"rows": len(position), "steps": steps, "elements": elements}
        kernel = self._library.get(
            "select_rows", dtypes={"table": table.dtype, "out": out.dtype}, sizes=sizes
        )
        return Launch(kernel, sizes, [table, owner, upcoming], [out, position])

    def feed(
        self,
        state: DeviceArray,
        position: DeviceArray,
        scale: DeviceArray,
        out: DeviceArray,
        broken: DeviceArray,
    ) -> Launch:
        """Latents for a network: out (rows, elements) from state (rows, places, elements)."""
        sizes = {"rows": len(state), "elements": state.shape[-1]}
        kernel = self._library.get("feed", dtypes={"out": out.dtype}, sizes=sizes)
        return Launch(kernel, sizes, [state, position, scale], [out, broken])

    def guidance_rescale(
        self,
        prediction: DeviceArray,
        table: DeviceArray,
        length: DeviceArray,
        position: DeviceArray,
        factor: DeviceArray,
    ) -> Launch:
        """The factor (rows,) of each row's guided prediction."""
        rows, steps, _ = table.shape
        sides, elements = len(prediction) // rows, prediction.size // len(prediction)
        sizes = {"rows": rows, "sides": sides, "steps": steps, "elements": elements}
        kernel = self._library.get("guidance_rescale", dtypes={"prediction": prediction.dtype}, sizes=sizes)
        return Launch(kernel, sizes, [prediction, table, length, position], [factor])

    def guide_and_step(
        self,
        prediction: DeviceArray,
        factor: DeviceArray,
        table: DeviceArray,
        length: DeviceArray,
        position: DeviceArray,
        noise: DeviceArray,
        state: DeviceArray,
        latents: DeviceArray,
        upcoming: DeviceArray,
        broken: DeviceArray,
    ) -> Launch:
        """Guidance, the sampler's step and the next input of the network, for all rows."""
        rows, steps, _ = table.shape
        sizes = {
            "rows": rows,
            "sides": len(prediction) // rows,
            "steps": steps,
            "draws": noise.shape[1],
            "elements": state.shape[-1],
        }
        dtypes = {"prediction": prediction.dtype, "latents": latents.dtype}
        kernel = self._library.get("guide_and_step", dtypes=dtypes, sizes=sizes)
        return Launch(
            kernel,
            sizes,
            [prediction, factor, table, length, position, noise],
            [state, latents, upcoming, broken],
        )

    def to_pixels(self, image: DeviceArray, pixels: DeviceArray, broken: DeviceArray) -> Launch:
        """8-bit pixels of pictures (batch, elements); broken (batch,) of one with NaN or Inf becomes 1."""
        sizes = {"batch": len(image), "elements": image.size // len(image)}
        kernel = self._library.get("to_pixels", dtypes={"x": image.dtype}, sizes=sizes)
        return Launch(kernel, sizes, [image], [pixels, broken])
