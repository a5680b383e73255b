"""One step program of the U-Net on a device: `rt/step.py` with buffers that only the device sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rt.backends import DeviceEngine
from rt.cuda import DeviceArray
from rt.cuda.formats import Array, encode
from rt.cuda.memory import Memory, Mirror
from rt.engines import Place
from rt.errors import BackendError


@dataclass(frozen=True, eq=False)
class TimeFeatures:
    """Input buffers that change with the timestep and lie side by side in memory, so that one launch fills them.

    Attributes:
        buffers: By name, in the order of memory.
        rows: Of the batch.
        out: All of them, flat.
        owner: Which row of the batch each element belongs to.
        table: (steps, elements), what `out` is to hold when all rows are at that step.
    """

    buffers: Mapping[str, DeviceArray]
    rows: int
    out: DeviceArray
    owner: Mirror
    table: Mirror

    def write(self, step: int, row: int, sides: Sequence[Mapping[str, Array]]) -> None:
        """What the timestep of `row` gave for its unconditional and conditional side, or one of them.

        Where both sides share a buffer's row, that of the conditional one.
        """
        line, start = self.table.host[step], 0
        for name, buffer in self.buffers.items():
            sided = line[start : start + buffer.size].reshape(-1, self.rows, buffer.size // len(buffer))
            for target, values in zip(sided, sides[-len(sided) :], strict=True):
                target[row] = encode(values[name].reshape(-1), buffer.dtype)
            start += buffer.size


class DeviceStep:
    """A step with or without guidance, full or shallow; rows of a buffer as in `rt.step.Step`.

    Its engine has run once, so that it can be captured.

    Args:
        engine: The program.
        place: Where it runs.
        steps: Of the longest schedule.

    Attributes:
        engine: The program.
        latents: (B, C, h, w), its input.
        prediction: (B or 2B, C, h, w), its output.
        times: Everything that changes with the timestep, a launch each. How many there are is decided by whoever
            allocated the inputs of the engine: one where they are `rt.cuda.memory.side_by_side`, as many as there
            are inputs, 22 in SD 1.5, where each was allocated by itself.
    """

    def __init__(self, engine: DeviceEngine, place: Place, steps: int) -> None:
        self.engine = engine
        self._device, self._stream = place.device, place.stream
        self._memory = memory = Memory(place.device, place.stream)
        self.latents, self.prediction = engine.inputs["latents"], engine.outputs["prediction"]
        self._contexts = {k: array for k, array in engine.inputs.items() if k.startswith("context_")}
        times = {k: array for k, array in engine.inputs.items() if k.startswith("time_")}
        try:
            self.times = [self._features(group, memory, steps) for group in _adjacent(times)]
            self._surroundings = {
                name: memory.pinned(engine.inputs[name].shape, engine.inputs[name].dtype)
                for name in ("mask", "around")
                if name in engine.inputs
            }
            self._steered = memory.pinned(self.latents.shape[1:], self.latents.dtype)
            for array in engine.inputs.values():
                place.device.clear(array, place.stream)  # rows may stay without a picture
            # An engine may allocate and choose its kernels at its first call, which a capture forbids.
            engine.enqueue(place.stream)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give back what is not the engine's, once the device is done with it."""
        self._device.synchronise(self._stream)
        self._memory.close()

    def take_context(self, picture: int, side: int, outputs: Mapping[str, DeviceArray]) -> None:
        """Copy what one text of a picture gave, whose arrays have a batch of one.

        Args:
            picture: Row of the batch.
            side: Which of the picture's sides that text is, of those that the program has: 0 for the first, the
                unconditional one under guidance, 1 for the second.
            outputs: Of the context engine, by name.

        Raises:
            BackendError: The two engines were built for different formats.
        """
        for name, array in self._contexts.items():
            sided = range(picture, len(array), len(self.latents))
            source = outputs[name][0]
            if source.dtype != array.dtype:
                raise BackendError(
                    f"unet_context gives {name} as {source.dtype}, and the step takes {array.dtype}; build again"
                )
            self._device.copy(array[sided[side]], source, self._stream)

    def write_inpainting(self, around: Sequence[tuple[Array, Array] | None]) -> None:
        """Mask and surroundings of each picture; rows after the last repeat it."""
        if not any(around):
            return
        for index, (name, staged) in enumerate(self._surroundings.items()):
            for picture, both in enumerate(around):
                if both is not None:
                    staged[picture:] = encode(both[index], self.engine.inputs[name].dtype)
            self._device.upload(self.engine.inputs[name], staged, self._stream)

    def write_latents(self, picture: int, values: Array) -> None:
        """Put scaled latents (C, h, w) in the place of those that the last step left; not twice without waiting."""
        self._steered[...] = encode(values, self.latents.dtype)
        self._device.upload(self.latents[picture], self._steered, self._stream)

    def take_over(self, before: DeviceStep) -> None:
        """Go on from another program: its latents, and where this one is shallow the features that it kept."""
        self._device.copy(self.latents, before.latents, self._stream)
        if "deep" in self.engine.inputs:
            self._device.copy(self.engine.inputs["deep"], before.engine.outputs["deep"], self._stream)

    def _features(self, buffers: Mapping[str, DeviceArray], memory: Memory, steps: int) -> TimeFeatures:
        first = next(iter(buffers.values()))
        elements = sum(buffer.size for buffer in buffers.values())
        owner = memory.mirror((elements,), "int32")
        owner.host[...] = np.concatenate(
            [
                np.repeat(np.arange(len(buffer)) % len(self.latents), buffer.size // len(buffer))
                for buffer in buffers.values()
            ]
        )
        owner.send()
        return TimeFeatures(
            buffers=buffers,
            rows=len(self.latents),
            out=DeviceArray(first.pointer, (elements,), first.dtype),
            owner=owner,
            table=memory.mirror((steps, elements), first.dtype),
        )


def _adjacent(arrays: Mapping[str, DeviceArray]) -> list[dict[str, DeviceArray]]:
    """Arrays of one format that follow each other in memory without a gap, together."""
    groups: list[dict[str, DeviceArray]] = []
    end: tuple[int, str] | None = None
    for name, array in sorted(arrays.items(), key=lambda item: item[1].pointer):
        if end == (array.pointer, array.dtype):
            groups[-1][name] = array
        else:
            groups.append({name: array})
        end = (array.pointer + array.nbytes, array.dtype)
    return groups
