"""One profile of a bundle on one device: fixed buffers, and the sampling loop over rows that step on their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rt.backends import Engine
from rt.engines import Engines
from rt.errors import ConfigError
from rt.inpainting import Inpainting
from rt.model import Component, ModelSpec
from rt.noise import Generator
from rt.samplers import Schedule
from rt.shapes import ShapeProfile
from rt.time_table import TimeTable
from rt.trajectory import Trajectory

Float32 = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditioning:
    """What the text encoders made of one prompt: states (T, D), and pooled (P,) for SDXL."""

    states: Float32
    pooled: Float32 | None = None


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
        shape = spec.latent_shape(profile.height, profile.width)
        self._time = TimeTable(engines.get(Component.UNET_TIME))
        self._trajectories = [Trajectory(shape) for _ in range(profile.batch_size)]

    def denoise(self, rows: Sequence[Row], on_step: OnStep | None = None) -> list[Float32]:
        """Run every row through its own schedule; they share each call of the U-Net that they overlap in.

        Args:
            rows: At most `profile.batch_size`; a row does not depend on its neighbours.
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
        unet = self._engines.get(Component.UNET, self.profile, guided=rows[0].uncond is not None)
        trajectories = self._trajectories[: len(rows)]
        for trajectory, row in zip(trajectories, rows, strict=True):
            trajectory.start(
                row.schedule,
                noise=row.noise,
                guidance_scale=row.guidance_scale,
                guidance_rescale=row.guidance_rescale,
                latents=row.latents,
            )
        self._time.prepare(timestep for row in rows for timestep in row.schedule.timesteps)
        self._condition(unet, rows)
        self._loop(unet, trajectories, on_step)
        return [trajectory.latents for trajectory in trajectories]

    def _loop(self, unet: Engine, trajectories: Sequence[Trajectory], on_step: OnStep | None) -> None:
        latents = unet.inputs["latents"]
        # (1, B, …) without guidance, (2, B, …) with: unconditional rows first.
        time = unet.inputs["time"].reshape(-1, len(latents), unet.inputs["time"].shape[1])
        prediction = unet.outputs["prediction"].reshape(-1, *latents.shape)
        cond, uncond = prediction[-1], prediction[0] if len(prediction) == 2 else None
        self.calls = 0
        for step in range(max(len(trajectory.schedule) for trajectory in trajectories)):
            running = [(row, t) for row, t in enumerate(trajectories) if not t.done]
            for row, trajectory in running:
                trajectory.feed(latents[row])
                time[:, row] = self._time[trajectory.timestep]
            unet.enqueue()
            self.calls += 1
            for row, trajectory in running:
                trajectory.guide_and_step(cond[row], None if uncond is None else uncond[row])
            if on_step is not None and not on_step(step, trajectories):
                break

    def _condition(self, unet: Engine, rows: Sequence[Row]) -> None:
        """Write what stays the same for the whole loop; rows without a picture repeat the last one's."""
        padded = [*rows, *[rows[-1]] * (self.profile.batch_size - len(rows))]
        conditionings = [row.uncond for row in padded if row.uncond is not None] + [
            row.cond for row in padded
        ]
        for index, conditioning in enumerate(conditionings):
            unet.inputs["context"][index] = conditioning.states
            if conditioning.pooled is not None:
                size = (self.profile.height, self.profile.width)
                unet.inputs["pooled"][index] = conditioning.pooled
                unet.inputs["sizes"][index] = (*size, 0, 0, *size)
        for index, row in enumerate(rows):
            if row.inpainting is not None:
                unet.inputs["mask"][index:] = row.inpainting.mask
                unet.inputs["around"][index:] = row.inpainting.around(row.noise)
        unet.inputs["latents"].fill(0.0)
        unet.inputs["time"].fill(0.0)
