"""The time table runs its engine once for each timestep, and only for those it does not know."""

from __future__ import annotations

import numpy as np
import pytest

from rt.time_table import TimeTable


class Doubling:
    """Time features are the timestep and its double; counts what it was asked."""

    def __init__(self, rows: int) -> None:
        self.inputs = {"timestep": np.full(rows, np.nan, np.float32)}
        self.outputs = {"time": np.full((rows, 2), np.nan, np.float32)}
        self.asked: list[list[float]] = []

    def enqueue(self) -> None:
        timestep = self.inputs["timestep"]
        assert np.isfinite(timestep).all()
        self.asked.append(timestep.tolist())
        self.outputs["time"][:] = np.stack([timestep, 2 * timestep], axis=1)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_timestep_has_its_features(rows: int, count: int) -> None:
    engine = Doubling(rows)
    table = TimeTable(engine)
    timesteps = np.random.default_rng().permutation(999)[:count] + 0.25
    table.prepare([*timesteps, timesteps[0]])
    engine.outputs["time"].fill(np.nan)  # the table must not look at the engine's buffers later
    for timestep in timesteps:
        np.testing.assert_array_equal(table[timestep], [timestep, 2 * timestep])
    assert len(engine.asked) == -(-count // rows)


def test_known_timesteps_are_not_run_again_and_others_are_forgotten() -> None:
    engine = Doubling(1)
    table = TimeTable(engine)
    table.prepare([3, 1])
    table.prepare([1, 2])
    assert engine.asked == [[3], [1], [2]]
    with pytest.raises(KeyError):
        table[3]
