"""One picture on its way from noise to latents: its state, and the row of the table it has reached.

`guide_and_step` here is the numpy form of the one kernel that all samplers share:

    m   = m_uncond + g · (m_cond − m_uncond)
    h   = p · x + q · m
    x'  = Σ_k a[k] · x_{i−k} + Σ_k b[k] · h_{i−k} + n · z

The histories are rings in one (slots, elements) array, so the last line is a product of a coefficient
vector and a matrix: the coefficients move around the ring, the tensors stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rt.errors import NumericsError
from rt.noise import Noise
from rt.samplers import Schedule
from rt.samplers.packed import RING_H, RING_X, ring_weights, set_apart

Float32 = NDArray[np.float32]

# Slots of the state: a ring of x, a ring of h, one z.
_X, _H, _Z, _SLOTS = 0, RING_X, RING_X + RING_H, RING_X + RING_H + 1


class Trajectory:
    """Buffers for one picture of `shape` (C, h, w), allocated once and used for any number of runs."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._state: Float32 = np.zeros((_SLOTS, int(np.prod(self._shape))), np.float32)
        self._m = np.empty_like(self._state[0])
        self._scratch = np.empty_like(self._state[0])

    def start(
        self,
        schedule: Schedule,
        *,
        noise: Noise,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        latents: Float32 | None = None,
    ) -> None:
        """Begin anew.

        Args:
            schedule: The table to follow.
            noise: Gives the first latents, then whatever the sampler adds on the way.
            guidance_scale: g above; not used where the network has no unconditional row.
            guidance_rescale: φ of "Common Diffusion Noise Schedules", https://arxiv.org/abs/2305.08891, 3.4.
            latents: Unit noise (C, h, w) to begin with instead of drawing it.
        """
        self.schedule, self._noise = schedule, noise
        self._guidance, self._rescale = np.float32(guidance_scale), guidance_rescale
        self._weights = np.column_stack([ring_weights(schedule), schedule.n])
        self.position = 0
        self._state.fill(0.0)
        if latents is None:
            noise.randn(self._shape, out=self._slot(_X))
        else:
            np.copyto(self._slot(_X), latents)
        self._state[_X] *= np.float32(schedule.init_noise_sigma)

    @property
    def done(self) -> bool:
        """Whether the schedule has come to its end."""
        return self.position == len(self.schedule)

    @property
    def timestep(self) -> float:
        """What the network is told at this position."""
        return float(self.schedule.timesteps[self.position])

    @property
    def guided(self) -> bool:
        """Whether guidance acts at this position."""
        return bool(self.schedule.guided[self.position])

    @property
    def full(self) -> bool:
        """Whether the network is to be run as a whole at this position."""
        return bool(self.schedule.full[self.position])

    @property
    def latents(self) -> Float32:
        """The current x (C, h, w), a view that cannot be written; assign to it to steer."""
        x = self._x()
        x.flags.writeable = False
        return x

    @latents.setter
    def latents(self, values: Float32) -> None:
        x = self._x()
        if set_apart(self.schedule, self._weights, self.position):
            np.copyto(self._slot(_X + (self.position + 1) % RING_X), x)
        np.copyto(x, values)

    def feed(self, latents: Float32) -> None:
        """Write the scaled latents, what the network is to see, into `latents` (C, h, w)."""
        np.multiply(self._x(), self.schedule.c_in[self.position], out=latents)

    def guide_and_step(self, cond: Float32, uncond: Float32 | None) -> None:
        """Take the network's output (C, h, w), with or without guidance, and move to the next position.

        Raises:
            NumericsError: When the output had NaN or Inf.
        """
        i, schedule, state, m = self.position, self.schedule, self._state, self._m
        with np.errstate(over="ignore", invalid="ignore"):  # an error below, not also a warning
            self._guide(cond.reshape(-1), None if uncond is None else uncond.reshape(-1))
            h = state[_H + i % RING_H]
            np.multiply(m, schedule.q[i], out=h)
            h += np.multiply(state[_X + i % RING_X], schedule.p[i], out=self._scratch)
            if schedule.n[i] != 0:
                self._noise.randn(self._shape, out=self._slot(_Z))
            x = state[_X + (i + 1) % RING_X]
            np.copyto(x, np.dot(self._weights[i], state, out=self._scratch))
            finite = np.isfinite(np.dot(x, x))
        if not finite:
            raise broken(schedule, i)
        self.position += 1

    def _guide(self, cond: Float32, uncond: Float32 | None) -> None:
        if uncond is None:
            np.copyto(self._m, cond)
            return
        np.subtract(cond, uncond, out=self._m)
        self._m *= self._guidance
        self._m += uncond
        if self._rescale:
            self._m *= np.float32(self._rescale * cond.std() / self._m.std() + 1 - self._rescale)

    def _x(self) -> Float32:
        return self._slot(_X + self.position % RING_X)

    def _slot(self, index: int) -> Float32:
        slot: Float32 = self._state[index].reshape(self._shape)
        return slot


def broken(schedule: Schedule, position: int) -> NumericsError:
    """The error of a network that gave NaN or Inf at that position."""
    return NumericsError(
        f"unet gave NaN or Inf at step {position + 1} of {len(schedule)} "
        f"(timestep {schedule.timesteps[position]:g}); "
        f"build with --dtype fp32 or --bf16, or lower the guidance scale"
    )
