"""One profile of a bundle on one device: fixed buffers, and the sampling loop over rows that step on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rt.conditioning import Conditioning, contexts
from rt.engines import Engines
from rt.errors import ConfigError
from rt.inpainting import Inpainting
from rt.model import Component, ModelSpec
from rt.noise import Generator
from rt.samplers import Schedule
from rt.shapes import ShapeProfile
from rt.step import Step
from rt.time_table import TimeTable
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
    noise: Generator
    cond: Conditioning
    uncond: Conditioning | None
    guidance_scale: float
    guidance_rescale: float = 0.0
    latents: Float32 | None = None
    inpainting: Inpainting | None = None

    def sides(self, *, guided: bool) -> list[Conditioning]:
        """Unconditional and conditional text, or the conditional one alone."""
        return [self.uncond, self.cond] if guided and self.uncond is not None else [self.cond]


OnStep = Callable[[int, Sequence[Trajectory]], bool]
"""Called after each step with its index and the rows; returns whether to go on."""


class Session:
    """The loop at one shape. Owned by one thread; results are valid until the next `denoise`.

    `calls` counts the U-Net calls of the last one.
    """

    def __init__(self, engines: Engines, spec: ModelSpec, profile: ShapeProfile) -> None:
        self.profile = profile
        self.calls = 0
        self._engines = engines
        self._shape = spec.latent_shape(profile.height, profile.width)
        self._time = TimeTable(engines.get(Component.UNET_TIME), (profile.height, profile.width))
        self._trajectories = [Trajectory(self._shape) for _ in range(profile.batch_size)]

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
        if len({row.uncond is None for row in rows}) > 1:
            raise ConfigError(
                "rows with guidance and rows without cannot share a run: give all of them uncond, or none"
            )
        trajectories = self._trajectories[: len(rows)]
        for trajectory, row in zip(trajectories, rows, strict=True):
            trajectory.start(
                row.schedule,
                noise=row.noise,
                guidance_scale=row.guidance_scale,
                guidance_rescale=row.guidance_rescale,
                latents=row.latents,
            )
        self._time.prepare(
            (timestep, side)
            for row in rows
            for side in row.sides(guided=True)
            for timestep in row.schedule.timesteps
        )
        self._loop(rows, trajectories, _Programs(self._engines, self.profile, rows), on_step)
        return [trajectory.latents for trajectory in trajectories]

    def _loop(
        self,
        rows: Sequence[Row],
        trajectories: Sequence[Trajectory],
        programs: _Programs,
        on_step: OnStep | None,
    ) -> None:
        self.calls = 0
        for step in range(max(len(trajectory.schedule) for trajectory in trajectories)):
            running = [(index, t) for index, t in enumerate(trajectories) if not t.done]
            guided = any(t.guided and rows[index].uncond is not None for index, t in running)
            unet = programs.choose(guided=guided, full=any(t.full for _, t in running))
            for index, trajectory in running:
                trajectory.feed(unet.latents[index])
                sides = rows[index].sides(guided=guided)
                unet.write_time(index, [self._time[trajectory.timestep, side] for side in sides])
            unet.run()
            self.calls += 1
            for index, trajectory in running:
                cond, uncond = unet.prediction(index)
                trajectory.guide_and_step(cond, uncond if trajectory.guided else None)
            if on_step is not None and not on_step(step, trajectories):
                break


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
            None if row.inpainting is None else (row.inpainting.mask, row.inpainting.around(row.noise))
            for row in rows
        ]
        self._steps: dict[tuple[Component, bool], Step] = {}
        self._kept: bool | None = None
        self._taken = False

    def choose(self, *, guided: bool, full: bool) -> Step:
        """The program of the next step. It is full, too, where no step of this guidance has kept features before it."""
        if full or self._kept is not guided:
            self._kept, self._taken = guided, False
            return self._step(Component.UNET, guided)
        shallow = self._step(Component.UNET_SHALLOW, guided)
        if not self._taken:
            shallow.take_deep(self._step(Component.UNET, guided))
            self._taken = True
        return shallow

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
