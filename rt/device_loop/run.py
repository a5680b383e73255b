"""One run of rows: uploaded, launched step by step or as a whole, and read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rt.conditioning import contexts
from rt.cuda import DeviceArray
from rt.cuda.device import Event
from rt.cuda.formats import encode
from rt.device_loop.buffers import Buffers
from rt.device_loop.graphs import StepGraphs
from rt.device_loop.kernels import LoopKernels
from rt.device_loop.step import DeviceStep
from rt.engines import Engines, Place
from rt.errors import NumericsError
from rt.model import Component
from rt.plan import PlannedStep, StepProgram, plan
from rt.samplers import Schedule
from rt.samplers.packed import COLUMNS, pack, set_apart
from rt.session import OnStep, Row, all_guided
from rt.time_table import TimeTable
from rt.trajectory import broken

Float32 = NDArray[np.float32]


class Run:
    """Rows on their way through the buffers of a session, which only one run at a time may use.

    Args:
        rows: What to draw.
        shape: Of their latents (C, h, w).
        done: An event to wait with, so that the host sleeps: waiting for a stream may spin.

    Attributes:
        rows: As given.
        calls: U-Net calls so far.

    Raises:
        ConfigError: Only some rows have guidance.
    """

    def __init__(
        self,
        engines: Engines,
        place: Place,
        buffers: Buffers,
        graphs: StepGraphs,
        kernels: LoopKernels,
        rows: Sequence[Row],
        shape: tuple[int, ...],
        done: Event,
    ) -> None:
        self.rows, self.calls = rows, 0
        self.progress = [RowProgress(self, index, row.schedule) for index, row in enumerate(rows)]
        self._engines, self._place, self._buffers = engines, place, buffers
        self._graphs, self._kernels, self._shape, self._done = graphs, kernels, shape, done
        self._guided = all_guided(rows)
        self._steps = plan([row.schedule for row in rows], guided=self._guided)
        self._rescaled = self._guided and any(row.guidance_rescale for row in rows)
        # What is not there yet is captured now: an engine's first call writes into its buffers.
        for before, step in zip([None, *self._steps[:-1]], self._steps, strict=True):
            graphs.of(before, step, rescaled=self._rescaled)

    def upload(self, times: TimeTable) -> None:
        """Everything that the steps read, but their noise. `times` knows the moments of all rows."""
        self._write_tables()
        around = [
            None if row.inpainting is None else (row.inpainting.mask, row.inpainting.around)
            for row in self.rows
        ]
        programs = {step.program: self._buffers.step(step.program) for step in self._steps}
        for (_, guided), unet in programs.items():
            unet.write_inpainting(around)
            self._write_times(unet, times, guided=guided)
        self._write_contexts(programs)
        first = programs[self._steps[0].program]
        self.feed(self._buffers.scale.array, first.latents)

    def launch(self, on_step: OnStep | None, events: Sequence[Event]) -> None:
        """Step by step; with `on_step`, no more of them are enqueued ahead of the device than there are events."""
        device, stream = self._place.device, self._place.stream
        for index, step in enumerate(self._steps):
            if on_step is not None and index >= len(events):
                device.wait(events[index % len(events)])
            self._send_noise(step, index)  # drawn while the device is busy with the steps before
            before = self._steps[index - 1] if index else None
            for graph in self._graphs.of(before, step, rescaled=self._rescaled):
                graph.launch(stream)
            self._count(step, index)
            if on_step is not None:
                device.record(events[index % len(events)], stream)
                if not on_step(index, self.progress):
                    break

    def launch_whole(self) -> None:
        """All steps at once."""
        for index, step in enumerate(self._steps):
            self._send_noise(step, index)
            self._count(step, index)
        self._graphs.whole(self._steps, rescaled=self._rescaled).launch(self._place.stream)

    def feed(self, scale: DeviceArray, out: DeviceArray) -> None:
        """The latents of all rows times `scale` (B,) into `out` (B, E), for a network and in its format."""
        buffers = self._buffers
        launch = self._kernels.feed(buffers.state, buffers.upcoming, scale, out, buffers.broken.array)
        launch.enqueue(self._place.stream)

    def finish(self) -> None:
        """Wait for the device, and find out whether the run went well.

        Raises:
            NumericsError: With the first step that gave NaN or Inf, or with the text that already did.
        """
        broken_at = self._buffers.broken
        broken_at.fetch()
        self._wait()
        faults = [(int(step), row) for row, step in enumerate(broken_at.host[: len(self.rows)]) if step]
        if not faults:
            return
        texts = {side for row in self.rows for side in row.sides(guided=True)}
        contexts(self._engines.get(Component.UNET_CONTEXT), texts)  # raises if a text is at fault
        step, row = min(faults)
        if step > self.progress[row].position:
            raise NumericsError(
                f"the latents after step {step - 1} are too large for the format of {Component.VAE_DECODER.value}; "
                f"build with --dtype fp32 or --bf16"
            )
        raise broken(self.rows[row].schedule, step - 1)

    def latents(self) -> list[Float32]:
        """Of each row (C, h, w), copies; waits, and raises as `finish`."""
        for progress in self.progress:
            self._fetch_latents(progress)
        self.finish()
        return [self._staged(progress.row).copy() for progress in self.progress]

    def read(self, progress: RowProgress) -> Float32:
        """Of one row, a copy; waits, and raises as `finish`."""
        self._fetch_latents(progress)
        self.finish()
        latents: Float32 = self._staged(progress.row).copy()
        return latents

    def replace(self, progress: RowProgress, values: Float32) -> None:
        """Put other latents in the place of a row's, and of what the network is to see next; waits."""
        self._set_apart(progress)
        self._wait()
        np.copyto(self._staged(progress.row), values)
        self._send_latents(progress.row, progress.position)
        if progress.program is not None and progress.position < len(progress.schedule):
            seen = values * progress.schedule.c_in[progress.position]
            self._buffers.step(progress.program).write_latents(progress.row, seen)
        self._wait()

    def _set_apart(self, progress: RowProgress) -> None:
        """Keep a row's own x where the network is to see another, and send the row of the table that reads it."""
        buffers, row, position = self._buffers, progress.row, progress.position
        table = buffers.table.host[row]
        if set_apart(progress.schedule, table[:, COLUMNS.weights :], position):
            device, stream = self._place.device, self._place.stream
            device.copy(buffers.x(row, position + 1), buffers.x(row, position), stream)
            device.upload(buffers.table.array[row][position], table[position], stream)

    def _wait(self) -> None:
        device = self._place.device
        device.record(self._done, self._place.stream)
        device.wait(self._done)

    def _write_tables(self) -> None:
        buffers = self._buffers
        idle = len(buffers.length.host) - len(self.rows)
        packed = pack(
            [*(row.schedule for row in self.rows), *[None] * idle],
            guidance_scale=[
                *(row.guidance_scale if self._guided else 1.0 for row in self.rows),
                *[1.0] * idle,
            ],
            guidance_rescale=[
                *(row.guidance_rescale if self._guided else 0.0 for row in self.rows),
                *[0.0] * idle,
            ],
            steps=buffers.steps,
        )
        for mirror, values in (
            (buffers.table, packed.table),
            (buffers.length, packed.length),
            (buffers.scale, packed.feed),
        ):
            mirror.host[...] = values
            mirror.send()
        buffers.reset()
        for index, row in enumerate(self.rows):
            start = self._staged(index)
            if row.latents is None:
                row.noise.randn(self._shape, out=start)
            else:
                np.copyto(start, row.latents)
            start *= np.float32(row.schedule.init_noise_sigma)
            self._send_latents(index, 0)

    def _write_times(self, unet: DeviceStep, times: TimeTable, *, guided: bool) -> None:
        longest = len(self._steps)
        for features in unet.times:
            features.table.host[:longest] = 0  # of rows that have ended, and of those without a picture
            for index, row in enumerate(self.rows):
                sides = row.sides(guided=guided)
                for step, timestep in enumerate(row.schedule.timesteps):
                    features.write(step, index, [times[float(timestep), side] for side in sides])
            features.table.send(longest)

    def _write_contexts(self, programs: dict[StepProgram, DeviceStep]) -> None:
        """Each text once, its keys and values straight into the inputs of every program."""
        engine = self._engines.on_device(Component.UNET_CONTEXT)
        target, staged = engine.inputs["context"], self._buffers.texts
        texts = dict.fromkeys(side for row in self.rows for side in row.sides(guided=True))
        for index, text in enumerate(texts):
            staged[index] = encode(text.states[None], target.dtype)
            self._place.device.upload(target, staged[index], self._place.stream)
            engine.enqueue(self._place.stream)
            for (_, guided), unet in programs.items():
                for picture, row in enumerate(self.rows):
                    for place, side in enumerate(row.sides(guided=guided)):
                        if side is text:
                            unet.take_context(picture, place, engine.outputs)

    def _send_noise(self, step: PlannedStep, index: int) -> None:
        noise = self._buffers.noise
        for row in step.running:
            if self.rows[row].schedule.noisy[index]:
                place = index % self._buffers.draws
                drawn = noise.host[row, place]
                self.rows[row].noise.randn(self._shape, out=drawn.reshape(self._shape))
                self._place.device.upload(noise.array[row][place], drawn, self._place.stream)

    def _count(self, step: PlannedStep, index: int) -> None:
        self.calls += 1
        for row in step.running:
            self.progress[row].position = index + 1
            self.progress[row].program = step.program

    def _staged(self, row: int) -> Float32:
        latents: Float32 = self._buffers.latents[row].reshape(self._shape)
        return latents

    def _send_latents(self, row: int, position: int) -> None:
        staged = self._buffers.latents[row : row + 1]
        self._place.device.upload(self._buffers.x(row, position), staged, self._place.stream)

    def _fetch_latents(self, progress: RowProgress) -> None:
        staged = self._buffers.latents[progress.row : progress.row + 1]
        source = self._buffers.x(progress.row, progress.position)
        self._place.device.download(staged, source, self._place.stream)


class RowProgress:
    """See `rt.session.RowState`.

    Attributes:
        row: Its index.
        schedule: That it follows.
        position: Steps enqueued; `latents` waits for the last of them.
        program: Of the last one.
    """

    def __init__(self, run: Run, row: int, schedule: Schedule) -> None:
        self.row, self.schedule = row, schedule
        self.position = 0
        self.program: StepProgram | None = None
        self._run = run

    @property
    def latents(self) -> Float32:
        """The current x (C, h, w), a copy; waits for it."""
        return self._run.read(self)

    @latents.setter
    def latents(self, values: Float32) -> None:
        self._run.replace(self, values)
