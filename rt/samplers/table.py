"""A sampler, compiled: one row of coefficients for each evaluation of the network."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rt.errors import ConfigError
from rt.samplers.noise_schedule import Floats, Floats32

SAMPLES = 3
"""How many samples a row reads: x_i, x_{i−1}, x_{i−2}."""
HISTORY = 5
"""How many history entries a row reads: h_i … h_{i−4}."""


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The table that the sampling loop runs, for one sampler and one number of steps.

    Row i, with x_i the sample, m_i the (guided) output of the network and z_i fresh unit noise:

        in_i    = c_in[i] · x_i                              what the network sees, with timesteps[i]
        h_i     = p[i] · x_i + q[i] · m_i                    what the sampler remembers
        x_{i+1} = Σ_k a[i,k] · x_{i−k} + Σ_k b[i,k] · h_{i−k} + n[i] · z_i

    starting from x_0 = init_noise_sigma · (unit noise). The result is x_N. Coefficients of x and h from
    before the first row are 0. All coefficients are float32; arrays are read-only, and first indexed by row.

    A caller may put another sample in the place of x_i before row i. It is what the network sees and h_i is made
    of, and, but in `unsteered` rows, what the row goes on from.
    """

    timesteps: Floats32
    """(N,) what the network is told; whole numbers for most samplers."""
    c_in: Floats32
    """(N,)"""
    p: Floats32
    """(N,)"""
    q: Floats32
    """(N,)"""
    a: Floats32
    """(N, 3)"""
    b: Floats32
    """(N, 5)"""
    n: Floats32
    """(N,) a row draws fresh noise exactly if its entry is not 0."""
    init_noise_sigma: float
    unsteered: NDArray[np.bool_] = field(default_factory=lambda: np.array(False))
    """(N,) where a[i,0] stands before the x_i that the row before has left, whatever a caller made of it."""
    guided: NDArray[np.bool_] = field(default_factory=lambda: np.array(True))
    """(N,) where guidance acts, in a run that has any; all rows unless `shorten` says otherwise."""
    full: NDArray[np.bool_] = field(default_factory=lambda: np.array(True))
    """(N,) where the network is run as a whole, rather than on the deep features of an earlier row; the first is."""

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.name != "init_noise_sigma"):
            if name in ("unsteered", "guided", "full"):
                column: NDArray[Any] = np.full(len(self.timesteps), getattr(self, name), np.bool_)
            else:
                column = np.array(getattr(self, name), np.float32)
            column.flags.writeable = False
            object.__setattr__(self, name, column)

    @property
    def noisy(self) -> NDArray[np.bool_]:
        """(N,) the rows that draw fresh noise."""
        return np.not_equal(self.n, 0, dtype=np.bool_)

    def __len__(self) -> int:
        """Rows: evaluations of the network."""
        return len(self.timesteps)

    def __repr__(self) -> str:
        first, last = self.timesteps[0], self.timesteps[-1]
        return (
            f"Schedule({len(self)} rows, timesteps {first:g} … {last:g}, {int(self.noisy.sum())} noisy, "
            f"init_noise_sigma={self.init_noise_sigma:g})"
        )


class Table:
    """The rows while a sampler fills them, in float64; they start as zeros, with c_in = 1."""

    def __init__(self, rows: int) -> None:
        self.c_in: Floats = np.ones(rows)
        self.p: Floats = np.zeros(rows)
        self.q: Floats = np.zeros(rows)
        self.a: Floats = np.zeros((rows, SAMPLES))
        self.b: Floats = np.zeros((rows, HISTORY))
        self.n: Floats = np.zeros(rows)
        self.unsteered: NDArray[np.bool_] = np.zeros(rows, np.bool_)

    def schedule(self, timesteps: Floats, init_noise_sigma: float = 1.0) -> Schedule:
        """Round once to float32.

        Raises:
            ConfigError: a coefficient is not finite, as when an epsilon model must name x_0 in pure noise.
        """
        columns = np.column_stack([self.c_in, self.p, self.q, self.n, self.a, self.b])
        broken = np.flatnonzero(~np.isfinite(columns).all(axis=1))
        if broken.size:
            raise ConfigError(
                f"the step at timestep {timesteps[broken[0]]:g} has no finite coefficients with these "
                "options; expected a signal-to-noise ratio above 0 there, or prediction_type='v_prediction'. "
                "Use fewer steps, or timestep spacing 'leading', or lower_order_final=true, or another sampler."
            )
        c_in, p, q, a, b, n = (
            column.astype(np.float32) for column in (self.c_in, self.p, self.q, self.a, self.b, self.n)
        )
        return Schedule(
            timesteps.astype(np.float32), c_in, p, q, a, b, n, float(init_noise_sigma), self.unsteered
        )
