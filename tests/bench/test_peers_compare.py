"""Turns, ratios, errors and dropouts of a group, on candidates that say what they like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rt.bench.peers import compare as module
from rt.bench.peers.candidate import ANCHOR, REFERENCE, Candidate
from rt.bench.peers.compare import Plan, compare
from rt.bench.peers.peer import Inputs, Outcome, Setting
from rt.errors import BackendError, NumericsError

OTHER = Candidate(name="other", peer="abacus", extra="build", copies=1)
OFF = {ANCHOR.name: 0.25, REFERENCE.name: 0.0, "other": 0.5}
SECONDS = {ANCHOR.name: 2.0, REFERENCE.name: 8.0, "other": 1.0}


class Fake:
    """Answers at once; its output is that of the reference, off by a part of it that its name says."""

    def __init__(self, name: str, calls: list[tuple[str, str]], fails: dict[str, str]) -> None:
        self.name, self.calls, self.fails = name, calls, fails
        self.closed = False

    def ask(self, request: str, argument: Any = None) -> Any:
        what = argument[0] if request == "run" else request
        self.calls.append((self.name, what))
        if self.fails.get(self.name) == what and self.calls.count((self.name, what)) > 1:
            raise BackendError(f"{self.name} died")
        if self.fails.get(self.name) == f"first {what}":
            raise BackendError(f"{self.name} has no {what}")
        if request == "load":
            return {
                "load_s": 1.0,
                "peak_rss_mib": 100.0,
                "versions": {"abacus": "1"},
                "measures": ["text", "unet", "picture"],
            }
        if request == "peak":
            return 80.0
        if request != "run":
            return None
        measure, inputs, _ = argument
        output = inputs.latents * (1 + OFF[self.name])
        if self.fails.get(self.name) == "nan":
            output = output * np.nan
        turn = inputs.timestep
        seconds = {measure: SECONDS[self.name] * (1 + turn)}
        if measure == "picture" and self.name == "other":
            seconds["vae"] = 0.5  # which the anchor has not
        return Outcome(output=output, seconds=seconds)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.setattr(module, "gemm_gflops", lambda: 100.0)

    def run(groups: list[list[Candidate]], fails: dict[str, str] | None = None, turns: int = 3) -> Any:
        calls: list[tuple[str, str]] = []
        fakes: list[Fake] = []

        def start(name: str, log: Path) -> Fake:
            assert log.parent.is_dir() and log.name == f"{name.lower().replace(' ', '-')}.log"
            fakes.append(Fake(name, calls, fails or {}))
            return fakes[-1]

        monkeypatch.setattr(module, "Remote", start)
        rounds = [one(turn) for turn in range(turns)]
        setting = Setting(checkpoint=tmp_path, work=tmp_path, threads=1)
        plan = Plan(turns={"unet": turns, "picture": turns})
        results = list(compare(groups, plan, rounds, setting, tmp_path / "logs"))
        assert all(fake.closed for fake in fakes)
        rows = [row for result in results for row in result.rows]
        absent = {name: why for result in results for name, why in result.absent.items()}
        return rows, [result.gemm_gflops for result in results], absent, calls

    return run


def one(turn: int) -> Inputs:
    array = np.random.default_rng().standard_normal((1, 4, 8, 8), np.float32)
    tokens = np.zeros((1, 7), np.int64)
    return Inputs(tokens=tokens, latents=array, timestep=turn, context=array, noise=array, prompt="", steps=2)


def test_medians_ratios_errors_and_memory(run: Callable[..., Any]) -> None:
    rows, yardsticks, absent, _ = run([[ANCHOR, REFERENCE], [ANCHOR, OTHER]])
    assert [(row.name, row.group) for row in rows] == [
        (ANCHOR.name, 0),
        (REFERENCE.name, 0),
        (ANCHOR.name, 1),
        ("other", 1),
    ]
    figures = [row.figures["unet"] for row in rows]
    assert [figure.ratio for figure in figures] == [1, 4, 1, 0.5]
    assert [figure.error for figure in figures] == [0.25, 0, 0.25, 0.5]
    assert figures[3].samples.seconds == (1.0, 2.0, 3.0)
    assert {(row.load_mib, row.steady_mib) for row in rows} == {(100.0, 80.0)}
    assert yardsticks == [(100.0,) * 7] * 2
    assert absent == {}


def test_turns_begin_with_another_one_each_time(run: Callable[..., Any]) -> None:
    *_, calls = run([[ANCHOR, OTHER]])
    order = [name for name, what in calls if what == "unet" and name != REFERENCE.name]
    first, second = ANCHOR.name, "other"
    assert order == [first, second, first, second, second, first, first, second]  # the first two warm up


def test_what_exports_does_it_in_a_process_that_ends_first(run: Callable[..., Any]) -> None:
    *_, calls = run([[ANCHOR, OTHER]])
    assert calls.index((ANCHOR.name, "prepare")) < calls.index((ANCHOR.name, "load"))
    assert ("other", "prepare") not in calls


@pytest.mark.parametrize("fails", ["first load", "first unet", "unet"])
def test_the_others_go_on_without_one_that_fails(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    rows, _, absent, _ = run([[ANCHOR, REFERENCE, OTHER]], {"other": fails})
    assert [row.name for row in rows] == [ANCHOR.name, REFERENCE.name]
    assert list(absent) == ["other"]
    assert capsys.readouterr().err == f"left out: {absent['other']}\n"


def test_without_the_anchor_there_is_nothing_to_compare(run: Callable[..., Any]) -> None:
    with pytest.raises(BackendError, match=f"nothing to compare with: {ANCHOR.name} has no load"):
        run([[ANCHOR, OTHER]], {ANCHOR.name: "first load"})


def test_an_output_that_is_not_finite_is_an_error(run: Callable[..., Any]) -> None:
    with pytest.raises(
        NumericsError, match="other gave NaN or Inf as U-Net; leave it out with --skip 'other'"
    ):
        run([[ANCHOR, OTHER]], {"other": "nan"})


def test_a_reference_that_is_not_timed_still_gives_the_outputs_of_the_parts(run: Callable[..., Any]) -> None:
    rows, *_, calls = run([[ANCHOR, OTHER]])
    assert [row.figures["unet"].error for row in rows] == [0.25, 0.5]
    assert [row.figures["picture"].error for row in rows] == [None, None]
    assert [what for name, what in calls if name == REFERENCE.name] == ["load", "unet"]


def test_without_its_reference_there_is_no_run(run: Callable[..., Any]) -> None:
    with pytest.raises(BackendError, match=f"{REFERENCE.name} has no unet"):
        run([[ANCHOR, OTHER]], {REFERENCE.name: "first unet"})
