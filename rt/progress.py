"""Progress of long work on stderr: stage, step, rate and time left; silent when nobody watches."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tqdm import tqdm

_HEARTBEAT_S = 1.0


class Bar(Protocol):
    """One piece of work with a known number of steps."""

    def describe(self, label: str) -> None:
        """Say what is being done now."""

    def advance(self) -> None:
        """One step is done."""

    def above(self) -> AbstractContextManager[None]:
        """In a `with` of it, what is printed on stdout does not run into the bar."""


class _Silent:
    def describe(self, label: str) -> None:
        pass

    def advance(self) -> None:
        pass

    def above(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Terminal:
    def __init__(self, bar: tqdm[None]) -> None:
        self._bar = bar

    def describe(self, label: str) -> None:
        self._bar.set_description_str(label)

    def advance(self) -> None:
        self._bar.update()

    def above(self) -> AbstractContextManager[None]:
        paused: AbstractContextManager[None] = self._bar.external_write_mode(file=sys.stdout)
        return paused


@contextmanager
def progress(label: str, total: int, *, quiet: bool = False) -> Iterator[Bar]:
    """A bar of `total` steps, redrawn every second so that a long step does not look frozen."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield _Silent()
        return
    from tqdm import tqdm

    done = threading.Event()
    with tqdm(total=total, desc=label, leave=False, dynamic_ncols=True, file=sys.stderr) as bar:

        def redraw() -> None:
            while not done.wait(_HEARTBEAT_S):
                bar.refresh()

        heart = threading.Thread(target=redraw, daemon=True)
        heart.start()
        try:
            yield _Terminal(bar)
        finally:
            done.set()
            heart.join()
