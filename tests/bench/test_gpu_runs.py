"""The GPU benchmark's runs: processes apart, what is kept of a part, and when parts are left out."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rt.bench.gpu_parts import apart
from rt.bench.gpu_parts import run as run_module
from rt.bench.gpu_parts.apart import Ended, Processes
from rt.bench.gpu_parts.part import Context, Part
from rt.bench.gpu_parts.record import Outcome, Run, Status, newest
from rt.bench.gpu_parts.run import run_parts
from rt.bench.record import commit
from rt.errors import ConfigError

# importlib mode does not let a test import what lies beside it, and the process of a part is given this path.
sys.path.append(str(Path(__file__).parent))
from fake_part import Fake
from gpu_records import H100, a_run, outcome


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(dry=True, scratch=tmp_path / "scratch", seed=7)


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture
def go(processes: Processes, context: Context) -> Callable[..., Run]:
    """`go(parts, run, minutes=5, keep=…, say=…)`: `run_parts`."""

    def run_them(parts: list[Part], run: Run, **options: Any) -> Run:
        log = context.scratch / "run.log"
        quiet = {"keep": lambda run: None, "say": lambda line: None, "minutes": 5.0}
        return run_parts(parts, context, run, processes=processes, log=log, **{**quiet, **options})

    return run_them


def test_a_part_is_run_apart_and_prints_to_the_log(
    context: Context, processes: Processes, tmp_path: Path
) -> None:
    log = tmp_path / "logs" / "fake.log"
    values = list(processes.run(Fake(name="fake").run, context, seconds=100, log=log))
    assert values == [{"figure": 7}, {"figure": 7, "more": 1}, Ended()]
    assert log.read_text() == "all is well\n"


def test_a_process_is_kept_until_something_fails_or_wants_another(
    context: Context, processes: Processes, tmp_path: Path
) -> None:
    def who(**options: Any) -> int:
        part = Fake(name="who", arguments={"who": True, **options.pop("does", {})})
        first, *_ = processes.run(part.run, context, seconds=100, log=tmp_path / "log", **options)
        return int(first["figure"])

    first = who()
    assert who() == first
    assert (second := who(environment={"A": "1"})) != first
    assert who(environment={"A": "1"}, does={"fail": True}) == second
    assert (third := who(environment={"A": "1"})) != second
    assert who(environment={"A": "1"}, fresh=True) != third
    assert not _runs(first) and not _runs(second)


def test_what_the_driver_does_not_let_go_is_left_behind(
    context: Context, processes: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process in an uninterruptible wait, SIGKILL does nothing to this one."""
    killed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(apart, "_PATIENCE_S", 0.2)
        patch.setattr(apart.os, "killpg", lambda pid, signal: killed.append(pid))
        patch.setattr(apart.subprocess.Popen, "kill", lambda self: None)
        work = Fake(name="slow", arguments={"sleep": True}).run
        *_, ended = processes.run(work, context, seconds=5, log=tmp_path / "slow.log")
    assert not ended.in_time
    assert ended.problem.endswith(f"; its process {killed[0]} does not end and was left behind")
    os.killpg(killed[0], 9)
    apart._LEFT.pop().wait()
    assert (
        list(processes.run(Fake(name="good").run, context, seconds=100, log=tmp_path / "log"))[-1] == Ended()
    )


@pytest.mark.parametrize(
    ("does", "status", "reason"),
    [
        ("raise", Status.FAILED, "ValueError: the first line; see "),
        ("die", Status.FAILED, "its process died, exit code 3; see "),
    ],
)
def test_what_ends_a_part_early_ends_no_other_and_leaves_its_figures(
    does: str, status: Status, reason: str, go: Callable[..., Run], context: Context
) -> None:
    parts = [Fake(name="bad", arguments={does: True}), Fake(name="good")]
    kept: list[Run] = []
    run = go(parts, a_run(), keep=kept.append)
    assert run.parts["bad"].status is status and run.parts["bad"].reason.startswith(reason)
    assert run.parts["bad"].figures == {"figure": 7}
    assert run.parts["good"].status is Status.DONE and run.parts["good"].figures == {"figure": 7, "more": 1}
    assert kept[0].parts["bad"].status is Status.STOPPED  # what a machine that is taken away has left
    assert kept[-1] == run
    log = (context.scratch / "run.log").read_text()
    assert log.startswith("== bad ==\n") and log.endswith("== good ==\nall is well\n")


@pytest.mark.slow
def test_a_part_is_stopped_at_its_limit_with_all_that_it_started(
    context: Context, processes: Processes, tmp_path: Path
) -> None:
    work = Fake(name="slow", arguments={"sleep": True}).run
    *values, ended = processes.run(work, context, seconds=10, log=tmp_path / "slow.log")
    assert values[0] == {"figure": 7}
    assert not ended.in_time and ended.problem.startswith("stopped after 0.2 minutes")
    deadline = time.monotonic() + 10
    while _runs(values[1]["child"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(values[1]["child"])


def _runs(pid: int) -> bool:
    """Whether that process is at work: not gone, and not dead and still to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_log_that_grows_long_keeps_its_end(
    go: Callable[..., Run], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_LONGEST_LOG", 20)
    monkeypatch.setattr(run_module, "_TAIL", 6)
    go([Fake(name="one"), Fake(name="two")], a_run())
    assert (context.scratch / "run.log").read_text() == " well\n== two ==\nall is well\n"


def test_a_part_may_take_a_little_longer_than_estimated(
    go: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def stopped(self: Processes, *rest: Any, seconds: float, **more: Any) -> Iterator[Ended]:
        limits.append(seconds / 60)
        yield Ended("stopped", in_time=False)

    monkeypatch.setattr(Processes, "run", stopped)
    parts = [Fake(name="short", minutes=0.1), Fake(name="long", minutes=4.0), Fake(name="last", minutes=9.0)]
    context = Context(dry=False, scratch=Path(), seed=7)
    go_on = {"processes": Processes(), "minutes": 10.0, "log": Path(os.devnull)}
    run = run_parts(parts, context, a_run(), keep=lambda run: None, say=lambda line: None, **go_on)
    assert limits == pytest.approx([1.0, 5.2, 10.0], rel=1e-3)
    assert {outcome.status for outcome in run.parts.values()} == {Status.STOPPED}


def test_packages_are_not_measured_where_there_are_none(tmp_path: Path) -> None:
    parts = [Fake(name="packages", reads_packages=True)]
    context = Context(dry=False, scratch=tmp_path, seed=7)
    options = {"minutes": 5.0, "log": tmp_path / "log", "keep": lambda run: None, "say": lambda line: None}
    with Processes() as processes:
        run = run_parts(parts, context, a_run(), processes=processes, **options)
        assert run.parts["packages"].status is Status.SKIPPED
        assert run.parts["packages"].reason.startswith("needs --packages")
        with_some = replace(context, packages=tmp_path)
        run = run_parts(parts, with_some, a_run(), processes=processes, **options)
        assert run.parts["packages"].status is Status.DONE


def test_a_part_that_does_not_fit_any_more_is_skipped_and_keeps_what_was_measured(
    go: Callable[..., Run],
) -> None:
    parts = [Fake(name="long", minutes=9.0), Fake(name="short")]
    lines: list[str] = []
    run = go(parts, a_run(), minutes=1, say=lines.append)
    assert run.parts["long"].status is Status.SKIPPED and run.parts["short"].status is Status.DONE
    assert "needs about 9 minutes, 1.0 are left; run again with --resume" in lines[0]
    before = a_run(long=outcome(Status.STOPPED, figure=1))
    run = go(parts[:1], before, minutes=1, say=lines.append)
    assert run.parts == before.parts and lines[-1].startswith("long: skipped")


def test_what_was_broken_off_again_keeps_the_older_figures_where_they_are_more(
    go: Callable[..., Run],
) -> None:
    parts = [Fake(name="bad", arguments={"die": True})]
    kept: list[Run] = []

    def rerun(older: Outcome) -> Outcome:
        return go(parts, a_run(bad=older), keep=kept.append).parts["bad"]

    rich = outcome(Status.STOPPED, rows=[{"a": 1}, {"a": 2}])
    assert rerun(rich) == rich and all(run.parts["bad"] == rich for run in kept)
    assert rerun(outcome(Status.STOPPED, figure=1)).figures == {"figure": 7}
    assert outcome().supersedes(rich) and not outcome(Status.FAILED).supersedes(rich)


def test_a_part_goes_on_from_what_it_found_at_the_same_commit(go: Callable[..., Run]) -> None:
    parts = [Fake(name="long", arguments={"go on": True, "die": True})]
    for older, expected in ((commit(), 5), ("another", 0)):
        run = a_run(long=replace(outcome(Status.STOPPED, more=5), commit=older))
        run = go(parts, run)
        assert run.parts["long"].figures == {"figure": 7, "before": expected}


def test_what_a_part_needs_runs_again_with_it_and_only_then(go: Callable[..., Run]) -> None:
    parts = [Fake(name="build"), Fake(name="model", needs=("build",))]

    def said(run: Run, minutes: float = 5) -> list[str]:
        lines: list[str] = []
        go(parts, run, minutes=minutes, say=lines.append)
        return [re.sub(r", \d+ s\.", "", line) for line in lines]

    both = a_run(build=outcome(figure=1), model=outcome(figure=1))
    assert [line.split(",")[0] for line in said(both)] == ["build: kept", "model: kept"]
    assert said(a_run(build=outcome(figure=1))) == ["build: done", "model: done"]
    parts[0] = Fake(name="build", arguments={"die": True})
    assert said(a_run())[1] == "model: skipped needs build; run again with --resume"


def test_a_part_for_newer_gpus_is_skipped_on_an_older_one(processes: Processes) -> None:
    parts = [Fake(name="fp8", least_capability=89)]
    options = {"minutes": 5.0, "log": Path(os.devnull), "keep": lambda run: None, "say": lambda line: None}
    context = Context(dry=False, scratch=Path(), seed=7)
    older = replace(a_run(), gpu=replace(H100, capability=80))
    run = run_parts(parts, context, older, processes=processes, **options)
    assert run.parts["fp8"].status is Status.SKIPPED
    assert run.parts["fp8"].reason == "needs a GPU of compute capability 8.9, this one has 8.0"


def test_a_run_is_taken_up_again_on_the_same_gpu_only(tmp_path: Path) -> None:
    run = replace(a_run(ceilings=outcome(copy_tb_s=1.0)), gpu=H100)
    time = run.provenance.time.replace(":", "")
    assert run.save(tmp_path).name == f"{run.provenance.date}-gpu-h100-80gb-hbm3-{time}.json"
    assert not list(tmp_path.glob("*.part"))
    assert newest([tmp_path], H100) == run
    assert newest([tmp_path], replace(H100, name="NVIDIA H200")) is None
    assert newest([tmp_path], replace(H100, versions={"torch": "2.14.0"})) is None
    later = replace(run, provenance=replace(run.provenance, time="23:59:59"), seed=8)
    later.save(tmp_path)  # on the same day, and beside the first
    assert len(list(tmp_path.iterdir())) == 2 and newest([tmp_path], H100) == later
    assert newest([tmp_path / "nowhere"], H100) is None
    # What was brought back went on in the tree, or what lies in the tree goes on elsewhere.
    elsewhere, more = tmp_path / "elsewhere", replace(later, parts={})
    more.save(elsewhere)
    assert newest([tmp_path, elsewhere], H100) == more and newest([elsewhere, tmp_path], H100) == later
    with pytest.raises(ConfigError, match="a GPU record of schema 99, not 1: measure again"):
        Run.from_json({**run.to_json(), "schema": 99})
