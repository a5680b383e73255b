"""One part after the other while there is time, each outcome kept as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from rt.bench.gpu_parts.apart import Ended, Processes
from rt.bench.gpu_parts.part import Context, Figures, Part
from rt.bench.gpu_parts.record import DRY, Gpu, Outcome, Run, Status
from rt.bench.record import Provenance, commit
from rt.errors import BackendUnavailableError

Keep = Callable[[Run], None]
Say = Callable[[str], None]
_FACTS_S = 120
_TOLERANCE = 1.3
"""What a part may take, in its estimates: what goes wrong on a GPU mostly hangs."""
_LEAST_MINUTES = 1.0
_LONGEST_LOG, _TAIL = 8 << 20, 4 << 20


@dataclass(frozen=True)
class Found:
    """What this machine has, and what a record says of where it comes from."""

    gpu: Gpu
    provenance: Provenance


def find_gpu(context: Context, processes: Processes) -> Found:
    """Asked in the process of the first parts: the one that waits for them needs neither torch nor memory of the GPU.

    Raises:
        BackendUnavailableError: There is none.
    """
    if context.dry:
        return Found(DRY, Provenance.now())
    log = context.scratch / "logs" / "gpu.log"
    for value in processes.run(_facts, context, seconds=_FACTS_S, log=log):
        if isinstance(value, Ended):
            raise BackendUnavailableError(value.problem)
        found: Found = value
    return found


def _facts(context: Context) -> Iterator[Found]:
    from rt.bench.gpu_parts.place import facts

    yield Found(facts(context), Provenance.now())


def run_parts(
    parts: Sequence[Part],
    context: Context,
    run: Run,
    *,
    processes: Processes,
    minutes: float,
    log: Path,
    keep: Keep,
    say: Say,
) -> Run:
    """Run all that the record does not have yet, and what those need: a record cannot say what lies in scratch.

    Args:
        parts: In order.
        context: For each.
        run: What is there already.
        processes: In which they run.
        minutes: For all of them; a part is begun only if its estimate still fits, and stopped at 1.3 times that or
            when the time is up. Estimates are not for a dry run.
        log: What they print is added there.
        keep: Called with the record whenever there is more of it.
        say: Called with a line on how each part ended.
    """
    deadline = time.monotonic() + 60 * minutes
    for part in parts:
        users = [other.name for other in parts if part.name in other.needs]
        if run.done(part.name) and all(map(run.done, users)):
            say(f"{part.name}: kept, measured {run.parts[part.name].date}")
            continue
        left = (deadline - time.monotonic()) / 60
        if reason := _hindrance(part, context, run, left):
            outcome = _outcome(Status.SKIPPED, reason)
        else:
            most = left if context.dry else max(_TOLERANCE * part.minutes, _LEAST_MINUTES)
            _begin(log, part.name)
            outcome = _run(part, context, run, processes, limit=min(left, most), log=log, keep=keep)
        run = run.with_part(part.name, outcome)
        keep(run)
        say(f"{part.name}: {outcome.status.value}, {outcome.seconds:.0f} s. {outcome.reason}".strip())
    return run


def _hindrance(part: Part, context: Context, run: Run, left: float) -> str:
    """Why not to begin it with so many minutes left, or ""."""
    if not context.dry and run.gpu.capability < part.least_capability:
        return f"needs a GPU of compute capability {part.least_capability / 10}, this one has {run.gpu.capability / 10}"
    if part.reads_packages and context.packages is None and not context.dry:
        return "needs --packages, a folder that --prepare has written"
    if missing := [name for name in part.needs if not run.done(name)]:
        return f"needs {' and '.join(missing)}; run again with --resume"
    if part.minutes > left:
        return f"needs about {part.minutes:g} minutes, {max(left, 0):.1f} are left; run again with --resume"
    return ""


def _run(
    part: Part, context: Context, run: Run, processes: Processes, *, limit: float, log: Path, keep: Keep
) -> Outcome:
    older = run.parts.get(part.name)
    if older is not None and older.status is not Status.DONE and older.commit == commit():
        context = replace(context, before=older.figures)
    started = time.monotonic()
    figures: Figures = {}
    for value in processes.run(
        part.run,
        context,
        seconds=60 * limit,
        log=log,
        environment=part.dry_environment if context.dry else {},
        fresh=part.fresh and not context.dry,
    ):
        seconds = time.monotonic() - started
        if not isinstance(value, Ended):
            figures = value
            stopped = _outcome(Status.STOPPED, "broken off while it ran", seconds, figures)
            keep(run.with_part(part.name, stopped))
            continue
        status = Status.STOPPED if not value.in_time else Status.FAILED if value.problem else Status.DONE
        return _outcome(status, value.problem, seconds, figures)
    raise AssertionError("a process says how it ended")


def _outcome(status: Status, reason: str, seconds: float = 0.0, figures: Figures | None = None) -> Outcome:
    return Outcome(
        status=status,
        reason=reason,
        seconds=seconds,
        date=datetime.now().date().isoformat(),
        commit=commit(),
        figures=figures or {},
    )


def _begin(log: Path, name: str) -> None:
    """A headline for what a part prints; of a log that has grown long, the end stays."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.is_file() and log.stat().st_size > _LONGEST_LOG:
        log.write_bytes(log.read_bytes()[-_TAIL:])
    with log.open("a") as file:
        file.write(f"== {name} ==\n")
