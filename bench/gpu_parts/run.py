"""One part after the other while there is time, each outcome kept as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from rt.bench.gpu_parts.apart import Ended, apart
from rt.bench.gpu_parts.part import Context, Figures, Part
from rt.bench.gpu_parts.record import DRY, Gpu, Outcome, Run, Status
from rt.bench.record import Provenance
from rt.errors import BackendUnavailableError

Keep = Callable[[Run], None]
Say = Callable[[str], None]
_FACTS_S = 120
_LEAST_MINUTES = 2.0


def find_gpu(context: Context) -> Gpu:
    """What this machine has, asked in a process that ends: none of the GPU's memory stays taken while parts run.

    Raises:
        BackendUnavailableError: There is none.
    """
    if context.dry:
        return DRY
    for value in apart(_facts, context, seconds=_FACTS_S, log=context.scratch / "logs" / "gpu.log"):
        if isinstance(value, Gpu):
            return value
        raise BackendUnavailableError(value.problem)
    raise AssertionError("apart gives at least how it ended")


def _facts(context: Context) -> Iterator[Gpu]:
    from rt.bench.gpu_parts.place import facts

    yield facts(context)


def run_parts(
    parts: Sequence[Part], context: Context, run: Run, *, minutes: float, keep: Keep, say: Say
) -> Run:
    """Run all that the record does not have yet, and what those need: a record cannot say what lies in scratch.

    Args:
        parts: In order.
        context: For each.
        run: What is there already.
        minutes: For all of them; a part is begun only if its estimate still fits, and stopped at twice that or when
            the time is up.
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
        if reason := _hindrance(part, run, left):
            outcome = _outcome(Status.SKIPPED, reason)
        else:
            outcome = _run(
                part, context, run, limit=min(left, max(2 * part.minutes, _LEAST_MINUTES)), keep=keep
            )
        run = run.with_part(part.name, outcome)
        keep(run)
        say(f"{part.name}: {outcome.status.value}, {outcome.seconds:.0f} s. {outcome.reason}".strip())
    return run


def _hindrance(part: Part, run: Run, left: float) -> str:
    """Why not to begin it with so many minutes left, or ""."""
    if not run.dry and run.gpu.capability < part.least_capability:
        return f"needs a GPU of compute capability {part.least_capability / 10}, this one has {run.gpu.capability / 10}"
    if missing := [name for name in part.needs if not run.done(name)]:
        return f"needs {' and '.join(missing)}; run again with --resume"
    if part.minutes > left:
        return f"needs about {part.minutes:g} minutes, {max(left, 0):.1f} are left; run again with --resume"
    return ""


def _run(part: Part, context: Context, run: Run, *, limit: float, keep: Keep) -> Outcome:
    older = run.parts.get(part.name)
    if older is not None and older.status is not Status.DONE and older.commit == Provenance.now().commit:
        context = replace(context, before=older.figures)
    started = time.monotonic()
    figures: Figures = {}
    log = context.scratch / "logs" / f"{part.name}.log"
    environment = part.dry_environment if context.dry else {}
    for value in apart(part.run, context, seconds=60 * limit, log=log, environment=environment):
        seconds = time.monotonic() - started
        if not isinstance(value, Ended):
            figures = value
            stopped = _outcome(Status.STOPPED, "broken off while it ran", seconds, figures)
            keep(run.with_part(part.name, stopped))
            continue
        status = Status.STOPPED if not value.in_time else Status.FAILED if value.problem else Status.DONE
        return _outcome(status, value.problem, seconds, figures)
    raise AssertionError("apart says how it ended")


def _outcome(status: Status, reason: str, seconds: float = 0.0, figures: Figures | None = None) -> Outcome:
    now = Provenance.now()
    return Outcome(
        status=status, reason=reason, seconds=seconds, date=now.date, commit=now.commit, figures=figures or {}
    )
