"""A candidate in another process: answers, errors, and ends of all kinds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rt.bench.peers.candidate import Candidate
from rt.bench.peers.peer import Inputs, Outcome, Setting
from rt.bench.peers.remote import WORKER, Remote
from rt.bench.peers.worker import Worker
from rt.errors import BackendError, BackendUnavailableError

CODE = """
import os, sys
from multiprocessing.connection import Connection
from rt.bench.peers.worker import serve
from rt.errors import ConfigError

class Fake:
    def double(self, argument):
        print("doubling")
        return argument * 2
    def refuse(self, argument):
        raise ConfigError("say it otherwise")
    def fail(self, argument):
        raise ValueError("the first line\\nthe second")
    def exit(self, argument):
        os._exit(argument)
    def kill(self, argument):
        os.kill(os.getpid(), argument)

serve(Connection(int(sys.argv[1])), Fake())
"""


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    remote = Remote("abacus", tmp_path / "abacus.log", [sys.executable, "-c", CODE])
    yield remote
    remote.close()


def test_arrays_come_back_and_prints_go_to_the_log(remote: Remote, tmp_path: Path) -> None:
    array = np.random.default_rng().standard_normal((3, 4), np.float32)
    assert np.array_equal(remote.ask("double", array), array * 2)
    remote.close()
    assert (tmp_path / "abacus.log").read_text() == "doubling\n"


@pytest.mark.parametrize(
    ("request_", "message"),
    [("refuse", "abacus: say it otherwise"), ("fail", "abacus: fail: ValueError: the first line")],
)
def test_an_error_is_one_line_and_the_process_lives_on(remote: Remote, request_: str, message: str) -> None:
    with pytest.raises(BackendError) as error:
        remote.ask(request_)
    assert str(error.value) == message
    assert remote.ask("double", 4) == 8


@pytest.mark.parametrize(
    ("request_", "argument", "how"),
    [
        ("exit", 3, "exit code 3"),
        ("kill", 9, "killed, perhaps for lack of memory"),
        ("kill", 11, "signal SIGSEGV"),
    ],
)
def test_a_death_names_the_candidate_its_log_and_what_to_do(
    remote: Remote, tmp_path: Path, request_: str, argument: int, how: str
) -> None:
    with pytest.raises(BackendError) as error:
        remote.ask(request_, argument)
    log = tmp_path / "abacus.log"
    assert str(error.value) == (
        f"abacus died at {request_!r} ({how}); see {log}, or leave it out with --skip 'abacus'"
    )
    with pytest.raises(BackendError, match="abacus died at 'double'"):
        remote.ask("double", 1)


def test_closing_ends_the_process(remote: Remote) -> None:
    remote.ask("double", 1)
    remote.close()
    assert remote._process.returncode == 0


def test_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rt.bench.peers.remote._PATIENCE_S", 0.2)
    remote = Remote("sleeper", tmp_path / "log", [sys.executable, "-c", "import time; time.sleep(60)"])
    remote.close()
    assert remote._process.returncode == -9


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "rt.bench.peers.onnxruntime_cpu", raising=False)
    candidate = Candidate(name="ONNX Runtime", peer="onnxruntime_cpu", extra="onnxruntime", copies=1)
    setting = Setting(checkpoint=tmp_path, work=tmp_path, threads=1)
    for request in (Worker().load, Worker().prepare):
        with pytest.raises(BackendUnavailableError) as error:
            request((candidate, setting))
        assert str(error.value) == (
            'ONNX Runtime needs onnxruntime, which is not installed; run: pip install "onnxruntime>=1.20"'
        )


def inputs() -> Inputs:
    array: Any = np.zeros(1)
    return Inputs(tokens=array, latents=array, timestep=1, context=array, noise=array, prompt="", steps=1)


class Counting:
    """A text encoder that takes 1, 2, 3, ... hundredths of a second by its own watch."""

    def __init__(self) -> None:
        self.calls = 0

    def text(self, inputs: Inputs) -> Outcome:
        self.calls += 1
        return Outcome(output=np.full(1, self.calls, np.float32), seconds={"text": self.calls / 100})


def test_a_turn_is_one_call_of_what_is_long_and_several_of_what_is_short() -> None:
    worker = Worker()
    worker._peer = peer = Counting()  # type: ignore[assignment]  # a part of one
    assert worker.run(("text", inputs(), 0.0)).seconds == {"text": 0.01}
    assert peer.calls == 1
    outcome = worker.run(("text", inputs(), 0.05))
    assert peer.calls > 3 and outcome.output == peer.calls
    assert outcome.seconds["text"] == pytest.approx((2 + peer.calls) / 200)


def test_the_worker_asks_of_a_peer_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        @staticmethod
        def load(setting: Setting) -> Counting:
            return Counting()

    monkeypatch.setitem(sys.modules, "rt.bench.peers.counting", Module)  # type: ignore[arg-type]  # has what it needs
    candidate = Candidate(name="c", peer="counting", extra="build", copies=1)
    loaded = Worker().load((candidate, Setting(checkpoint=tmp_path, work=tmp_path, threads=1)))
    assert loaded["measures"] == ["text"]
    assert loaded["peak_rss_mib"] > 10 and loaded["load_s"] < 5
    assert WORKER[1:] == ("-m", "rt.bench.peers.worker")
