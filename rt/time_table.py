"""What the U-Net makes of a timestep, computed once a schedule instead of once a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from rt.backends import Engine
from rt.conditioning import Conditioning
from rt.errors import NumericsError

Float32 = NDArray[np.float32]
Moment = tuple[float, Conditioning]
"""A timestep, and the text that it is mixed with where the U-Net does that (SDXL's pooled text)."""


class TimeTable:
    """Moment → features `time_0` …, for the moments of the last `prepare`; those already known are not run again.

    Args:
        engine: Of `Component.UNET_TIME`, which takes many moments at once. Tables of other sizes may share it.
        size: Height and width of the picture in pixels, which SDXL is told.
    """

    def __init__(self, engine: Engine, size: tuple[int, int]) -> None:
        self._engine = engine
        self._size = size
        self._rows: dict[tuple[float, Conditioning | None], Mapping[str, Float32]] = {}
        self._pooled = engine.inputs.get("pooled")

    def prepare(self, moments: Iterable[Moment]) -> None:
        """Run the engine for each new moment, as many at a time as it has rows.

        Raises:
            NumericsError: When it gives NaN or Inf.
        """
        wanted = dict.fromkeys(map(self._key, moments))
        new = [key for key in wanted if key not in self._rows]
        self._rows = {key: row for key, row in self._rows.items() if key in wanted}
        batch, features = self._engine.inputs["timestep"], self._engine.outputs
        if new and "sizes" in self._engine.inputs:
            self._engine.inputs["sizes"][:] = (*self._size, 0, 0, *self._size)
        for start in range(0, len(new), len(batch)):
            some = new[start : start + len(batch)]
            for row in range(len(batch)):
                timestep, conditioning = some[min(row, len(some) - 1)]
                batch[row] = timestep
                if self._pooled is not None and conditioning is not None:
                    self._pooled[row] = conditioning.pooled
            self._engine.enqueue()
            if not all(np.isfinite(values).all() for values in features.values()):
                raise NumericsError(
                    f"unet_time gave NaN or Inf for timesteps {[timestep for timestep, _ in some]}; "
                    f"the weights of the U-Net are broken"
                )
            for row, key in enumerate(some):
                self._rows[key] = {name: values[row].copy() for name, values in features.items()}

    def __getitem__(self, moment: Moment) -> Mapping[str, Float32]:
        return self._rows[self._key(moment)]

    def _key(self, moment: Moment) -> tuple[float, Conditioning | None]:
        timestep, conditioning = moment
        return float(timestep), None if self._pooled is None else conditioning
