"""The time table runs its engine once for each timestep, and only for those it does not know."""

from __future__ import annotations

import numpy as np
import pytest

from rt.conditioning import Conditioning
from rt.time_table import TimeTable

SIZE = (48, 64)


class Doubling:
    """Time features are the timestep, and its double plus the pooled text; counts what it was asked."""

    def __init__(self, rows: int, *, pooled: bool = False) -> None:
        self.inputs = {"timestep": np.full(rows, np.nan, np.float32)}
        if pooled:
            self.inputs["pooled"] = np.full((rows, 1), np.nan, np.float32)
            self.inputs["sizes"] = np.full((rows, 6), np.nan, np.float32)
        self.outputs = {f"time_{i}": np.full((rows, 1, 1), np.nan, np.float32) for i in range(2)}
        self.asked: list[list[float]] = []

    def enqueue(self) -> None:
        timestep = self.inputs["timestep"]
        assert np.isfinite(timestep).all()
        self.asked.append(timestep.tolist())
        self.outputs["time_0"][:, 0, 0] = timestep
        self.outputs["time_1"][:, 0, 0] = 2 * timestep
        if "pooled" in self.inputs:
            height, width, *_ = self.inputs["sizes"].T
            assert (
                self.inputs["sizes"] == np.stack([height, width, 0 * height, 0 * width, height, width], 1)
            ).all()
            self.outputs["time_1"][:, 0, 0] += self.inputs["pooled"][:, 0]
            self.outputs["time_2"] = (1000 * height + width)[:, None, None]


def text(pooled: float | None = None) -> Conditioning:
    states = np.zeros((1, 1), np.float32)
    return Conditioning(states=states, pooled=None if pooled is None else np.array([pooled], np.float32))


def features(table: TimeTable, timestep: float, conditioning: Conditioning) -> list[float]:
    return [value.item() for _, value in sorted(table[timestep, conditioning].items())]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_timestep_has_its_features(rows: int, count: int) -> None:
    engine = Doubling(rows)
    table = TimeTable(engine, SIZE)
    timesteps = np.random.default_rng().permutation(999)[:count] + 0.25
    prompt, negative = text(), text()
    table.prepare((timestep, side) for timestep in [*timesteps, timesteps[0]] for side in (prompt, negative))
    for output in engine.outputs.values():
        output.fill(np.nan)  # the table must not look at the engine's buffers later
    for timestep in timesteps:
        assert features(table, timestep, prompt) == [timestep, 2 * timestep]
    assert len(engine.asked) == -(-count // rows), "text does not matter to this network"


def test_where_text_is_mixed_in_each_text_has_features_of_its_own() -> None:
    engine = Doubling(3, pooled=True)
    table = TimeTable(engine, SIZE)
    prompt, negative = text(5.0), text(7.0)
    moments = [(timestep, side) for timestep in (3.0, 1.0) for side in (prompt, negative)]
    table.prepare(moments)
    assert [features(table, *moment)[:2] for moment in moments] == [[3, 11], [3, 13], [1, 7], [1, 9]]
    table.prepare([*moments, (1.0, text(9.0))])
    assert engine.asked == [[3, 3, 1], [1, 1, 1], [1, 1, 1]], "only the new text"


def test_known_timesteps_are_not_run_again_and_others_are_forgotten() -> None:
    engine = Doubling(1)
    table, prompt = TimeTable(engine, SIZE), text()
    table.prepare([(3, prompt), (1, prompt)])
    table.prepare([(1, prompt), (2, prompt)])
    assert engine.asked == [[3], [1], [2]]
    with pytest.raises(KeyError):
        table[3, prompt]


def test_tables_of_several_sizes_share_an_engine() -> None:
    """Each tells it its own size, whoever was the last."""
    engine = Doubling(2, pooled=True)
    tables = {size: TimeTable(engine, size) for size in (SIZE, (64, 48), (32, 32))}
    for timestep, size in enumerate([SIZE, (64, 48), SIZE, (32, 32), (64, 48), SIZE]):
        prompt = text(0.0)
        tables[size].prepare([(timestep, prompt)])
        assert features(tables[size], timestep, prompt)[2] == 1000 * size[0] + size[1]
