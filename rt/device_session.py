"""The sampling loop on a device: everything is uploaded before it, and its steps are launches of captured graphs.

    start:   coefficients, time features, contexts, first latents → device
    step:    select_rows → U-Net → (guidance_rescale) → guide_and_step        one graph a program, launched N times
    end:     feed → decoder → to_pixels → host                                 the first time that the host waits

How far each row has come is counted on the device, so a graph is the same at every step and for every sampler, and is
captured once. The host knows the order of programs from `rt.plan`; where it changes, a small graph hands over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from rt.cuda import KernelLibrary
from rt.device_loop import Buffers, Decoder, LoopKernels, Run, StepGraphs
from rt.engines import Engines
from rt.errors import ConfigError
from rt.model import Component, ModelSpec
from rt.session import OnStep, Row, all_guided, check_finite, moments
from rt.shapes import ShapeProfile
from rt.time_table import TimeTable

Float32 = NDArray[np.float32]

AHEAD = 2
"""Steps that are enqueued before the host asks whether to go on: the device has work meanwhile, and stops soon."""
FEWEST_STEPS = 64
"""Room for a schedule at first; for a longer one it doubles until that fits."""


class GraphMode(Enum):
    """How a run is launched.

    Attributes:
        STEP: A graph a step.
        LOOP: One graph with all steps in it, where nobody watches the run, which then cannot be stopped; a watched run
            goes step by step. The graph is put together anew for another order of programs.
    """

    STEP = "step"
    LOOP = "loop"


class DeviceSession:
    """`rt.session.Session` on a device, with the same results. Owned by one thread, and closed by it.

    A run that nobody watches is enqueued as a whole. NaN or Inf is found when results are read. `on_step` is called
    once its step is enqueued, at most `AHEAD` steps before it is done; a callback that reads latents waits for it.

    Args:
        engines: Of a backend that runs on a device.
        kernels: The loop's kernels, for that device.
        spec: The model.
        profile: The shape.
        mode: See `GraphMode`.

    Raises:
        ConfigError: The engines run on the host.
    """

    def __init__(
        self,
        engines: Engines,
        kernels: KernelLibrary,
        spec: ModelSpec,
        profile: ShapeProfile,
        *,
        mode: GraphMode = GraphMode.STEP,
    ) -> None:
        if engines.place is None:
            raise ConfigError("these engines run on the host; rt.session.Session is for them")
        self.profile = profile
        self._engines, self._place, self._mode = engines, engines.place, mode
        self._place.device.activate()
        self._kernels = LoopKernels(kernels)
        self._shape = spec.latent_shape(profile.height, profile.width)
        self._time = TimeTable(engines.get(Component.UNET_TIME), (profile.height, profile.width))
        # One that the end of a run is waited for with, and those of its steps.
        self._done, *self._ahead = self._events = [
            self._place.device.create_event() for _ in range(1 + AHEAD)
        ]
        self._held: tuple[Buffers, StepGraphs] | None = None
        self._decoder: Decoder | None = None
        self._run: Run | None = None

    @property
    def calls(self) -> int:
        """U-Net calls of the last run."""
        return 0 if self._run is None else self._run.calls

    def __enter__(self) -> DeviceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and graphs back; the engines stay loaded."""
        self._place.device.activate()
        self._place.device.synchronise(self._place.stream)
        self._drop_buffers()
        if self._decoder is not None:
            self._decoder.close()
        for event in self._events:
            self._place.device.destroy_event(event)
        self._decoder, self._events, self._run = None, [], None

    def denoise(self, rows: Sequence[Row], on_step: OnStep | None = None) -> list[Float32]:
        """As `rt.session.Session.denoise`; raises NumericsError at the end rather than at the step."""
        self.run(rows, on_step)
        return self.latents()

    def run(self, rows: Sequence[Row], on_step: OnStep | None = None) -> None:
        """Enqueue a run; returns before the device has finished it.

        Raises:
            ConfigError: Only some rows have guidance.
            MemoryError: The buffers do not fit into the memory of the device.
        """
        self._place.device.activate()
        all_guided(rows)
        self._run = None  # if nobody has read it, the device may see a mix of both until this one begins
        self._time.prepare(moments(rows))
        buffers, graphs = self._room(rows)
        self._run = Run(
            self._engines, self._place, buffers, graphs, self._kernels, rows, self._shape, self._done
        )
        self._run.upload(self._time)
        if self._mode is GraphMode.LOOP and on_step is None:
            self._run.launch_whole()
        else:
            self._run.launch(on_step, self._ahead)

    def latents(self) -> list[Float32]:
        """Of each row of the last run (C, h, w), copies.

        Raises:
            NumericsError: The run gave NaN or Inf.
        """
        return self._last().latents()

    def images(self) -> Iterator[Float32]:
        """See `rt.session.Loop`; all are decoded before the first is given, and are copies.

        Raises:
            NumericsError: The run or the decoder gave NaN or Inf.
        """
        run, decoder = self._last(), self._fed_decoder()
        staged = decoder.decode(len(run.rows))
        run.finish()
        images = [decoder.values(image) for image in staged]
        for image in images:
            check_finite(image, Component.VAE_DECODER)
        return iter(images)

    def pixels(self) -> Iterator[NDArray[np.uint8]]:
        """See `rt.session.Loop`; raises as `images`, and downloads nothing but pixels and flags."""
        run, decoder = self._last(), self._fed_decoder()
        decoder.draw(len(run.rows))
        run.finish()
        decoder.check()
        return iter(decoder.pixels.host[: len(run.rows)].copy())

    def _last(self) -> Run:
        if self._run is None:
            raise ConfigError("there is no run to read from: call run first, and read before close")
        self._place.device.activate()
        return self._run

    def _fed_decoder(self) -> Decoder:
        """The decoder, with the latents of the last run on their way to it."""
        if self._decoder is None:
            engine = self._engines.on_device(
                Component.VAE_DECODER, ShapeProfile(self.profile.height, self.profile.width)
            )
            self._decoder = Decoder(engine, self._place, self._kernels, self.profile.batch_size)
        self._last().feed(self._decoder.ones.array, self._decoder.latents)
        return self._decoder

    def _room(self, rows: Sequence[Row]) -> tuple[Buffers, StepGraphs]:
        """Buffers that these schedules fit into: those that there are, or larger ones in their place."""
        steps = max(len(row.schedule) for row in rows)
        noisy = any(row.schedule.noisy.any() for row in rows)
        if self._held is not None:
            held = self._held[0]
            if held.fits(steps, noisy=noisy):
                return self._held
            steps, noisy = max(steps, held.steps), noisy or held.draws == held.steps
            self._drop_buffers()
        steps = max(FEWEST_STEPS, 1 << (steps - 1).bit_length())
        elements = math.prod(self._shape)
        draws = steps if noisy else 1
        buffers = Buffers(self._engines, self._place, self.profile, elements, steps=steps, draws=draws)
        self._held = buffers, StepGraphs(self._place, buffers, self._kernels)
        return self._held

    def _drop_buffers(self) -> None:
        if self._held is not None:
            buffers, graphs = self._held
            graphs.close()
            buffers.close()
            self._held = None
