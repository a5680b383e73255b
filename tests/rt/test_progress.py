"""The bar: nothing for pipes and files, a living line for people."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress

import pytest

from rt.progress import progress

WORK = """
import time
from rt.progress import progress
with progress("build", total=4) as bar:
    bar.describe("unet: lower")
    bar.advance()
    bar.advance()
    time.sleep(2.5)
print("done")
"""


def test_nothing_is_written_when_stderr_is_no_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_quiet_is_silent_on_a_terminal_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("draw", total=2, quiet=True) as bar:
        bar.describe("x")
        bar.advance()
    assert capsys.readouterr() == ("", "")


ABOVE = """
from rt.progress import progress
with progress("draw", total=4) as bar:
    for name in ("a.png", "b.png"):
        bar.advance()
        with bar.above():
            print(name, flush=True)
"""


def test_what_is_printed_on_the_same_terminal_does_not_run_into_the_bar() -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", ABOVE], stdout=side, stderr=side)
    os.close(side)
    seen = b""
    with os.fdopen(main, "rb", buffering=0) as terminal, suppress(OSError):  # the other side is closed
        while more := terminal.read(4096):
            seen += more
    assert child.wait() == 0
    written = [line.rpartition("\r")[2] for line in seen.decode().replace("\r\n", "\n").split("\n")]
    assert written[:2] == ["a.png", "b.png"] and "draw:" in seen.decode()


def test_a_terminal_sees_stage_step_rate_and_time_left_redrawn_while_a_step_hangs() -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", WORK], stderr=side, stdout=subprocess.PIPE)
    os.close(side)
    seen = ""
    while child.poll() is None or select.select([main], [], [], 0)[0]:
        if select.select([main], [], [], 0.1)[0]:
            try:
                seen += os.read(main, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                break
    os.close(main)
    assert child.communicate()[0] == b"done\n" and child.returncode == 0
    lines = [line for line in re.split(r"[\r\n]+", seen) if "2/4" in line]
    assert re.fullmatch(r"unet: lower:  50%\|.*\| 2/4 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(it/s|s/it)\]", lines[-1])
    elapsed = {re.search(r"\[(\d\d:\d\d)<", line)[1] for line in lines}  # type: ignore[index]
    assert {"00:01", "00:02"} <= elapsed, "the clock stood still while the step hung"
    assert all(len(line) <= 80 for line in lines)
    assert not re.split(r"[\r\n]+", seen.strip("\r\n"))[-1].strip(), "the bar is cleared at the end"


def test_the_bar_ends_with_its_block_when_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), progress("draw", total=2):
        assert threading.active_count() > before
        raise KeyboardInterrupt
    names = [thread.name for thread in threading.enumerate()]
    assert not any("redraw" in name for name in names)
