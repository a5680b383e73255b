"""Code in a process apart, with a limit of time: an error on a GPU ends all that its process can do there.

A process does one thing after the other: importing torch and opening the GPU take seconds each time. It is given up
where something failed in it or took too long, and where the next thing wants another environment or a process that
nothing was done in.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from rt.bench.gpu_parts.part import Context
from rt.errors import RtError

_PATIENCE_S = 10.0
_LOOK_S = 0.5
_LEFT: list[subprocess.Popen[bytes]] = []
"""Processes that do not end, and that nobody waits for."""

Work = Callable[[Context], Iterator[Any]]


@dataclass(frozen=True)
class Ended:
    """How something ended, after all that it gave."""

    problem: str = ""
    in_time: bool = True


class Processes:
    """One process at a time, kept for what comes next; used as a context, which ends it."""

    def __init__(self) -> None:
        self._process: _Process | None = None

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def run(
        self,
        work: Work,
        context: Context,
        *,
        seconds: float,
        log: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
        fresh: bool = False,
    ) -> Iterator[Any]:
        """What `work(context)` gives, as soon as it is there, then `Ended`.

        Args:
            work: A function of a module, or a method of something that pickles.
            context: For it. A dry run sees no GPU.
            seconds: After these it is stopped, with every process that it has started.
            log: What it prints is added there.
            environment: Set in the process from its begin.
            fresh: Whether nothing may have been done in the process before.
        """
        deadline = time.monotonic() + seconds
        wanted = {**_environment(context), **environment}
        if self._process is not None and (fresh or self._process.environment != wanted):
            self._end()
        if self._process is None:
            self._process = _Process(wanted, log)
        ended = Ended("given up")
        try:
            for value in self._process.run(work, context, log, deadline):
                if isinstance(value, Ended):
                    ended = value
                else:
                    yield value
        finally:
            remark = self._end() if ended.problem else ""
        if not ended.in_time:
            ended = Ended(f"stopped after {seconds / 60:.1f} minutes; see {log}", in_time=False)
        yield Ended(ended.problem + remark, ended.in_time)

    def _end(self) -> str:
        """What is to be said of it, mostly nothing."""
        process, self._process = self._process, None
        return "" if process is None else process.end()


class _Process:
    """See `serve`."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self.environment = environment
        self._connection, theirs = Pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        code = f"from rt.bench.gpu_parts.apart import serve; serve({theirs.fileno()})"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        theirs.close()
        self._connection.send(sys.path)  # before what is found there

    def run(self, work: Work, context: Context, log: Path, deadline: float) -> Iterator[Any]:
        """See `Processes.run`."""
        try:
            self._connection.send((work, context, log))
            while True:
                # A compiler that it left running may hold the connection open after its own end.
                while not self._connection.poll(min(max(deadline - time.monotonic(), 0.0), _LOOK_S)):
                    if time.monotonic() >= deadline:
                        yield Ended("too late", in_time=False)
                        return
                    if self._process.poll() is not None and not self._connection.poll():
                        raise EOFError
                kind, value = self._connection.recv()
                if kind == "end":
                    yield Ended(value)
                    return
                yield value
        except (EOFError, ConnectionError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_S)
            yield Ended(f"its process died, exit code {self._process.returncode}; see {log}")

    def end(self) -> str:
        """End it with all that it has started. One that the driver does not let go is left behind, and said so."""
        self._connection.close()
        with suppress(
            ProcessLookupError, PermissionError
        ):  # there is no group of its own yet, or none any more
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            _LEFT.append(self._process)
            return f"; its process {self._process.pid} does not end and was left behind"
        return ""


def serve(descriptor: int) -> None:
    """In the new process: do what comes through the connection, one after the other, until it is closed.

    It leads a group, so that compilers' workers end with it; not a session, so that whoever ends the session's
    processes finds it.
    """
    os.setpgid(0, 0)
    os.set_inheritable(descriptor, False)
    connection: Connection[Any, Any] = Connection(descriptor)
    with suppress(EOFError):
        sys.path[:] = connection.recv()
        while True:
            work, context, log = connection.recv()
            connection.send(("end", _do(connection, work, context, log)))


def _do(connection: Connection[Any, Any], work: Work, context: Context, log: Path) -> str:
    """What went wrong, or ""."""
    with log.open("ab") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    try:
        for value in work(context):
            connection.send(("value", value))
        return ""
    except RtError as error:
        return str(error)
    except Exception as error:  # of whatever library; the log has the rest
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first}; see {log}"
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _environment(context: Context) -> dict[str, str]:
    """What libraries read when they are imported."""
    if context.dry:
        return {"CUDA_VISIBLE_DEVICES": ""}
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {name: str(context.scratch / "caches" / folder) for name, folder in caches.items()}
