"""One profile of a bundle on one device: fixed buffers, and the sampling loop over rows that step on their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rt.conditioning import Conditioning, contexts
from rt.engines import Engines
from rt.errors import ConfigError, NumericsError
from rt.images import postprocess
from rt.inpainting import Inpainting
from rt.model import Component, ModelSpec
from rt.noise import Noise
from rt.plan import PlannedStep, StepProgram, plan
from rt.samplers import Schedule
from rt.shapes import ShapeProfile
from rt.step import Step
from rt.time_table import Moment, TimeTable
from rt.trajectory import Trajectory

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One picture to draw, with everything that is its own.

    Attributes:
        schedule: Its sampler and steps.
        noise: Its stream of noise.
        cond: The prompt.
        uncond: The negative prompt, None without guidance; all rows of a run agree on having one.
        guidance_scale: See `Trajectory.start`.
        guidance_rescale: See `Trajectory.start`.
        latents: Unit noise (C, h, w) to begin with instead of drawing it.
        inpainting: Mask and surroundings, for an inpainting model only.
    """

    schedule: Schedule
    noise: Noise
    cond: Conditioning
    uncond: Conditioning | None
    guidance_scale: float
    guidance_rescale: float = 0.0
    latents: Float32 | None = None
    inpainting: Inpainting | None = None

    def sides(self, *, guided: bool) -> list[Conditioning]:
        """Unconditional and conditional text, or the conditional one alone."""
        return [self.uncond, self.cond] if guided and self.uncond is not None else [self.cond]


class RowState(Protocol):
    """How far a row of a run has come."""

    @property
    def schedule(self) -> Schedule:
        """That it follows."""

    @property
    def position(self) -> int:
        """Steps done, on a GPU enqueued: the device may still be at one of the last two. Its x is that after them."""

    @property
    def latents(self) -> Float32:
        """The current x (C, h, w); assign to it to steer. On a GPU, reading or assigning waits for the step."""

    @latents.setter
    def latents(self, values: Float32) -> None: ...


OnStep = Callable[[int, Sequence[RowState]], bool]
"""Called after each step with its index and the rows; returns whether to go on."""


class Loop(Protocol):
    """What `Session` is on the host and `DeviceSession` on a GPU: runs rows, then shows what became of them."""

    @property
    def calls(self) -> int:
        """Calls of the U-Net in the last run."""

    def run(self, rows: Sequence[Row], on_step: OnStep | None = None) -> None:
        """Take every row through its schedule; see `Session.denoise`."""

    def latents(self) -> list[Float32]:
        """Of each row of the last run (C, h, w), valid until the next."""

    def images(self) -> Iterator[Float32]:
        """The same decoded, float32 (H, W, 3) in [-1, 1] and a little beyond."""

    def pixels(self) -> Iterator[NDArray[np.uint8]]:
        """The same as pictures, (H, W, 3)."""

    def close(self) -> None:
        """Give back what it holds; the engines stay."""


class Session:
    """The loop at one shape. Owned by one thread; results are valid until the next run.

    `calls` counts the U-Net calls of the last one.
    """

    def __init__(self, engines: Engines, spec: ModelSpec, profile: ShapeProfile) -> None:
        self.profile = profile
        self.calls = 0
        self._engines = engines
        self._shape = spec.latent_shape(profile.height, profile.width)
        self._time = TimeTable(engines.get(Component.UNET_TIME), (profile.height, profile.width))
        self._trajectories = [Trajectory(self._shape) for _ in range(profile.batch_size)]
        self._active: list[Trajectory] = []

    def denoise(self, rows: Sequence[Row], on_step: OnStep | None = None) -> list[Float32]:
        """Run every row through its own schedule; they share each call of the U-Net that they overlap in.

        Args:
            rows: At most `profile.batch_size`; a row does not depend on its neighbours, unless one reuses features
                at a step where another does not: then both get a full step.
            on_step: See `OnStep`.

        Returns:
            The latents of each row (C, h, w), as views.

        Raises:
            ConfigError: When only some rows have guidance.
            NumericsError: When the U-Net gives NaN or Inf.
        """
        self.run(rows, on_step)
        return self.latents()

    def run(self, rows: Sequence[Row], on_step: OnStep | None = None) -> None:
        """As `denoise`, without a result."""
        steps = plan([row.schedule for row in rows], guided=all_guided(rows))
        self._active = self._trajectories[: len(rows)]
        for trajectory, row in zip(self._active, rows, strict=True):
            trajectory.start(
                row.schedule,
                noise=row.noise,
                guidance_scale=row.guidance_scale,
                guidance_rescale=row.guidance_rescale,
                latents=row.latents,
            )
        self._time.prepare(moments(rows))
        self._loop(rows, steps, _Programs(self._engines, self.profile, rows), on_step)

    def latents(self) -> list[Float32]:
        """See `Loop`; views."""
        return [trajectory.latents for trajectory in self._active]

    def images(self) -> Iterator[Float32]:
        """See `Loop`; each is valid until the next.

        Raises:
            NumericsError: When the decoder gives NaN or Inf.
        """
        decoder = self._engines.get(
            Component.VAE_DECODER, ShapeProfile(self.profile.height, self.profile.width)
        )
        for latents in self.latents():
            np.copyto(decoder.inputs["latents"][0], latents)
            decoder.enqueue()
            image = decoder.outputs["image"][0]
            check_finite(image, Component.VAE_DECODER)
            yield image

    def pixels(self) -> Iterator[NDArray[np.uint8]]:
        """See `Loop`; raises as `images`."""
        return map(postprocess, self.images())

    def close(self) -> None:
        """See `Loop`: nothing but arrays, which go with it."""

    def _loop(
        self, rows: Sequence[Row], steps: Sequence[PlannedStep], programs: _Programs, on_step: OnStep | None
    ) -> None:
        self.calls = 0
        for index, step in enumerate(steps):
            unet = programs.prepare(step)
            running = [(row, self._active[row]) for row in step.running]
            for row, trajectory in running:
                trajectory.feed(unet.latents[row])
                sides = rows[row].sides(guided=step.guided)
                unet.write_time(row, [self._time[trajectory.timestep, side] for side in sides])
            unet.run()
            self.calls += 1
            for row, trajectory in running:
                cond, uncond = unet.prediction(row)
                trajectory.guide_and_step(cond, uncond if trajectory.guided else None)
            if on_step is not None and not on_step(index, self._active):
                break


def all_guided(rows: Sequence[Row]) -> bool:
    """Whether the rows have an unconditional side, which all of a run have or none.

    Raises:
        ConfigError: Some do.
    """
    if len({row.uncond is None for row in rows}) > 1:
        raise ConfigError(
            "rows with guidance and rows without cannot share a run: give all of them uncond, or none"
        )
    return rows[0].uncond is not None


def moments(rows: Sequence[Row]) -> Iterator[Moment]:
    """Every timestep with every text that it may be mixed with."""
    for row in rows:
        for side in row.sides(guided=True):
            for timestep in row.schedule.timesteps:
                yield timestep, side


def check_finite(output: NDArray[Any], component: Component) -> None:
    """Rather an error than a black picture.

    Raises:
        NumericsError: With the component that gave NaN or Inf.
    """
    if not np.isfinite(output).all():
        raise NumericsError(
            f"{component.value} gave NaN or Inf; build with --dtype fp32 or --bf16, or check the weights with rt verify"
        )


class _Programs:
    """The step programs of one run, each told of text and surroundings when it is first needed."""

    def __init__(self, engines: Engines, profile: ShapeProfile, rows: Sequence[Row]) -> None:
        self._engines, self._profile = engines, profile
        # Rows without a picture repeat the last one's text.
        self._rows = [*rows, *[rows[-1]] * (profile.batch_size - len(rows))]
        self._contexts = contexts(
            engines.get(Component.UNET_CONTEXT), {side for row in rows for side in row.sides(guided=True)}
        )
        self._around = [
            None if row.inpainting is None else (row.inpainting.mask, row.inpainting.around) for row in rows
        ]
        self._steps: dict[StepProgram, Step] = {}

    def prepare(self, step: PlannedStep) -> Step:
        """The program of the next step, with the features that it needs of the one before."""
        unet = self._step(*step.program)
        if step.takes_deep:
            unet.take_deep(self._step(Component.UNET, step.guided))
        return unet

    def _step(self, component: Component, guided: bool) -> Step:
        if (component, guided) not in self._steps:
            step = Step(self._engines.get(component, self._profile, guided=guided))
            step.clear()
            for picture, row in enumerate(self._rows):
                step.write_context(picture, [self._contexts[side] for side in row.sides(guided=guided)])
            for picture, around in enumerate(self._around):
                if around is not None:
                    step.write_inpainting(picture, *around)
            self._steps[component, guided] = step
        return self._steps[component, guided]
