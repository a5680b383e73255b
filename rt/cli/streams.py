"""What goes out: no text that would steer a terminal, and streams that may be closed, full or left by their reader."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable
from errno import EPIPE
from typing import TextIO

from rt.errors import RtError, printable


def open_streams() -> None:
    """Make all three standard streams usable, and stdout able to write the bytes of any file's name.

    One that the caller has closed leads nowhere. Else the next file that is opened would take its number, and be
    written into by whatever prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False, errors="backslashreplace")
    codecs.register_error(_RAW, _raw)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors=_RAW)


def say(*lines: str) -> None:
    """Lines for a human, on stderr; dropped where that cannot be written."""
    try:
        print(*map(printable, lines), sep="\n", file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def show(*lines: str) -> None:
    """Lines for a human, on stdout; raises as `hand_out`."""
    _write(map(printable, lines))


def hand_out(*lines: str) -> None:
    """Lines for a program, on stdout: as they are, unless that is a terminal.

    Raises:
        RtError: They cannot be written.
        BrokenPipeError: Nobody reads them any more.
    """
    _write(map(printable, lines) if sys.stdout.isatty() else lines)


def check_written() -> None:
    """Bring what is buffered to stdout; raises as `hand_out`."""
    _write(())


def abandon(stream: TextIO) -> None:
    """Lead a stream that cannot be written nowhere, so that the interpreter's last flush does not fail."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # a stream without a number, of a test or of another program
        pass


_RAW = "rt.raw"


def _raw(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _write(lines: Iterable[str]) -> None:
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:
        if error.errno == EPIPE:
            raise
        abandon(sys.stdout)
        raise RtError(f"cannot write to stdout: {error.strerror or error}") from None
