"""Samples and their percentiles, watching an engine, taking turns, the yardstick."""

from __future__ import annotations

import json
import secrets
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from rt.bench import timing
from rt.bench.timing import Samples, elapsed, gemm_gflops, interleave, watching


class Sleeper:
    def __init__(self, seconds: float) -> None:
        self.inputs, self.outputs = {}, {}
        self.seconds, self.calls = seconds, 0

    def enqueue(self) -> None:
        self.calls += 1
        time.sleep(self.seconds)


@pytest.mark.parametrize("count", [1, 2, 7, 20, 101])
def test_percentiles_are_those_of_the_sorted_samples(count: int) -> None:
    rng = np.random.default_rng(secrets.randbits(64))
    samples = Samples(tuple(rng.exponential(size=count).tolist()))
    for q, got in ((50, samples.median), (90, samples.p90), (99, samples.p99)):
        assert got == pytest.approx(np.quantile(samples.seconds, q / 100, method="linear"), rel=1e-12)
    if count > 1:
        cuts = statistics.quantiles(samples.seconds, n=100, method="inclusive")
        assert (samples.median, samples.p90, samples.p99) == pytest.approx(
            (cuts[49], cuts[89], cuts[98]), rel=1e-12
        )


def test_percentiles_do_not_depend_on_the_order_but_the_record_keeps_it() -> None:
    samples = Samples((3.0, 1.0, 2.0))
    assert samples.median == 2.0
    assert samples.to_json()["seconds"] == [3.0, 1.0, 2.0]


def test_samples_survive_json() -> None:
    samples = Samples(tuple(np.random.default_rng(secrets.randbits(64)).random(9).tolist()))
    assert Samples.from_json(json.loads(json.dumps(samples.to_json()))) == samples


def test_elapsed_is_the_time_of_the_call() -> None:
    assert elapsed(lambda: time.sleep(0.02)) >= 0.02


def test_watching_sees_each_enqueue_and_lets_go() -> None:
    engine = Sleeper(0.003)
    with watching(engine) as seconds:
        for _ in range(4):
            engine.enqueue()
        time.sleep(0.05)
    engine.enqueue()
    assert engine.calls == 5
    assert len(seconds) == 4
    assert min(seconds) >= 0.003
    assert min(seconds) < 0.05, "the pause between the calls is not the engine's"


def test_watching_lets_go_after_an_error() -> None:
    engine = Sleeper(0.0)
    before = engine.enqueue
    with pytest.raises(KeyError), watching(engine):
        raise KeyError
    assert engine.enqueue == before


def test_interleave_takes_turns_and_starts_with_each() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    samples = interleave({name: lambda n=name, i=i: call(n, i) for i, name in enumerate("abc")}, 4)
    assert "".join(order) == "abcbcacababc"
    assert samples == {name: Samples((i,) * 4) for i, name in enumerate("abc")}


def test_gemm_is_the_best_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([3.0, 0.5, 2.0])
    called: list[object] = []

    def fake(call: Callable[[], object]) -> float:
        called.append(call())
        return next(seconds)

    monkeypatch.setattr(timing, "elapsed", fake)
    assert gemm_gflops(10) == pytest.approx(2 * 10**3 / 0.5 / 1e9)
    assert len(called) == 3
