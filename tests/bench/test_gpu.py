"""The GPU benchmark without a GPU: every part at tiny size, what is kept of a run, and when parts are left out."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from rt.bench.gpu import command
from rt.bench.gpu_parts import apart
from rt.bench.gpu_parts import run as run_module
from rt.bench.gpu_parts.apart import Ended, Processes
from rt.bench.gpu_parts.bars import bars
from rt.bench.gpu_parts.part import Context, Part, choose
from rt.bench.gpu_parts.parts import PARTS, PLANS
from rt.bench.gpu_parts.record import DRY, Gpu, Outcome, Run, Status, newest
from rt.bench.gpu_parts.run import run_parts
from rt.bench.gpu_parts.section import Section
from rt.bench.gpu_parts.settings import PREPARED
from rt.bench.gpu_parts.table import render, sections, text
from rt.bench.gpu_parts.trace import kinds, summary
from rt.bench.record import Provenance, commit
from rt.errors import ConfigError

# The process of a part imports what it runs by name, and is given this path.
sys.path.append(str(Path(__file__).parent))
from fake_part import Fake

ROOT = Path(__file__).resolve().parents[2]
H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=90,
    memory_gib=79.1,
    multiprocessors=132,
    l2_mib=50.0,
    versions={"torch": "2.13.0"},
)
# What a test can afford at any time; the models trace, build and compile.
QUICK = ("ceilings", "fp8")
NAMES = [part.name for part in PARTS]


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(dry=True, scratch=tmp_path / "scratch", seed=7)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that models of the same shapes are built once."""
    return tmp_path_factory.mktemp("gpu")


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


def a_run(**parts: Outcome) -> Run:
    return Run(provenance=Provenance.now(), gpu=DRY, seed=7, parts=parts)


def outcome(status: Status = Status.DONE, **figures: Any) -> Outcome:
    return Outcome(status=status, date="2020-01-01", commit=None, figures=figures)


def test_both_ways_to_start_it_and_no_part_by_another_name(tmp_path: Path) -> None:
    for start in ([str(ROOT / "bench" / "gpu.py")], ["-m", "rt.bench.gpu"]):
        done = subprocess.run(
            [sys.executable, *start, "--dry", "--only", "ceiling"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"Error: no part 'ceiling' (did you mean 'ceilings'?); there are: {', '.join(NAMES)}"
        ]
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = CliRunner().invoke(
        command, ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")]
    )
    assert done.exit_code == 1
    assert (
        "Error: torch sees no GPU; go to a machine with one, or see that all runs with --dry" in done.output
    )
    assert not (tmp_path / "out").exists()


def test_every_part_fits_into_a_command_of_nine_minutes_after_what_it_needs() -> None:
    assert all(part.minutes <= 8.5 for part in PARTS)
    assert len(set(NAMES)) == len(NAMES)
    for part in PARTS:
        assert set(part.needs) <= set(NAMES[: NAMES.index(part.name)])


def test_a_part_that_is_wanted_runs_in_its_order() -> None:
    assert [part.name for part in choose(PARTS, ("fp8", "ceilings"))] == ["ceilings", "fp8"]
    assert [part.name for part in choose(PARTS, ("sd15",))] == ["build-sd15", "sd15"]
    with pytest.raises(ConfigError, match="did you mean 'kernels'"):
        choose(PARTS, ("kernal",))


@pytest.mark.slow
def test_a_dry_run_prints_tables_of_80_columns_and_writes_where_it_is_told(tmp_path: Path) -> None:
    arguments = ["--dry", *(f"--only={name}" for name in QUICK), "--scratch", str(tmp_path / "scratch")]
    done = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    printed, path = done.output.rstrip().rsplit("\n\n", 1)
    assert "no figure below means anything" in printed and "copy within the device" in printed
    assert max(map(len, printed.splitlines())) <= 80
    record = json.loads(Path(path).read_text())
    assert set(record) == {"schema", "provenance", "gpu", "seed", "parts"}
    assert {name: part["status"] for name, part in record["parts"].items()} == dict.fromkeys(QUICK, "done")
    assert set(record["parts"]["fp8"]) == {"status", "reason", "seconds", "date", "commit", "figures"}
    assert json.loads(json.dumps(Run.from_json(record).to_json())) == record
    assert render([record]) == "not measured yet"

    again = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "out"), "--resume"])
    assert again.output.count("kept, measured") == 2
    assert json.loads(Path(path).read_text()) == record


@pytest.mark.slow
def test_a_dry_run_leaves_no_record_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, ["--dry", "--only", "ceilings"])
    assert done.exit_code == 0, done.output
    assert not list(tmp_path.rglob("*.json"))


def check_figures(name: str, figures: Any) -> None:
    """Each part's figures make a table in which nothing is missing, and a document of it."""
    section = next(sections({name: outcome(**figures)}))
    assert section.rows and all(len(row) == len(section.head) for row in section.rows)
    assert max(map(len, section.text().splitlines())) <= 80
    for row in [
        *figures.get("cases", []),
        *figures.get("workloads", []),
        *figures.get("payloads", []),
        *figures.get("pictures", []),
        *figures.get("outcomes", []),
    ]:
        assert row["passed"], row


@pytest.mark.parametrize("name", [name for name in NAMES if name in (*QUICK, "payloads")])
def test_every_small_part_runs_dry(name: str, context: Context) -> None:
    [part] = choose(PARTS, (name,))
    *_, figures = part.run(context)
    json.dumps(figures)
    check_figures(name, figures)


def dry(plan: str, scratch: Path, *options: str) -> Run:
    """The record of a dry run of a plan."""
    out = scratch / plan
    arguments = ["--dry", "--plan", plan, "--scratch", str(scratch), "--out", str(out), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # where the demo model is
        done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    [path] = out.glob("*.json")
    assert path.with_suffix(".log").is_file() and len(list(out.iterdir())) == 2
    return Run.from_json(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def planned(scratch: Path) -> Run:
    """Both plans of the first minutes; the second finds what the first has compiled."""
    run = dry("first", scratch, "--minutes", "60")
    return replace(run, parts={**run.parts, **dry("second", scratch, "--minutes", "60").parts})


PLANNED = [name for plan in ("first", "second") for name in PLANS[plan].parts]
AS_SD15 = ("build-sd21", "sd21")  # at the size of a dry run; only sides and widths tell them apart
LARGE = [name for name in NAMES if name not in (*QUICK, *PLANNED, "payloads", *AS_SD15)]


@pytest.fixture(scope="module")
def large(scratch: Path, speed: Any) -> Run:
    """All large parts that no plan above has, those of one environment after the other: each imports torch once."""
    parts = sorted(choose(PARTS, LARGE), key=lambda part: [*part.dry_environment])
    with pytest.MonkeyPatch.context() as patch, Processes() as processes:
        patch.chdir(ROOT)
        return run_parts(
            parts,
            Context(dry=True, scratch=scratch, seed=7),
            a_run(),
            processes=processes,
            minutes=14 * speed.slowness(),
            log=scratch / "large.log",
            keep=lambda run: None,
            say=lambda line: None,
        )


def check_part(name: str, run: Run) -> None:
    """It is done, and its figures are right."""
    assert run.parts[name].status is Status.DONE, run.parts[name]
    figures = run.parts[name].figures
    check_figures(name, figures)
    for row in figures.get("candidates", {}).values():
        assert all(error < 1e-4 for error in row.get("errors", {}).values()), row


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first waits for all
@pytest.mark.parametrize("name", PLANNED)
def test_the_plans_run_dry(name: str, planned: Run) -> None:
    check_part(name, planned)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", LARGE)
def test_every_large_part_runs_dry(name: str, large: Run) -> None:
    check_part(name, large)


def test_plans_fit_into_their_minutes_and_have_what_their_parts_need() -> None:
    minutes = {part.name: part.minutes for part in PARTS}
    for plan in PLANS.values():
        if plan.name != "all":  # which has as much as fits
            assert sum(minutes[name] for name in plan.parts) <= plan.minutes
        for index, name in enumerate(plan.parts):
            [part] = [part for part in PARTS if part.name == name]
            assert set(part.needs) <= set(plan.parts[:index])
    assert {name for plan in PLANS.values() for name in plan.parts} == set(NAMES)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plan", "first", "--only", "fp8"], "--plan says which parts, and so does --only"),
        (["--plan", "third"], "'third' is not one of 'first', 'second', 'all'"),
        (["--packages", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_options_that_make_no_sense_end_it_at_once(options: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--dry", "--out", str(tmp_path / "out"), *options])
    assert done.exit_code != 0 and said in done.output
    assert not list(tmp_path.iterdir())


def test_packages_are_prepared_by_the_stand_in_and_nothing_else_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(folder: Path, names: Sequence[str]) -> Iterator[str]:
        yield from (f"{folder.name}/{name}: 611 launches" for name in names)

    stand_in = ModuleType("stand_in_gpu.packages")
    stand_in.prepare = prepare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rt.bench.stand_in_gpu", ModuleType("stand_in_gpu"))
    monkeypatch.setitem(sys.modules, "rt.bench.stand_in_gpu.packages", stand_in)
    done = CliRunner().invoke(command, ["--prepare", str(tmp_path / "packages")])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [f"packages/{name}: 611 launches" for name in PREPARED]


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


def times(**seconds: float) -> dict[str, Any]:
    return {name.replace("_", " "): {"median_s": value} for name, value in seconds.items()}


KERNEL = {
    "kernel": "attention",
    "workload": "sd15",
    "case": "float16 batch=2",
    "passed": True,
    "bytes": 10**9,
    "flops": 10**12,
    "times": times(rt=0.002, torch=0.003, torch_flash=0.0025),
}
CEILINGS = outcome(copy_tb_s=2.5, tflops={"float16": 800.0})


def test_a_kernel_is_held_against_the_ceilings_and_the_best_alternative() -> None:
    small = {**KERNEL, "workload": "tiny", "times": times(rt=0.001, torch=0.0005), "cached": True}
    bad = {**KERNEL, "workload": "big", "passed": False, "times": {}}
    other = {**bad, "kernel": "geglu"}
    figures = {"workloads": [bad, KERNEL, small, other], "left_out": ["x y"]}
    _, section, aims = sections({"ceilings": CEILINGS, "timings": outcome(**figures)})
    assert section.rows[1][:3] == ("geglu", "big", "failed")
    assert section.rows[0] == (
        "attention",
        "sd15",
        "2 ms",
        "500 TFLOP/s",
        "62%",
        "2.5 ms torch flash",
        "1.25",
        "0.50–1.25",
    )
    assert "2 of 4 workloads agree with their reference. Wrong: attention big; geglu big." in section.note
    assert section.note.endswith("So small that they were timed out of the L2 cache: 1. Not timed: 1.")
    assert aims.rows[-1][2:] == ("1 of 2, 2 wrong, 1 not timed", "NO")


def test_small_inputs_are_many_and_marked_where_they_stay_in_the_cache() -> None:
    pytest.importorskip("triton")
    from rt.bench.gpu_parts.timings import sets_of

    cache = 50 * 2**20
    assert sets_of(10 * cache, cache) == (1, False)
    assert sets_of(2**20, cache) == (100, False)
    assert sets_of(3 * 2**20, cache) == (34, False)  # more than twice as large
    count, cached = sets_of(2**10, cache)
    assert cached and count * 2**10 < 2 * cache


def test_a_list_of_kernels_that_was_broken_off_is_not_begun_anew(context: Context) -> None:
    pytest.importorskip("triton")
    from rt.bench.gpu_parts import kernels, timings
    from rt.kernels.registry import NAMES as KERNELS

    cases = [{"kernel": name} for name in KERNELS]
    rows = [{"kernel": name, "workload": "smallest case"} for name in KERNELS]
    before = replace(context, before={"cases": cases, "workloads": rows})
    assert list(kernels.run(before)) == [{"cases": cases}]
    assert list(timings.run(before)) == [{"workloads": rows, "left_out": []}]


def test_a_kernel_that_raised_is_in_the_table() -> None:
    right = {"kernel": "geglu", "case": "small", "error": 1e-4, "tolerance": 1e-3, "passed": True}
    raised = {**right, "case": "large", "error": None, "tolerance": None, "passed": False}
    [section] = sections({"kernels": outcome(cases=[right, raised, {**raised, "kernel": "feed"}])})
    assert section.rows == [("geglu", "1 of 2", "1.0e-04 of 1e-03"), ("feed", "0 of 1", "")]
    assert section.note == "Wrong: geglu large; feed large."


def model(**candidates: Any) -> Outcome:
    return outcome(
        dtype="float16",
        flops={"unet": 16 * 10**11, "vae": 8 * 10**11},
        bars_ms={"unet": 4.0},
        candidates=candidates,
    )


def candidate(**seconds: float) -> dict[str, Any]:
    return {
        "errors": {"unet": 1e-3, "vae": 2e-3},
        "held_gib": 3.0,
        "ready_s": 61.0,
        "trace": {},
        "measures": times(**seconds),
    }


def test_a_model_has_ratios_floors_and_aims() -> None:
    ours = candidate(unet=0.0035, picture_4=0.03)
    ours["trace"] = {"idle_percent": 1.5}
    seen = {"gap_us": 8.0, "gap_percent": 0.2, "synchronisations": 0}
    ours["loop"] = {
        "step": {**times(step=0.0039), "trace": seen},
        "loop": {**times(step=0.0038), "trace": {}},
    }
    ours["build_s"] = 240.0
    peers = {"rt": ours, "torch.compile": candidate(unet=0.007, picture_4=0.045)}
    _, section, _ = sections({"ceilings": CEILINGS, "sd15": model(**peers)})
    assert section.title == "SD 1.5, 512 × 512, float16"
    assert section.head[:3] == ("time (× torch.compile)", "U-Net step", "4-step picture")
    assert section.rows[0] == ("rt", "3.5 ms (2.00)", "30 ms (1.50)", "1.5 %", "3.0 GiB", "240 + 61 s")
    assert section.rows[2][:3] == ("floor: products alone", "2 ms", "")
    assert section.rows[3][:3] == ("aim", "4 ms", "")
    assert section.note.endswith(
        "A step of the loop of rt, a graph a step: 3.9 ms, between two the GPU waits 8.0 us, 0.20 %, "
        "and the host waits 0 times while it launches them. A step of the loop of rt, one graph: 3.8 ms."
    )


def test_the_aims_are_held_against_the_record() -> None:
    sd15 = candidate(unet=0.0035)
    sd15["loop"] = {"step": {**times(step=0.0039), "trace": {"gap_percent": 1.2}}}
    turbo = candidate(picture_4=0.036)
    figures = {"workloads": [KERNEL], "left_out": []}
    found = bars(
        {
            "sd15": model(**{"rt": sd15, "torch.compile": candidate(unet=0.006)}),
            "sdxl-turbo": model(rt=turbo),
            "timings": outcome(**figures),
        }
    )
    assert [(bar.what, bar.wanted, bar.measured, bar.verdict) for bar in found] == [
        ("SD 1.5, 512 × 512: U-Net step", "<= 4 ms", "3.50 ms", "yes"),
        ("SD 1.5, 512 × 512: U-Net step, torch.compile", ">= 1.5 ×", "1.71 ×", "yes"),
        ("SD 1.5, 512 × 512: gap between steps", "< 1 %", "1.20 %", "NO"),
        ("SDXL, 1024 × 1024: U-Net step", "<= 34 ms", "", "not measured"),
        ("SDXL, 1024 × 1024: VAE decoder", "<= 25 ms", "", "not measured"),
        ("SDXL, 1024 × 1024: U-Net step, torch.compile", ">= 1.25 ×", "", "not measured"),
        ("SDXL, 1024 × 1024: gap between steps", "< 1 %", "", "not measured"),
        ("SDXL-Turbo, 512 × 512: 4-step picture", "<= 35 ms", "36.00 ms", "NO"),
        ("kernels: workloads at least as fast as torch", "all", "1 of 1", "yes"),
    ]
    left = bars({"timings": outcome(workloads=[KERNEL], left_out=["geglu sd15"])})[-1]
    assert (left.measured, left.reached) == ("1 of 1, 1 not timed", None)
    assert bars({"ceilings": CEILINGS}) == []


def test_the_document_has_the_newest_figures_of_each_part_of_each_gpu() -> None:
    first = replace(a_run(ceilings=CEILINGS, fp8=outcome(Status.FAILED)), gpu=H100).to_json()
    second = replace(
        a_run(sd15=replace(model(rt=candidate(unet=0.5)), status=Status.STOPPED, reason="stopped")), gpu=H100
    ).to_json()
    shown = render([{"provenance": {}}, first, second])
    assert shown.startswith("Measured on an NVIDIA H100 80GB HBM3, 2020-01-01, with torch 2.13.0.")
    assert "| copy within the device | 2.50 TB/s |" in shown and "500 ms" in shown
    assert "Not complete: stopped." in shown and "fp8" not in shown
    other = replace(H100, versions={"torch": "2.14.0"})
    newer = replace(a_run(ceilings=outcome(copy_tb_s=3.0)), gpu=other).to_json()
    shown = render([first, second, newer])
    assert "2.50 TB/s" not in shown
    assert (
        "ceilings: 2020-01-01, with torch 2.14.0; sd15: 2020-01-01, with torch 2.13.0." in shown
        or "sd15: 2020-01-01, with torch 2.13.0; ceilings: 2020-01-01, with torch 2.14.0." in shown
    )
    less = replace(a_run(ceilings=outcome(Status.STOPPED, copy_tb_s=9.0)), gpu=H100).to_json()
    assert "9.00 TB/s" not in render([first, less])
    assert render([]) == "not measured yet"


def test_wide_tables_continue_below_with_their_names() -> None:
    section = Section("wide", ("name", *"abcdef"), [("n" * 40, *(letter * 20 for letter in "abcdef"))])
    lines = section.text().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("n" * 27 + "…") for line in lines) == 3


def test_the_terminal_hears_how_each_part_ended() -> None:
    run = replace(a_run(ceilings=CEILINGS, kernels=outcome(Status.FAILED)), gpu=H100)
    assert re.search(r"kernels +failed", text(run))


def graph(start: float, correlation: int, *durations: float) -> list[dict[str, Any]]:
    """A launch at `start` − 5 whose kernels follow each other from `start`."""
    runtime = {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": start - 5, "dur": 1}
    events = [{**runtime, "args": {"correlation": correlation}}]
    for duration in durations:
        kernel = {"ph": "X", "cat": "kernel", "name": "k", "ts": start, "dur": duration}
        events.append({**kernel, "args": {"correlation": correlation}})
        start += duration
    return events


def test_a_trace_says_how_long_the_gpu_waits_between_steps() -> None:
    wait = {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "dur": 1, "args": {}}
    events = [
        *graph(10, 1, 4, 4, 2),  # ends at 20
        *graph(21, 2, 4, 4, 1),  # 30
        *graph(31, 3, 4, 4, 1),  # 40
        *graph(45, 4, 5),
        {"ph": "M", "name": "a remark"},
    ]
    found = summary([*events, {**wait, "ts": 100}])
    assert (found["kernels"], found["steps"], found["span_us"]) == (10, 3, 40)
    assert found["idle_percent"] == pytest.approx(100 * 7 / 40)
    assert (found["gap_us"], found["step_us"], found["synchronisations"]) == (1, 10.5, 0)
    assert summary([*events, {**wait, "ts": 18}])["synchronisations"] == 1
    assert "synchronisations" not in summary([event for event in events if event.get("cat") == "kernel"])
    single = summary([*graph(0, 1, 2), *graph(2, 2, 2)])
    assert "gap_us" not in single and single["idle_percent"] == 0
    assert summary([]) == {}


def test_a_trace_says_which_kinds_of_kernels_take_the_time() -> None:
    names = {
        "attention_3": 5,
        "triton_poi_fused_add_7": 2,
        "triton_per_fused_native_layer_norm_1": 3,
        "sm90_xmma_fprop_implicit_gemm_f16": 9,
        "nvjet_hsh_128x256": 8,
        "vectorized_elementwise_kernel": 1,
    }
    kernel = {"ph": "X", "cat": "kernel", "ts": 0}
    events = [{**kernel, "name": name, "dur": duration} for name, duration in names.items()]
    found = kinds(
        [*events, events[1], {"ph": "X", "cat": "cuda_runtime", "name": "launch", "dur": 99}], longest=2
    )
    assert found["us"] == {
        "convolution": 9,
        "product": 8,
        "attention": 5,
        "Triton": 4,
        "norm": 3,
        "other": 1,
    }
    assert found["launches"]["Triton"] == 2
    assert list(found["longest"]) == ["sm90_xmma_fprop_implicit_gemm_f16", "nvjet_hsh_128x256"]
    assert kinds([], longest=2) == {}


PACKAGE = {"ready_s": 3.0, "held_gib": 2.0, "finite": True, "time": {"median_s": 0.006}}


def test_packages_have_their_kinds_of_kernels_and_what_went_wrong() -> None:
    rows = [
        {**PACKAGE, "package": "a", "us": {"convolution": 2000.0}, "launches": {"convolution": 52}},
        {**PACKAGE, "package": "b", "finite": False},
        {"package": "c", "problem": "RuntimeError: no"},
    ]
    [section] = sections({"packages-tried": outcome(tried=True, packages=rows)})
    assert section.head == ("package", "time", "launches", "convolution", "ready")
    assert section.rows[0] == ("a", "6 ms", "52", "2 ms in 52", "3.0 s")
    assert section.rows[2] == ("c", "failed", "", "", "")
    assert section.note.endswith("convolutions tried out. c: RuntimeError: no. b gives NaN or Inf.")


def test_what_a_build_will_not_find_stands_below_the_table() -> None:
    facts = {"torch": "2.11.0", "links with -lcuda": "no: cannot find -lcuda"}
    [section] = sections({"environment": outcome(facts=facts)})
    assert section.note == "links with -lcuda: no: cannot find -lcuda."


def test_a_step_alone_has_its_ratio_to_the_compiler() -> None:
    rows = {"rt": {"time": {"median_s": 0.004}, "ready_s": 3.0}}
    [first] = sections({"ratio": outcome(dtype="float16", candidates=rows)})
    assert first.rows == [("rt", "4 ms", "", "3 s")]
    rows["torch.compile, reduce-overhead"] = {"time": {"median_s": 0.006}, "ready_s": 60.0}
    [both] = sections({"ratio": outcome(dtype="float16", candidates=rows)})
    assert [row[2] for row in both.rows] == ["1.50", "1.00"]


def test_the_chosen_workloads_are_there() -> None:
    pytest.importorskip("triton")
    from rt.bench.gpu_parts.settings import CHOSEN
    from rt.kernels import registry

    assert len(CHOSEN) == 12
    assert all(workload in registry.spec(kernel).workloads for kernel, workload in CHOSEN)


def test_a_package_that_is_none_or_for_another_gpu_is_refused(tmp_path: Path) -> None:
    import torch
    from torch.export.pt2_archive._package import package_pt2

    from rt.backends.inductor import ABOUT, About
    from rt.bench.gpu_parts.package import INPUTS, Package
    from rt.bench.gpu_parts.place import Place
    from rt.errors import CheckpointError, IncompatibleBundleError

    place = Place(torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"is no package: it needs one engines/\*.pt2 and inputs.json"):
        Package(tmp_path, place, 7)
    about = About(
        torch=torch.__version__, machine="", instructions=(), capability=90, file="weights", weights={}
    )
    (tmp_path / "engines").mkdir()
    package_pt2(str(tmp_path / "engines" / "unet.pt2"), extra_files={ABOUT: about.to_json()})
    (tmp_path / INPUTS).write_text('{"inputs": []}')
    with pytest.raises(IncompatibleBundleError, match="for compute capability 90, and this GPU has 0"):
        Package(tmp_path, place, 7)


def test_jobs_of_a_build_travel_to_other_processes_and_are_all_of_a_bundle(tmp_path: Path) -> None:
    import torch

    from rt.bench.gpu_parts import bare
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS
    from rt.config import BuildConfig

    model = Model(setting=SETTINGS["sdxl"].tiny(), place=Place(torch.device("cpu")), seed=7)
    for backend, loop in (("openvino", 0), ("inductor", 1)):
        config = BuildConfig(profiles=(model.profile,), backend=backend)
        found = bare.jobs(model.checkpoint, config, tmp_path, guided=True)
        assert pickle.loads(pickle.dumps(found[0])).programs == found[0].programs
        programs = [component.value for job in found for component in job.programs]
        assert programs == [
            "unet",
            "vae_decoder",
            "unet_time",
            "unet_context",
            "text_encoder",
            "text_encoder_2",
        ]
        assert sum(not job.programs for job in found) == loop


def test_diffusers_tries_convolutions_out_and_nobody_else_does() -> None:
    import torch

    from rt.bench.gpu_parts.eager import Eager
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    peer = Eager(Model(setting=SETTINGS["sd15"].tiny(), place=Place(torch.device("cpu")), seed=7))
    seen: list[bool] = []
    forward = peer.pipeline.unet.forward
    peer.pipeline.unet.forward = lambda *rest, **more: (
        seen.append(torch.backends.cudnn.benchmark) or forward(*rest, **more)
    )
    peer.unet()
    assert seen == [True] and not torch.backends.cudnn.benchmark


def test_the_plot_shows_models_and_kernels(tmp_path: Path) -> None:
    plot = pytest.importorskip("rt.bench.gpu_parts.plot")
    replace(a_run(ceilings=CEILINGS), gpu=H100).save(tmp_path)
    plot.update(tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.svg"))  # nothing that a picture shows

    figures = {"workloads": [KERNEL], "left_out": []}
    sd15 = model(rt=candidate(unet=0.5), diffusers=candidate(unet=0.7, picture_4=2.0))
    replace(a_run(timings=outcome(**figures), sd15=sd15), gpu=H100).save(tmp_path)
    plot.update(tmp_path, tmp_path)
    assert ElementTree.parse(tmp_path / "gpu-h100-80gb-hbm3.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
def test_our_loop_and_the_ways_of_launching_it_stand_on_a_device(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what a dry run does: the same on the stand-in for a GPU, whose kernels are their references."""
    pytest.importorskip("triton")
    import torch

    from rt.bench.gpu_parts import ablation, bundles, ours
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    from ..rt.device_fakes import DeviceEngines, host_device, library

    place = Place(torch.device("cpu"))
    list(bundles.run(Context(dry=True, scratch=scratch, seed=7), "sd15"))
    peer = ours.Ours(Model(setting=SETTINGS["sd15"].tiny(), place=place, seed=7), scratch)
    device = host_device()
    engines: Any = DeviceEngines(peer.pipe.engines.get, device)
    monkeypatch.setattr(peer.pipe, "engines", engines)
    monkeypatch.setattr(ours, "KernelLibrary", lambda device, *_: library(device, tmp_path))
    peer._fill(peer.model.inputs.timestep)
    graphs = {}
    for name, run in peer.loops(3).items():
        device.calls = []
        run()
        graphs[name] = [call.name for call in device.calls].count("graph")
    assert graphs == {"step": 3, "loop": 1}
    assert list(ablation._launching(peer)) == ["no graph", "a graph a step", "one graph of all steps"]


def test_a_model_without_its_bundle_says_what_to_do(context: Context) -> None:
    [_, part] = choose(PARTS, ("sd15",))
    with pytest.raises(ConfigError, match="run the part that builds it first, with the same --scratch"):
        next(part.run(context))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_step_of_diffusers_gets_timesteps_of_its_schedulers_type(tmp_path: Path) -> None:
    """Or a compiler would compile it twice: for the step that is timed, and for the loop."""
    import torch

    from rt.bench.gpu_parts.eager import Eager
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    for name, kind in (("sd15", torch.int64), ("sdxl-turbo", torch.float32)):
        model = Model(setting=SETTINGS[name].tiny(), place=Place(torch.device("cpu")), seed=7)
        peer = Eager(model)
        asked = []
        forward = peer.pipeline.unet.forward
        peer.pipeline.unet.forward = lambda latents, t, *rest, f=forward, a=asked, **more: (
            a.append(t.dtype) or f(latents, t, *rest, **more)
        )
        peer.unet()
        peer.picture(1)
        assert asked == [kind, kind]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["sd15", "sdxl-turbo"])
def test_diffusers_draws_from_the_states_that_the_model_was_made_for(name: str) -> None:
    import torch

    from rt.bench.gpu_parts.eager import Eager
    from rt.bench.gpu_parts.model import Model
    from rt.bench.gpu_parts.place import Place
    from rt.bench.gpu_parts.settings import SETTINGS

    model = Model(setting=SETTINGS[name].tiny(), place=Place(torch.device("cpu")), seed=7)
    peer = Eager(model, torch.float32)
    given: list[torch.Tensor] = []
    forward = peer.pipeline.unet.forward
    peer.pipeline.unet.forward = lambda *rest, **more: (
        given.append(more["encoder_hidden_states"]) or forward(*rest, **more)
    )
    peer.picture(1)
    expected = []
    for encoder, tokens in model.inputs.tokens.items():
        output = model.checkpoint.load(encoder)(tokens, output_hidden_states=True)
        expected.append(output.last_hidden_state if name == "sd15" else output.hidden_states[-2])
    torch.testing.assert_close(given[0], torch.cat(expected, dim=-1))


def test_the_fused_step_runs_kernels_in_the_place_of_every_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from rt.bench.gpu_parts import ablation
    from rt.export.operators import ops

    asked = []
    stand_ins = {
        operator: lambda x, *rest, name=str(operator): asked.append(name) or x
        for operator in ablation._KERNELS
    }
    monkeypatch.setattr(ablation, "_KERNELS", stand_ins)
    x = torch.ones(1, 4, 8)
    with ablation._Kernels():
        ops.attention.default(x, x, x, 2)
        ops.group_norm.default(x, torch.ones(8), torch.zeros(8), 2, 1e-5, True)
        ops.geglu.default(x)
    assert asked == ["rt.attention.default", "rt.group_norm.default", "rt.geglu.default"]
