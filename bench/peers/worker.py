"""The process of one candidate: `python -m rt.bench.peers.worker FD`, started by `remote`.

It reads (request, argument) pairs from the socket FD and answers each with (True, result) or (False, what is wrong).
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

from rt.bench.memory import peak_rss_mib, reset_peak
from rt.bench.peers.candidate import Candidate
from rt.bench.peers.peer import MEASURES, STEP, Inputs, Outcome, Peer, Setting
from rt.errors import RtError
from rt.extras import needs

_LIBRARIES = ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "openvino-genai")


class Worker:
    """Answers requests; its public methods are their names."""

    def __init__(self) -> None:
        self._peer: Peer | None = None

    def prepare(self, argument: tuple[Candidate, Setting]) -> None:
        """Make what the candidate needs on disk."""
        candidate, setting = argument
        with needs(candidate.extra, candidate.name):
            _module(candidate).prepare(setting)

    def load(self, argument: tuple[Candidate, Setting]) -> dict[str, Any]:
        """Load the candidate: seconds, peak memory so far, versions, and what it can be asked for."""
        candidate, setting = argument
        reset_peak()
        started = time.perf_counter()
        with needs(candidate.extra, candidate.name):
            self._peer = _module(candidate).load(setting)
        return {
            "load_s": time.perf_counter() - started,
            "peak_rss_mib": peak_rss_mib(),
            "versions": _versions(),
            "measures": [name for name in MEASURES if name != STEP and hasattr(self._peer, name)],
        }

    def run(self, argument: tuple[str, Inputs, float]) -> Outcome:
        """Call one method of the peer until some seconds have passed; medians of the times, the last output."""
        measure, inputs, seconds = argument
        call: Callable[[Inputs], Outcome] = getattr(self._peer, measure)
        outcomes = [call(inputs)]
        started = time.perf_counter()
        while time.perf_counter() - started + outcomes[0].seconds[measure] < seconds:
            outcomes.append(call(inputs))
        medians = {
            name: statistics.median(each.seconds[name] for each in outcomes) for name in outcomes[0].seconds
        }
        return Outcome(output=outcomes[-1].output, seconds=medians)

    def peak(self, argument: None) -> float:
        """Peak memory since the last question, in MiB."""
        peak = peak_rss_mib()
        reset_peak()
        return peak


def serve(connection: Connection, worker: Any) -> None:
    """Answer until the other side hangs up."""
    while True:
        try:
            request, argument = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(worker, request)(argument))
        except RtError as error:
            answer = (False, str(error))
        except Exception as error:  # of whatever library; the log has the rest
            traceback.print_exc()
            first = str(error).strip().partition("\n")[0]
            answer = (False, f"{request}: {type(error).__name__}: {first}")
        connection.send(answer)


def _module(candidate: Candidate) -> Any:
    return importlib.import_module(f"rt.bench.peers.{candidate.peer}")


def _versions() -> Mapping[str, str]:
    """Of the libraries that this process has loaded."""
    found = {}
    for name in _LIBRARIES:
        if name.replace("-", "_") in sys.modules:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
    return found


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Worker())
