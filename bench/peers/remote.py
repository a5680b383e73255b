"""A candidate in a process of its own, seen from the one that asks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rt.errors import BackendError

WORKER = (sys.executable, "-m", "rt.bench.peers.worker")
_PATIENCE_S = 10


class Remote:
    """One worker process; what it prints goes to `log`.

    Args:
        name: Of the candidate, for messages.
        log: Where its output goes.
        command: What to start; the number of the socket is appended.
    """

    def __init__(self, name: str, log: Path, command: Sequence[str] = WORKER) -> None:
        self.name = name
        self._log = log
        ours, theirs = socket.socketpair()
        with theirs, log.open("w") as output:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
            )
        self._connection = Connection(ours.detach())

    def ask(self, request: str, argument: Any = None) -> Any:
        """Send a request and wait for its answer.

        Raises:
            BackendError: When the candidate cannot do it, or its process died.
        """
        try:
            self._connection.send((request, argument))
            done, result = self._connection.recv()
        except (EOFError, OSError):
            raise BackendError(
                f"{self.name} died at {request!r} ({self._how_it_ended()}); see {self._log}, or leave it out with "
                f"--skip {self.name!r}"
            ) from None
        if not done:
            raise BackendError(f"{self.name}: {result}")
        return result

    def close(self) -> None:
        """Hang up, and wait until the process has given its memory back."""
        self._connection.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _how_it_ended(self) -> str:
        code = self._process.wait(_PATIENCE_S)
        if code == -signal.SIGKILL:
            return "killed, perhaps for lack of memory"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
