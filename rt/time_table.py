"""What the U-Net makes of a timestep alone, computed once a schedule instead of once a step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rt.backends import Engine
from rt.errors import NumericsError

Float32 = NDArray[np.float32]


class TimeTable:
    """Timestep → features (F,), for the timesteps of the last `prepare`; those already known are not run again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: dict[float, Float32] = {}

    def prepare(self, timesteps: Iterable[float]) -> None:
        """Run the engine for each new timestep, as many at a time as it has rows.

        Raises:
            NumericsError: When it gives NaN or Inf.
        """
        wanted = dict.fromkeys(map(float, timesteps))
        new = [timestep for timestep in wanted if timestep not in self._rows]
        self._rows = {timestep: row for timestep, row in self._rows.items() if timestep in wanted}
        batch, time = self._engine.inputs["timestep"], self._engine.outputs["time"]
        for start in range(0, len(new), len(batch)):
            some = new[start : start + len(batch)]
            batch[:] = some[-1]
            batch[: len(some)] = some
            self._engine.enqueue()
            if not np.isfinite(time).all():
                raise NumericsError(
                    f"unet_time gave NaN or Inf for timesteps {some}; the weights of the U-Net are broken"
                )
            self._rows.update(zip(some, time.copy(), strict=False))

    def __getitem__(self, timestep: float) -> Float32:
        return self._rows[timestep]
