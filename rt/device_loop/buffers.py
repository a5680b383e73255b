"""All that a loop keeps on the device, allocated once for schedules of so many steps."""

from __future__ import annotations

import numpy as np

from rt.cuda import DeviceArray
from rt.cuda.memory import Memory
from rt.device_loop.step import DeviceStep
from rt.engines import Engines, Place
from rt.model import Component
from rt.plan import StepProgram
from rt.samplers.packed import COLUMNS, RING_H, RING_X
from rt.shapes import ShapeProfile


class Buffers:
    """For B rows of E elements. What is called a mirror in `rt.cuda.memory` is on the host, too.

    Args:
        engines: Of the programs.
        place: Where they run.
        profile: The shape.
        elements: E.
        steps: Of the longest schedule that fits.
        draws: Room for noise, `steps` or, for samplers without, 1.

    Attributes:
        table: Mirror (B, steps, COLUMNS.count), see `rt.samplers.packed`.
        length: Mirror (B,), see there.
        scale: Mirror (B,), what the first latents are multiplied by for the network.
        factor: Mirror (B,), 1 unless guidance is rescaled.
        broken: Mirror (B,), number from 1 of the first step that went wrong, or 0.
        position: (B,) and `upcoming` (B,): the counters of rt/kernels/guide_and_step.py.
        noise: Mirror (B, draws, E).
        state: (B, RING_X + RING_H, E).
        latents: (B, E), on the host: the first on their way up, later the last on their way down.
        texts: (2 B, 1, T, D), on the host: what the context engine is given for each text of a run.
    """

    def __init__(
        self, engines: Engines, place: Place, profile: ShapeProfile, elements: int, *, steps: int, draws: int
    ) -> None:
        self.steps, self.draws = steps, draws
        self._engines, self._place, self._profile = engines, place, profile
        self._programs: dict[StepProgram, DeviceStep] = {}
        self._memory = memory = Memory(place.device, place.stream)
        batch = profile.batch_size
        try:
            self.table = memory.mirror((batch, steps, COLUMNS.count), "float32")
            self.length = memory.mirror((batch,), "int32")
            self.scale = memory.mirror((batch,), "float32")
            self.factor = memory.mirror((batch,), "float32")
            self.broken = memory.mirror((batch,), "int32")
            self.position = memory.array((batch,), "int32")
            self.upcoming = memory.array((batch,), "int32")
            self.noise = memory.mirror((batch, draws, elements), "float32")
            self.state = memory.array((batch, RING_X + RING_H, elements), "float32")
            self.latents = memory.pinned((batch, elements), "float32")
            context = engines.on_device(Component.UNET_CONTEXT).inputs["context"]
            self.texts = memory.pinned((2 * batch, *context.shape), context.dtype)
        except BaseException:
            self.close()
            raise

    def fits(self, steps: int, *, noisy: bool) -> bool:
        """Whether a run is possible in them."""
        return steps <= self.steps and (self.draws == self.steps or not noisy)

    def step(self, program: StepProgram) -> DeviceStep:
        """A program with its buffers, made when it is first asked for."""
        if program not in self._programs:
            component, guided = program
            engine = self._engines.on_device(component, self._profile, guided=guided)
            self._programs[program] = DeviceStep(engine, self._place, self.steps)
        return self._programs[program]

    def x(self, row: int, position: int) -> DeviceArray:
        """Where x of that position is, (1, E)."""
        place = position % RING_X
        return self.state[row].part(place, place + 1)

    def reset(self) -> None:
        """Counters, faults, factors and state as before the first step."""
        for array in (self.position, self.upcoming, self.broken.array, self.state):
            self._place.device.clear(array, self._place.stream)
        self.factor.host[...] = np.float32(1)
        self.factor.send()

    def close(self) -> None:
        """Give everything back, once the device is done with it."""
        self._place.device.synchronise(self._place.stream)
        while self._programs:
            self._programs.popitem()[1].close()
        self._memory.close()
