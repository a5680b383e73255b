"""Code in a process of its own, with a limit of time: an error on a GPU ends all that its process can do there."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rt.bench.gpu_parts.part import Context
from rt.errors import RtError

_PATIENCE_S = 10


@dataclass(frozen=True)
class Ended:
    """How the process ended, after all that it gave."""

    problem: str = ""
    in_time: bool = True


def apart(
    work: Callable[[Context], Iterator[Any]],
    context: Context,
    *,
    seconds: float,
    log: Path,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Any]:
    """What `work(context)` gives, as soon as it is there, then `Ended`.

    Args:
        work: A function of a module, or a method of something that pickles.
        context: For it. A dry run sees no GPU.
        seconds: After these it is stopped, with every process that it has started.
        log: Where it prints.
        environment: Set in the process before `work` begins.
    """
    environment = {**_environment(context), **environment}
    deadline = time.monotonic() + seconds
    ours, theirs = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_work, args=(theirs, work, context, log, environment))
    log.parent.mkdir(parents=True, exist_ok=True)
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(max(deadline - time.monotonic(), 0)):
                yield Ended(f"stopped after {seconds / 60:.1f} minutes; see {log}", in_time=False)
                return
            kind, value = ours.recv()
            if kind == "end":
                yield Ended(value)
                return
            yield value
    except EOFError:
        process.join(_PATIENCE_S)
        yield Ended(f"its process died, exit code {process.exitcode}; see {log}")
    finally:
        ours.close()
        _end_group(process.pid)
        process.kill()  # where it has no group of its own yet
        process.join()


def _work(
    connection: Connection,
    work: Callable[[Context], Iterator[Any]],
    context: Context,
    log: Path,
    environment: Mapping[str, str],
) -> None:
    """In the new process, the leader of a group of its own so that compilers' workers end with it."""
    os.setsid()
    with log.open("w") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    os.environ |= environment
    try:
        for value in work(context):
            connection.send(("value", value))
        problem = ""
    except RtError as error:
        problem = str(error)
    except Exception as error:  # of whatever library; the log has the rest
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        problem = f"{type(error).__name__}: {first}; see {log}"
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(("end", problem))


def _environment(context: Context) -> dict[str, str]:
    """What libraries read when they are imported."""
    if context.dry:
        return {"CUDA_VISIBLE_DEVICES": ""}
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {name: str(context.scratch / "caches" / folder) for name, folder in caches.items()}


def _end_group(pid: int | None) -> None:
    """The processes of a group, if there are any left."""
    if pid is not None:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
